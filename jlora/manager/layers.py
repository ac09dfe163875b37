"""The low-rank adapter of one module, as PEFT saves it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jlora.manager.peft import TensorLike
from jlora.manager.peft_config import EMBED, HEAD
from jlora.manager.tensors import Source, Tensor
from jlora.manager.weights import LoRALayerWeights
from jlora.projections import ModulePlace

LORA_KINDS = (
    "lora_A",
    "lora_B",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_velora_embed",
)
_OLD_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral, transformers 4


def canonical(source: Source, module: str) -> str:
    """The name of the table for a module that older checkpoints name otherwise."""
    if source.modules.place(module) is not None:
        return module
    renamed = module.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(?<=\.)w[123]$", lambda match: _OLD_NAMES[match[0]], renamed)


def place_of(source: Source, tensor: Tensor) -> ModulePlace:
    """Where a tensor's module lies; raises when the model has it not or it may not be touched."""
    name = canonical(source, tensor.module)
    place = source.modules.place(name)
    if place is None:
        rows = (*source.modules.projections, *source.modules.vocab_projections)
        known = sorted({part.name for row in rows for part in row.parts})
        source.fail(
            f"tensor {tensor.key} is for module {tensor.module}, which the model has not or which "
            f"cannot take an adapter; {', '.join(known)} can (layers 0 to "
            f"{source.modules.num_layers - 1})"
        )
    check_allowed(source, name)
    return place


def check_allowed(source: Source, name: str) -> None:
    """Raises for a module that the engine does not let adapters touch."""
    allowed = source.config.target_modules
    if allowed is not None and name.rsplit(".", 1)[-1] not in allowed:
        source.fail(f"module {name} is not among the engine's target modules {list(allowed)}")


def check_rank(source: Source, rank: int, name: str) -> int:
    """Raises for a rank above the engine's limit."""
    limit = source.config.max_lora_rank
    if rank > limit:
        source.fail(
            f"rank {rank} of {name} is above max_lora_rank={limit}; {rank} or more would take it"
        )
    return rank


def adapted_name(source: Source, tensor: Tensor) -> str:
    """The name that the configuration's patterns match for the tensor's module."""
    helper = source.helper
    name = helper.adapted_name(tensor.module)
    if name is None and tensor.module == HEAD and source.tied and helper.ensure_weight_tying:
        name = HEAD if helper.targets(EMBED) else None
    if name is None:
        source.fail(
            f"tensor {tensor.key} is for a module that target_modules={helper.target_modules!r} "
            f"and target_parameters={list(helper.target_parameters)} of its configuration do not "
            "name; PEFT would drop it"
        )
    return name


@dataclass(frozen=True)
class Layer:
    """The tensors of one module's adapter, and what the configuration says of it.

    module: as the file names it. name: what PEFT's patterns match.
    """

    module: str
    name: str
    place: ModulePlace
    rank: int
    tensors: dict[str, Tensor]


def plan_layer(source: Source, tensors: dict[str, Tensor]) -> Layer:
    """Finds the place of a module's adapter. Raises for one that is not of the configuration."""
    first = next(iter(tensors.values()))
    place, name = place_of(source, first), adapted_name(source, first)
    if first.module == EMBED and name != EMBED:
        source.fail(
            f"target_parameters names {name}, which is not supported; put embed_tokens into "
            "target_modules"
        )
    rank = check_rank(source, source.helper.rank(name), first.module)
    return Layer(first.module, name, place, rank, tensors)


def check_layer(source: Source, layer: Layer, added: int) -> None:
    """Raises for tensors that are not an adapter of the module. Reads nothing.

    added: tokens beyond the base model's vocabulary.
    """
    place, helper = layer.place, source.helper
    shapes = _shapes(layer, added)
    wanted = [kind for kind in shapes if kind.endswith(("_A", "_B"))]
    wanted += ["lora_magnitude_vector"] * helper.use_dora + ["lora_B.bias"] * helper.lora_bias
    for kind in wanted:
        if kind not in layer.tensors:
            dot = ".weight" * (kind in ("lora_A", "lora_B"))
            source.fail(f"module {layer.module} has no {kind}{dot}")
    why = (
        f"rank {layer.rank} by its configuration, {place.d_in} in and {place.d_out} out by the "
        "model"
    )
    for kind, tensor in layer.tensors.items():
        if place.projection.experts and kind in ("lora_magnitude_vector", "lora_B.bias"):
            source.fail(
                f"tensor {tensor.key} is not supported: DoRA and lora_bias of single experts are "
                "not served"
            )
        if kind in wanted:
            source.check(tensor, shapes[kind], why)
        elif kind != "lora_velora_embed":
            switch = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}.get(kind)
            reason = f"{switch} of its configuration is off" if switch else f"expected {wanted}"
            source.fail(
                f"tensor {tensor.key} does not belong to an adapter of {layer.module}: {reason}"
            )


def _shapes(layer: Layer, added: int) -> dict[str, tuple[int, ...]]:
    rank, d_in, d_out = layer.rank, layer.place.d_in, layer.place.d_out
    if layer.module == EMBED:
        return {
            "lora_embedding_A": (rank, d_in + added),
            "lora_embedding_B": (d_out, rank),
            "lora_magnitude_vector": (d_out,),
        }
    d_out += added * (layer.module == HEAD)
    return {
        "lora_A": (rank, d_in),
        "lora_B": (d_out, rank),
        "lora_B.bias": (d_out,),
        "lora_magnitude_vector": (d_out,),
    }


@dataclass(frozen=True)
class LayerPlan:
    """How to read the adapter of a module: names in the file, None for what it has not."""

    module_name: str
    rank: int
    alpha: float
    scaling: float
    a: str
    b: str
    bias: str | None
    magnitude: str | None

    @classmethod
    def of(cls, source: Source, layer: Layer) -> LayerPlan:
        """Of a layer that `check_layer` has passed."""
        keys = {kind: tensor.key for kind, tensor in layer.tensors.items()}
        prefix = "lora_embedding" if layer.module == EMBED else "lora"
        return cls(
            canonical(source, layer.module),
            layer.rank,
            source.helper.alpha(layer.name),
            source.helper.scaling(layer.name),
            keys[f"{prefix}_A"],
            keys[f"{prefix}_B"],
            keys.get("lora_B.bias"),
            keys.get("lora_magnitude_vector"),
        )

    def read(self, source: Source, tensors: Mapping[str, TensorLike]) -> LoRALayerWeights:
        """The adapter of the module."""
        scale, bias, magnitude = abs(self.scaling), self.bias, self.magnitude
        return LoRALayerWeights(
            self.module_name,
            self.rank,
            self.alpha,
            source.read_data(self.a, tensors[self.a]),
            source.read_data(self.b, tensors[self.b], scale),
            self.scaling,
            None if bias is None else source.read_data(bias, tensors[bias], scale),
            None if magnitude is None else source.read_data(magnitude, tensors[magnitude]),
        )
