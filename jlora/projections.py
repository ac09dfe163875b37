"""The one table of a model's linear projections.

It drives the construction of layers, the packing of base weights and of adapters, the shapes of
the adapter pool, and the sharding. Widths here are those of Hugging Face; `columns` and
`local_widths` say how a projection lies on `shards` devices.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jlora.config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """Output columns that are divided among devices together, as `units` indivisible units."""

    width: int
    units: int


@dataclass(frozen=True)
class Part:
    """One Hugging Face module of a projection. A fused one (qkv_proj of Phi) has several pieces."""

    name: str
    pieces: tuple[Piece, ...]
    bias: bool = False

    @property
    def width(self) -> int:
        """Output columns of the module."""
        return sum(piece.width for piece in self.pieces)


@dataclass(frozen=True)
class Projection:
    """A row of the table: parts share their input and lie beside each other in the output.

    shard: "out" divides the output among devices (column-parallel), "in" the input
    (row-parallel; the outputs of the devices are summed), "experts" whole matrices
    (expert-parallel), "none" nothing. experts: how many matrices of this kind a layer has; 0 for a
    projection that is not one of experts. output_first: their weight is stored [d_out, d_in].
    per_layer: False for the two of the vocabulary, embed_tokens (whose input is a token id, of
    d_in possible ones) and lm_head. multiple: that a device's columns of each piece are padded to.
    """

    name: str
    module: str
    parts: tuple[Part, ...]
    d_in: int
    shard: Literal["out", "in", "experts", "none"]
    experts: int = 0
    output_first: bool = False
    per_layer: bool = True
    multiple: int = 1

    @property
    def bias(self) -> bool:
        """Whether any part has a bias; parts without one get zeros."""
        return any(part.bias for part in self.parts)

    def local_experts(self, shards: int) -> int:
        """How many of the experts are on one device."""
        return self.experts // shards if self.shard == "experts" else self.experts

    def local_width(self, piece: Piece, shards: int) -> int:
        """Columns of a piece on one device; at least one unit, so few KV heads are on several."""
        if self.shard != "out":
            return piece.width
        width = max(-(-piece.units // shards), 1) * (piece.width // piece.units)
        return -(-width // self.multiple) * self.multiple

    def local_pieces(self, shards: int) -> tuple[int, ...]:
        """Output columns of each piece of all parts on one device."""
        return tuple(
            self.local_width(piece, shards) for part in self.parts for piece in part.pieces
        )

    def local_widths(self, shards: int) -> tuple[int, ...]:
        """Output columns of each part on one device."""
        return tuple(
            sum(self.local_width(piece, shards) for piece in part.pieces) for part in self.parts
        )

    def stored_width(self, shards: int) -> int:
        """Output columns over all devices, copies included."""
        local = sum(self.local_widths(shards))
        return local * shards if self.shard == "out" else local

    def columns(self, shards: int) -> np.ndarray:
        """int64 [stored_width]: the Hugging Face output column (parts concatenated) of each.

        What is stored beyond the last unit (a vocabulary that the devices do not divide) repeats
        the last column.
        """
        if self.shard != "out":
            return np.arange(sum(part.width for part in self.parts))
        pieces = [piece for part in self.parts for piece in part.pieces]
        columns = []
        for shard in range(shards):
            start = 0
            for piece in pieces:
                unit, width = piece.width // piece.units, self.local_width(piece, shards)
                copied = piece.units < shards
                first = shard * piece.units // shards * unit if copied else shard * width
                columns.append(start + np.minimum(first + np.arange(width), piece.width - 1))
                start += piece.width
        return np.concatenate(columns)


def _part(name: str, width: int, units: int, bias: bool = False) -> Part:
    return Part(name, (Piece(width, units),), bias)


def _fused(name: str, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The same columns as one module."""
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return (Part(name, pieces, any(part.bias for part in parts)),)


def projection_table(config: ModelConfig) -> tuple[Projection, ...]:
    """The projections of one decoder layer, in the order in which they run."""
    return (*_attention_rows(config), *(_moe_rows if config.num_experts else _mlp_rows)(config))


def _attention_rows(config: ModelConfig) -> tuple[Projection, ...]:
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    hidden = config.hidden_size
    names = [("q_proj", heads), ("k_proj", kv), ("v_proj", kv)]
    qkv = tuple(_part(name, n * dim, n, config.qkv_bias) for name, n in names)
    if config.fused_projections:
        qkv = _fused("qkv_proj", qkv)
    o = _part("o_proj", hidden, 1, config.o_bias)
    return (
        Projection("qkv", "self_attn", qkv, hidden, "out"),
        Projection("o", "self_attn", (o,), heads * dim, "in"),
    )


def _mlp_rows(config: ModelConfig) -> tuple[Projection, ...]:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate_up = tuple(_part(name, inner, inner, bias) for name in ("gate_proj", "up_proj"))
    if config.fused_projections:
        gate_up = _fused("gate_up_proj", gate_up)
    down = _part("down_proj", hidden, 1, bias)
    return (
        Projection("gate_up", "mlp", gate_up, hidden, "out"),
        Projection("down", "mlp", (down,), inner, "in"),
    )


def _moe_rows(config: ModelConfig) -> tuple[Projection, ...]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    gate_up = tuple(_part(name, inner, inner) for name in ("gate_proj", "up_proj"))
    down, module = (_part("down_proj", hidden, 1),), "mlp.experts"
    whole = config.expert_parallel
    return (
        Projection("router", "mlp", (_part("gate", experts, experts),), hidden, "none"),
        # An expert's own width, divided among devices, need not be whole lanes of a TPU, so it
        # is last in neither.
        Projection(
            "experts_gate_up",
            module,
            gate_up,
            hidden,
            "experts" if whole else "out",
            experts,
            output_first=True,
        ),
        Projection("experts_down", module, down, inner, "experts" if whole else "in", experts),
    )


def layer_norms(config: ModelConfig) -> dict[str, str]:
    """The norms over the hidden state in a layer, by their place in it, and their module names.

    "attention" and "mlp" stand in front of these, "attention_out" and "mlp_out" behind them.
    """
    behind = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
    mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    before = {"attention": "input_layernorm", "mlp": mlp}
    return {**(before if config.pre_norms else {}), **(behind if config.post_norms else {})}


EMBED, HEAD = "embed_tokens", "lm_head"
VOCAB_MULTIPLE = 128  # rows of the vocabulary that a device has: a TPU's kernels want whole lanes


def vocab_projections(config: ModelConfig, vocab: int) -> tuple[Projection, Projection]:
    """The two of the vocabulary: embed_tokens, lm_head. (Base weights lie apart from the table.)"""
    hidden = config.hidden_size
    return (
        Projection(EMBED, "model", (_part(EMBED, hidden, 1),), vocab, "none", per_layer=False),
        Projection(
            HEAD,
            "",
            (_part(HEAD, vocab, vocab),),
            hidden,
            "out",
            per_layer=False,
            multiple=VOCAB_MULTIPLE,
        ),
    )


class Feature(enum.IntEnum):
    """Columns of the feature table.

    MAGNITUDE, BIAS, EMBED_ROWS, HEAD_ROWS: the slot whose arrays hold it, `max_loras` (where
    they hold what changes nothing) when the adapter has none. FULL_EMBED, FULL_HEAD: which of the
    full matrices, -1 for none. ADDED: how many tokens the adapter adds to the vocabulary.
    """

    MAGNITUDE = 0
    BIAS = 1
    EMBED_ROWS = 2
    HEAD_ROWS = 3
    FULL_EMBED = 4
    FULL_HEAD = 5
    ADDED = 6


def check_shards(config: ModelConfig, shards: int, fully_sharded_loras: bool = False) -> None:
    """Raises when the model, or its adapters, cannot be divided among `shards` devices."""
    kv = config.num_kv_heads
    if config.expert_parallel and not config.num_experts:
        raise ValueError("enable_expert_parallel=True, but the model has no experts")
    inner = "moe_intermediate_size" if config.num_experts else "intermediate_size"
    if config.expert_parallel:
        inner = "num_experts"
    for name, size in (
        ("num_attention_heads", config.num_heads),
        (inner, getattr(config, inner)),
        *((("hidden_size", config.hidden_size),) if fully_sharded_loras else ()),
    ):
        if size % shards:
            whole = name == "moe_intermediate_size" and config.num_experts % shards == 0
            raise ValueError(
                f"tensor_parallel_size={shards} does not divide {name}={size}"
                + ("; enable_expert_parallel=True need not divide it" if whole else "")
            )
    if kv % shards and shards % kv:
        raise ValueError(
            f"tensor_parallel_size={shards} neither divides num_key_value_heads={kv} nor is a "
            "multiple of it"
        )


@dataclass(frozen=True)
class ModulePlace:
    """Where a Hugging Face module lies: a projection's part in a layer, and of which expert."""

    projection: Projection
    part: int
    layer: int = 0
    expert: int = 0

    @property
    def d_in(self) -> int:
        """Input width of the module."""
        return self.projection.d_in

    @property
    def d_out(self) -> int:
        """Output width of the module."""
        return self.projection.parts[self.part].width


class ModuleMap:
    """Hugging Face module names <-> places in the projection table.

    "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.down_proj",
    "model.embed_tokens", "lm_head".
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.num_layers = config, config.num_layers
        self.projections = projection_table(config)
        self.vocab_projections = vocab_projections(config, config.vocab_size)
        # As the adapter pool has them: with the tokens that adapters may add.
        self.wide_vocab_projections = vocab_projections(config, config.total_vocab)
        # Exact names only: "layers.01" is not another spelling of a layer.
        self._places = {
            self.name(row, part, layer, expert): ModulePlace(row, part, layer, expert)
            for layer in range(self.num_layers)
            for row in self.projections
            for expert in range(row.experts or 1)
            for part in range(len(row.parts))
        }
        self._places |= {self.name(row, 0): ModulePlace(row, 0) for row in self.vocab_projections}

    def name(self, projection: Projection, part: int, layer: int = 0, expert: int = 0) -> str:
        """The module's name in a checkpoint, without ".weight"."""
        last = projection.parts[part].name
        if not projection.per_layer:
            return f"{projection.module}.{last}".removeprefix(".")
        number = f"{expert}." if projection.experts else ""
        return f"model.layers.{layer}.{projection.module}.{number}{last}"

    def place(self, name: str) -> ModulePlace | None:
        """Where the module lies, or None when the model has no such projection."""
        return self._places.get(name)

    def names(self) -> list[str]:
        """Every projection module of the layers, layer by layer."""
        return [name for name, place in self._places.items() if place.projection.per_layer]
