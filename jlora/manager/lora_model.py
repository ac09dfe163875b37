"""One adapter on the host: its layers, checked against the model it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.peft import PEFTHelper, file_identity, read_adapter
from jlora.projections import ModuleMap

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


@dataclass
class LoRALayerWeights:
    """The adapter of one module: delta W = scaling * lora_b @ lora_a.

    lora_a: [rank, input_dim]. lora_b: [output_dim, rank]. Both as PEFT saves them (of an embedding
    lora_embedding_A and _B; input_dim is the vocabulary). bias: of lora_B, [output_dim], scaled as
    lora_b is. magnitude: DoRA's, [output_dim]; the whole is then magnitude * (W + delta W) /
    norm(W + delta W), the norm over the input (Liu et al. 2024, eq. 5).
    """

    module_name: str
    rank: int
    lora_alpha: float
    lora_a: np.ndarray
    lora_b: np.ndarray
    scaling: float
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def optimize(self) -> LoRALayerWeights:
        """Folds the scale into lora_b, in float32; afterwards scaling is 1."""
        if self.scaling != 1.0:
            scaled = self.lora_b.astype(np.float32) * np.float32(self.scaling)
            self.lora_b = scaled.astype(self.lora_b.dtype)
            self.scaling = 1.0
        return self

    @property
    def input_dim(self) -> int:
        """Width of the module's input."""
        return self.lora_a.shape[1]

    @property
    def output_dim(self) -> int:
        """Width of the module's output."""
        return self.lora_b.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether this holds several modules that run as one projection."""
        return False


@dataclass
class PackedLoRALayerWeights:
    """The adapters of the modules of one projection (q, k, v); None where one has none."""

    module_name: str
    parts: tuple[LoRALayerWeights | None, ...]

    @classmethod
    def pack(
        cls, module_name: str, parts: Sequence[LoRALayerWeights | None]
    ) -> PackedLoRALayerWeights:
        """Puts the parts beside each other; they keep their own ranks and scales."""
        return cls(module_name, tuple(parts))

    @property
    def rank(self) -> int:
        """The largest rank of the parts."""
        return max((part.rank for part in self.parts if part is not None), default=0)

    @property
    def is_packed(self) -> bool:
        """Whether this holds several modules that run as one projection."""
        return True


@dataclass(frozen=True)
class VocabRows:
    """Rows of embed_tokens or lm_head that an adapter has instead of the base's, or added ones."""

    ids: np.ndarray  # int32 [rows], ascending
    rows: np.ndarray  # [rows, hidden]


class LoRAModel:
    """One adapter: the weights of each module that it changes."""

    def __init__(
        self,
        lora_model_id: int,
        rank: int,
        loras: dict[str, LoRALayerWeights],
        identity: str = "",
        *,
        biases: dict[str, np.ndarray] | None = None,
        vocab_rows: dict[str, VocabRows] | None = None,
        added_tokens: int = 0,
        invocation_tokens: tuple[int, ...] = (),
        tensor_counts: dict[str, int] | None = None,
    ) -> None:
        """rank: the largest of the layers. identity: what makes this version this one.

        biases: module -> what its bias is instead of the base's, [d_out]. vocab_rows: by
        "embed_tokens", "lm_head". added_tokens: ids from the base's vocabulary size on that the
        adapter knows too. invocation_tokens: the adapter acts from their last occurrence in the
        prompt on (an activated LoRA); none: everywhere. tensor_counts: how many tensors of the
        file went to each row of the projection table.
        """
        self.id = lora_model_id
        self.rank = rank
        self.loras = loras
        self.biases = biases or {}
        self.vocab_rows = vocab_rows or {}
        self.added_tokens = added_tokens
        self.invocation_tokens = invocation_tokens
        self.tensor_counts = tensor_counts or {}
        self.blocks_needed: dict[str, int] | None = None  # see blocks.blocks_needed
        self.identity = identity or f"id:{lora_model_id}"

    @property
    def key(self) -> str:
        """Names this adapter in this version."""
        return f"{self.id}:{self.identity}"

    @property
    def components(self) -> tuple[tuple[LoRAModel, float], ...]:
        """Itself, with weight 1: what a mixture has several of."""
        return ((self, 1.0),)

    def get_lora(self, module_name: str) -> LoRALayerWeights | None:
        """The weights for a module ("model.layers.0.self_attn.q_proj"), or None."""
        return self.loras.get(module_name)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any(layer.magnitude is not None for layer in self.loras.values())

    @property
    def has_biases(self) -> bool:
        """Whether it adds to biases, or has its own."""
        return bool(self.biases) or any(layer.bias is not None for layer in self.loras.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in self.loras.values())

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str | Path,
        lora_model_id: int,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        name: str | None = None,
        base_weight: Callable[[str], np.ndarray] | None = None,
    ) -> LoRAModel:
        """Reads a folder that PEFT saved. Raises AdapterError for anything that does not fit."""
        folder = Path(lora_dir)
        name = name or f"adapter {folder.name}"
        identity = file_identity(folder)
        helper, tensors = read_adapter(folder, name)
        return cls.from_lora_tensors(
            lora_model_id, tensors, helper, modules, lora_config, name=name, identity=identity
        )

    @classmethod
    def from_lora_tensors(
        cls,
        lora_model_id: int,
        tensors: dict[str, np.ndarray],
        peft_helper: PEFTHelper,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        name: str | None = None,
        identity: str = "",
        base_weight: Callable[[str], np.ndarray] | None = None,
    ) -> LoRAModel:
        """Places each tensor ("base_model.model.<module>.lora_A.weight") or raises AdapterError."""
        name = name or f"adapter {lora_model_id}"
        pairs: dict[str, dict[str, np.ndarray]] = {}
        for key, tensor in tensors.items():
            module, matrix = _parse_key(key, name)
            _check_target(module, key, peft_helper, modules, lora_config, name)
            pair = pairs.setdefault(module, {})
            if matrix in pair:
                raise AdapterError(f"{name}: {module}.{matrix}.weight is there twice, as {key} too")
            pair[matrix] = tensor
        if not pairs:
            raise AdapterError(f"{name}: the file holds no tensors")
        loras = {
            module: _layer(module, pair, peft_helper, modules, lora_config, name)
            for module, pair in pairs.items()
        }
        rank = max(layer.rank for layer in loras.values())
        return cls(lora_model_id, rank, loras, identity)


def _parse_key(key: str, name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])\.weight", key)
    if match is None:
        raise AdapterError(
            f"{name}: tensor {key!r} is not supported; expected <module>.lora_A.weight or "
            "<module>.lora_B.weight"
        )
    return match[1], match[2]


def _check_target(
    module: str,
    key: str,
    helper: PEFTHelper,
    modules: ModuleMap,
    lora_config: LoRAConfig,
    name: str,
) -> None:
    place = modules.place(module)
    if place is None or not place.projection.per_layer:
        known = sorted({part.name for row in modules.projections for part in row.parts})
        raise AdapterError(
            f"{name}: tensor {key} is for module {module}, which the model has not or which "
            f"cannot take an adapter; {', '.join(known)} of layers 0 to "
            f"{modules.num_layers - 1} can"
        )
    if not helper.targets(module):
        raise AdapterError(
            f"{name}: tensor {key} is for a module that target_modules="
            f"{helper.target_modules!r} of its configuration does not name; PEFT would drop it"
        )
    allowed = lora_config.target_modules
    if allowed is not None and module.rsplit(".", 1)[1] not in allowed:
        raise AdapterError(
            f"{name}: module {module} is not among the engine's target modules {list(allowed)}"
        )


def _layer(
    module: str,
    pair: dict[str, np.ndarray],
    helper: PEFTHelper,
    modules: ModuleMap,
    lora_config: LoRAConfig,
    name: str,
) -> LoRALayerWeights:
    for matrix in ("lora_A", "lora_B"):
        if matrix not in pair:
            raise AdapterError(f"{name}: module {module} has no {matrix}.weight")
    rank = helper.rank(module)
    if rank > lora_config.max_lora_rank:
        raise AdapterError(
            f"{name}: rank {rank} of {module} is above max_lora_rank={lora_config.max_lora_rank}; "
            f"{rank} or more would take it"
        )
    place = modules.place(module)
    assert place is not None  # _check_target has looked
    d_in, d_out = place.projection.d_in, place.projection.parts[place.part].width
    for matrix, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
        tensor = pair[matrix]
        if tensor.shape != shape:
            raise AdapterError(
                f"{name}: {module}.{matrix}.weight has shape {list(tensor.shape)}, expected "
                f"{list(shape)} (rank {rank} by its configuration, {d_in} in and {d_out} out by "
                "the model)"
            )
        if tensor.dtype not in _FLOATS:
            raise AdapterError(
                f"{name}: {module}.{matrix}.weight is {tensor.dtype}, expected a floating point "
                "dtype (float32, float16 or bfloat16)"
            )
        scale = abs(helper.scaling(module)) if matrix == "lora_B" else 1.0
        largest, limit = _largest(tensor), _limit(lora_config.lora_dtype)
        if not max(largest, largest * scale) <= limit:  # so NaN does not pass
            raise AdapterError(
                f"{name}: {module}.{matrix}.weight holds {largest:g}, which times the scale "
                f"{scale:g} is not a finite {_dtype_name(lora_config)} number (NaN or infinity, or "
                f"above {limit:g})"
            )
    return LoRALayerWeights(
        module, rank, helper.alpha(module), pair["lora_A"], pair["lora_B"], helper.scaling(module)
    )


def _dtype_name(config: LoRAConfig) -> str:
    return "float32" if config.lora_dtype == "auto" else config.lora_dtype


def _limit(dtype: str) -> float:
    """The largest number of the adapter pool."""
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(dtype, np.float32)
    return float(ml_dtypes.finfo(kind).max)


def _largest(tensor: np.ndarray) -> float:
    """The largest magnitude; NaN or infinity when there is one."""
    if tensor.size == 0:
        return 0.0
    if tensor.dtype == np.float64:
        return float(np.abs(tensor).max())
    # The bits without the sign are ordered as the magnitudes are, and integers compare fast.
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    bits = (tensor.view(unsigned) & np.iinfo(unsigned).max // 2).max()
    return float(bits.reshape(1).view(tensor.dtype)[0])
