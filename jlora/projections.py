"""The one table of a model's linear projections.

It drives the construction of layers, the packing of base weights and of adapters, the shapes of
the adapter pool, and the sharding. Widths here are those of Hugging Face; `columns` and
`local_widths` say how a projection lies on `shards` devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jlora.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One Hugging Face module of a projection: its output is `units` indivisible pieces."""

    name: str
    width: int
    units: int
    bias: bool


@dataclass(frozen=True)
class Projection:
    """A row of the table: parts share their input and lie beside each other in the output.

    shard: "out" divides the output among devices (column-parallel), "in" the input
    (row-parallel; the outputs of the devices are summed).
    """

    name: str
    module: str
    parts: tuple[Part, ...]
    d_in: int
    shard: Literal["out", "in"]

    @property
    def bias(self) -> bool:
        """Whether any part has a bias; parts without one get zeros."""
        return any(part.bias for part in self.parts)

    def local_units(self, part: Part, shards: int) -> int:
        """Pieces of a part on one device; at least one, so few KV heads are on several."""
        return max(part.units // shards, 1) if self.shard == "out" else part.units

    def local_widths(self, shards: int) -> tuple[int, ...]:
        """Output columns of each part on one device."""
        return tuple(
            self.local_units(part, shards) * (part.width // part.units) for part in self.parts
        )

    def stored_width(self, shards: int) -> int:
        """Output columns over all devices, copies included."""
        local = sum(self.local_widths(shards))
        return local * shards if self.shard == "out" else local

    def columns(self, shards: int) -> np.ndarray:
        """int64 [stored_width]: the Hugging Face output column (parts concatenated) of each."""
        if self.shard == "in":
            return np.arange(sum(part.width for part in self.parts))
        columns = []
        for shard in range(shards):
            start = 0
            for part, width in zip(self.parts, self.local_widths(shards), strict=True):
                unit = part.width // part.units
                first = shard * part.units // shards * unit
                columns.append(start + first + np.arange(width))
                start += part.width
        return np.concatenate(columns)


def projection_table(config: ModelConfig) -> tuple[Projection, ...]:
    """The projections of one decoder layer, in the order in which they run."""
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = [("q_proj", heads), ("k_proj", kv), ("v_proj", kv)]
    return (
        Projection(
            "qkv",
            "self_attn",
            tuple(Part(name, n * dim, n, config.qkv_bias) for name, n in attention),
            hidden,
            "out",
        ),
        Projection(
            "o", "self_attn", (Part("o_proj", hidden, 1, config.o_bias),), heads * dim, "in"
        ),
        Projection(
            "gate_up",
            "mlp",
            tuple(Part(name, inner, inner, config.mlp_bias) for name in ("gate_proj", "up_proj")),
            hidden,
            "out",
        ),
        Projection("down", "mlp", (Part("down_proj", hidden, 1, config.mlp_bias),), inner, "in"),
    )


def check_shards(config: ModelConfig, shards: int) -> None:
    """Raises when the model cannot be divided among `shards` devices."""
    kv = config.num_kv_heads
    for name, size in (
        ("num_attention_heads", config.num_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        if size % shards:
            raise ValueError(f"tensor_parallel_size={shards} does not divide {name}={size}")
    if kv % shards and shards % kv:
        raise ValueError(
            f"tensor_parallel_size={shards} neither divides num_key_value_heads={kv} nor is a "
            "multiple of it"
        )


@dataclass(frozen=True)
class ModulePlace:
    """Where a Hugging Face module lies: a projection's part in a layer."""

    projection: Projection
    part: int
    layer: int


class ModuleMap:
    """Hugging Face module names <-> places in the projection table."""

    def __init__(self, config: ModelConfig) -> None:
        self.num_layers = config.num_layers
        self.projections = projection_table(config)
        # Exact names only: "layers.01" is not another spelling of a layer.
        self._places = {
            self.name(projection, part, layer): ModulePlace(projection, part, layer)
            for layer in range(self.num_layers)
            for projection in self.projections
            for part in range(len(projection.parts))
        }

    def name(self, projection: Projection, part: int, layer: int) -> str:
        """The module's name in a checkpoint, without ".weight"."""
        return f"model.layers.{layer}.{projection.module}.{projection.parts[part].name}"

    def place(self, name: str) -> ModulePlace | None:
        """Where the module lies, or None when the model has no such projection."""
        return self._places.get(name)

    def names(self) -> list[str]:
        """Every projection module of the model, layer by layer."""
        return list(self._places)
