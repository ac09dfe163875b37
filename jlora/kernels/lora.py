"""The definition of the LoRA matmuls in plain XLA, and the data that routes tokens to blocks.

An adapter holds, for one projection, a list of *rank blocks*; a *slot* is what a token names. With
`blocks(t)` the blocks of token t's slot, for every part p of the projection (q, k, v of qkv):

    shrink:  h[t, j, p] = A[layer, blocks(t)[j], p] @ x[t]
    expand:  y[t, cols(p)] += sum_j scale(t)[j] * h[t, j, p] @ B[layer, blocks(t)[j], :, cols(p)]

which is LoRA's `y += B A x` (Hu et al. 2021, eq. 3) with the rank cut into blocks. This file is the
specification of the other backends and what runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NO_ADAPTER = -1


# Pytrees hold other things than arrays at times (`jit(f).lower` puts its own there), so what tests
# check at run time is left out for the two classes.
@typing.no_type_check
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["blocks", "counts", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SlotTable:
    """Which rank blocks each slot holds, for one projection.

    `counts[slot]` blocks are in use, `blocks[slot, :counts[slot]]`; a count of 0 means that the
    adapter does not touch this projection.
    """

    blocks: Any  # int32 [slots, max_blocks]
    counts: Any  # int32 [slots]
    scales: Any  # float32 [slots, max_blocks]


@typing.no_type_check
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_slots", "pair_tile", "pair_slot", "num_pairs", "tile_bare"],
    meta_fields=["tile"],
)
@dataclasses.dataclass(frozen=True)
class LoRARouting:
    """Where the tokens of a step go; made once a step, used by every layer and projection.

    Tokens are cut into tiles of `tile` consecutive ones. A pair is one tile and one slot that
    occurs in it; kernels walk the `num_pairs` pairs (ordered by tile) and mask the other tokens
    of the tile. tile_bare says which tiles have tokens without an adapter.
    """

    token_slots: Int[Array, " tokens"]
    pair_tile: Int[Array, " pairs"]
    pair_slot: Int[Array, " pairs"]
    num_pairs: Int[Array, "1"]
    tile_bare: Bool[Array, " tiles"]
    tile: int


@typing.no_type_check
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["h", "b", "layer", "routing", "slots"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LoRADelta:
    """What adapters still have to add to a projection's output: the other factor and its place."""

    h: Any  # float32 [splits, tokens, max_blocks, parts, rank], as `lora_shrink` gives it
    b: Any  # [layers, blocks, rank, d_out]
    layer: Any  # int32 or int
    routing: LoRARouting
    slots: SlotTable


def lora_routing(
    token_slots: Int[Array, " tokens"], tile: int, grouped_slots: int | None = None
) -> LoRARouting:
    """Lists the (tile, slot) pairs of a step.

    token_slots: the slot of each token, `NO_ADAPTER` for none.
    tile: tokens a tile.
    grouped_slots: the number of slots, where no token of another slot is between those of a slot
        (tokens without an adapter may be). Then there are at most tiles + slots - 1 pairs.
    """
    tokens = token_slots.shape[0]
    pairs = tokens
    if grouped_slots is not None:
        pairs = max(1, min(tokens, -(-tokens // tile) + grouped_slots - 1))
    padded = jnp.pad(token_slots, (0, -tokens % tile), constant_values=NO_ADAPTER)
    tiles = padded.reshape(-1, tile)
    same = tiles[:, :, None] == tiles[:, None, :]  # [tiles, tile, tile]
    seen_before = jnp.any(same & jnp.tri(tile, k=-1, dtype=bool)[None], axis=2)
    first = ((tiles != NO_ADAPTER) & ~seen_before).reshape(-1)
    index = jnp.cumsum(first, dtype=jnp.int32) - 1
    at = jnp.where(first, index, pairs)  # out of range: dropped
    empty = jnp.zeros(pairs, jnp.int32)
    tile_of_token = jnp.arange(padded.shape[0], dtype=jnp.int32) // tile
    return LoRARouting(
        token_slots=token_slots,
        pair_tile=empty.at[at].set(tile_of_token, mode="drop"),
        pair_slot=empty.at[at].set(padded, mode="drop"),
        num_pairs=jnp.sum(first, dtype=jnp.int32)[None],
        tile_bare=jnp.any(tiles == NO_ADAPTER, axis=1),
        tile=tile,
    )


def dot_precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: no TF32 or bf16 passes, which are the default of GPU and TPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _walk(
    routing: LoRARouting, slots: SlotTable, visit: Callable[[Any, Any, Any, Any], Any], start: Any
) -> Any:
    """Folds `visit(carry, first token, its tile's slot, block number)` over the blocks in use."""

    def one_pair(pair, carry):
        slot, first = routing.pair_slot[pair], routing.pair_tile[pair] * routing.tile
        return jax.lax.fori_loop(
            0, slots.counts[slot], lambda index, carry: visit(carry, first, slot, index), carry
        )

    return jax.lax.fori_loop(0, routing.num_pairs[0], one_pair, start)


def _pad_tokens(x: Array, tile: int, value: float = 0) -> Array:
    """Whole tiles of tokens."""
    padding = [(0, -x.shape[0] % tile)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=value)


def lora_shrink_xla(
    x: Float[Array, "tokens d_in"],
    a: Float[Array, "layers blocks parts rank d_in"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
) -> Float[Array, "1 tokens max_blocks parts rank"]:
    """See `jlora.kernels.lora_shrink`. One block of one slot at a time, for a tile of tokens."""
    tokens, tile = x.shape[0], routing.tile
    _, _, parts, rank, d_in = a.shape
    x = _pad_tokens(x, tile)
    token_slots = _pad_tokens(routing.token_slots, tile, NO_ADAPTER)

    def visit(h, first, slot, index):
        at = (layer, slots.blocks[slot, index], 0, 0, 0)
        block = jax.lax.dynamic_slice(a, at, (1, 1, parts, rank, d_in))
        new = jnp.einsum(
            "td,pd->tp",
            jax.lax.dynamic_slice_in_dim(x, first, tile),
            block.reshape(parts * rank, d_in),
            precision=dot_precision(a.dtype),
            preferred_element_type=jnp.float32,
        ).reshape(tile, 1, parts, rank)
        old = jax.lax.dynamic_slice(h, (first, index, 0, 0), new.shape)
        mine = jax.lax.dynamic_slice_in_dim(token_slots, first, tile) == slot
        merged = jnp.where(mine[:, None, None, None], new, old)
        return jax.lax.dynamic_update_slice(h, merged, (first, index, 0, 0))

    h = jnp.zeros((x.shape[0], slots.blocks.shape[1], parts, rank), jnp.float32)
    return _walk(routing, slots, visit, h)[None, :tokens]


def lora_expand_xla(
    y: Float[Array, "tokens d_out"], delta: LoRADelta, part_widths: tuple[int, ...]
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_expand`. One block of one slot at a time, for a tile of tokens."""
    b, layer, routing, slots = delta.b, delta.layer, delta.routing, delta.slots
    tokens, tile = y.shape[0], routing.tile
    parts, rank = delta.h.shape[3:]
    h = _pad_tokens(jnp.sum(delta.h, axis=0), tile)
    token_slots = _pad_tokens(routing.token_slots, tile, NO_ADAPTER)
    starts = np.cumsum((0, *part_widths))

    def visit(out, first, slot, index):
        mine = jax.lax.dynamic_slice_in_dim(token_slots, first, tile) == slot
        part_h = jax.lax.dynamic_slice(h, (first, index, 0, 0), (tile, 1, parts, rank))[:, 0]
        part_h = jnp.where(mine[:, None, None], part_h * slots.scales[slot, index], 0)
        block = slots.blocks[slot, index]
        deltas = [
            jnp.dot(
                part_h[:, part].astype(b.dtype),
                jax.lax.dynamic_slice(b, (layer, block, 0, start), (1, 1, rank, width))[0, 0],
                precision=dot_precision(b.dtype),
                preferred_element_type=jnp.float32,
            )
            for part, (start, width) in enumerate(zip(starts, part_widths, strict=False))
        ]
        rows = jax.lax.dynamic_slice_in_dim(out, first, tile)
        # Masked again: 0 times what an adapter holds need not be 0.
        delta = jnp.where(mine[:, None], jnp.concatenate(deltas, axis=1), 0)
        return jax.lax.dynamic_update_slice_in_dim(out, rows + delta, first, axis=0)

    out = _walk(routing, slots, visit, _pad_tokens(y.astype(jnp.float32), tile))
    return out[:tokens].astype(y.dtype)


def lora_embedding_shrink(
    tokens: Int[Array, " tokens"],
    a: Float[Array, "blocks vocab rank"],
    routing: LoRARouting,
    slots: SlotTable,
) -> Float[Array, "1 tokens max_blocks 1 rank"]:
    """See `jlora.kernels.lora_embedding_shrink`. One gather of rows."""
    slot = jnp.maximum(routing.token_slots, 0)
    in_use = jnp.arange(slots.blocks.shape[1]) < slots.counts[slot][:, None]
    in_use &= (routing.token_slots != NO_ADAPTER)[:, None]  # [tokens, max_blocks]
    rows = a[jnp.where(in_use, slots.blocks[slot], 0), tokens[:, None]]
    h = jnp.where(in_use[:, :, None], rows.astype(jnp.float32), 0)
    return h[None, :, :, None]
