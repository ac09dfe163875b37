"""Tensors of an adapter file: what each is by its name, and reading it once it fits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import ml_dtypes
import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.magnitude import largest
from jlora.manager.peft import TensorLike
from jlora.manager.peft_config import PEFTHelper
from jlora.manager.safetensors_file import FileTensor
from jlora.projections import ModuleMap

_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
_CHUNK = 1 << 26  # bytes that a comparison holds at a time
_LONGEST_NAME = 400

# What may follow the module's name, and what it is. The first that fits is meant.
_KINDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",  # older PEFT
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_velora_embed": "lora_velora_embed",  # used in training only
    ".token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
    ".token_adapter.base_layer.weight": "token_adapter.base_layer",
    ".base_layer.weight": "base_layer",
    ".original_module.weight": "original_module",
    ".modules_to_save.weight": "modules_to_save",
    ".base_layer.bias": "base_layer.bias",
    ".weight": "weight",
    ".bias": "bias",
}
PREFIX = "base_model.model."
_IN_MEMORY = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_velora_embed|"
    r"trainable_tokens_delta|modules_to_save)\.(?!weight$|bias$)[^.]+(\.weight|\.bias|)$"
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. key: its name there. module: without PEFT's prefix."""

    key: str
    module: str
    kind: str
    data: TensorLike


Modules = dict[str, dict[str, Tensor]]  # module -> kind -> tensor


def without_adapter_name(key: str) -> str:
    """PEFT's name in memory ("...lora_A.default.weight") as the one in a file."""
    key = _IN_MEMORY.sub(r".\1\2", key)
    return re.sub(r"\.modules_to_save\.weight$", ".weight", key)


def by_module(tensors: Mapping[str, TensorLike], adapter: str) -> Modules:
    """The tensors of each module. Raises for a name that is not understood, or there twice."""
    modules: Modules = {}
    for key, data in tensors.items():
        suffix = next((one for one in _KINDS if key.endswith(one)), "")
        module = key.removeprefix(PREFIX).removesuffix(suffix)
        if not suffix or not module or not module.isprintable() or len(key) > _LONGEST_NAME:
            raise AdapterError(
                f"{adapter}: tensor {key[:300]!r} is not supported; expected "
                "<module>.lora_A.weight, <module>.lora_B.weight, or what else PEFT saves"
            )
        tensor = Tensor(key, module, _KINDS[suffix], data)
        other = modules.setdefault(module, {}).setdefault(tensor.kind, tensor)
        if other is not tensor:
            raise AdapterError(f"{adapter}: tensor {other.key} is there twice, as {key} too")
    if not modules:
        raise AdapterError(f"{adapter}: the file holds no tensors")
    return modules


def require_float(tensor: Tensor, adapter: str) -> None:
    """Raises AdapterError for a dtype that is not served."""
    if tensor.data.dtype not in _FLOATS:
        raise AdapterError(
            f"{adapter}: tensor {tensor.key} is {tensor.data.dtype}, expected a floating point "
            "dtype (float32, float16 or bfloat16)"
        )


@dataclass(frozen=True)
class Source:
    """What is read, and what it is checked against. adapter: its name, for messages.

    base_weight: a tensor of the base model by its name, as the checkpoint has it. seen: the same
    files have been read before, so that no number needs to be looked at.
    """

    adapter: str
    helper: PEFTHelper
    modules: ModuleMap
    config: LoRAConfig
    base_weight: Callable[[str], np.ndarray] | None = None
    seen: bool = False

    def fail(self, message: str) -> NoReturn:
        """Raises an AdapterError with the adapter's name."""
        raise AdapterError(f"{self.adapter}: {message}")

    @property
    def tied(self) -> bool:
        """Whether lm_head is the embedding of the base model."""
        return self.modules.config.tie_word_embeddings

    def check(self, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
        """Raises for another shape, or a dtype that is not served. Reads nothing."""
        if tuple(tensor.data.shape) != shape:
            self.fail(
                f"tensor {tensor.key} has shape {list(tensor.data.shape)}, expected {list(shape)} "
                f"({why})"
            )
        require_float(tensor, self.adapter)

    def read(self, tensor: Tensor, scale: float = 1.0) -> np.ndarray:
        """The array, float64 as float32. Raises for numbers that the device cannot hold."""
        return self.read_data(tensor.key, tensor.data, scale)

    def read_data(self, key: str, data: TensorLike, scale: float = 1.0) -> np.ndarray:
        """As `read`, of a tensor's name and data."""
        bound = None
        if isinstance(data, FileTensor) and not self.seen:
            bound = data.bound  # of all of the file at once
        return self.narrowed(key, np.asarray(data[...]), scale, bound)

    def narrowed(
        self, key: str, array: np.ndarray, scale: float = 1.0, bound: float | None = None
    ) -> np.ndarray:
        """Rows of a tensor that have been read, checked as `read` does.

        bound: none of their numbers is larger in magnitude; None when that is not known.
        """
        if not self.seen:
            self._check_numbers(key, array, scale, bound)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def _check_numbers(
        self, key: str, array: np.ndarray, scale: float, bound: float | None
    ) -> None:
        limit = largest_held(self.config)
        found = (
            bound if bound is not None and max(bound, bound * scale) <= limit else largest(array)
        )
        # `not <=`, so that NaN does not pass.
        if not self.config.allow_nonfinite_loras and not max(found, found * scale) <= limit:
            self.fail(
                f"tensor {key} holds {found:g}, which times the scale {scale:g} is not a "
                f"finite {_pool_dtype(self.config)} number (NaN or infinity, or above {limit:g})"
            )


def chunks(rows: int, row_bytes: int) -> list[slice]:
    """Rows in pieces small enough to be held at once."""
    step = max(_CHUNK // max(row_bytes, 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pool_dtype(config: LoRAConfig) -> str:
    return "float32" if config.lora_dtype == "auto" else config.lora_dtype


def largest_held(config: LoRAConfig) -> float:
    """The largest number of the adapter pool."""
    return _largest_of(_pool_dtype(config))


@functools.cache
def _largest_of(dtype: str) -> float:
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(dtype, np.float32)
    return float(ml_dtypes.finfo(kind).max)
