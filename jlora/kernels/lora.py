"""The definition of the LoRA matmuls in plain XLA, and the data that routes tokens to blocks.

An adapter holds, for one projection, a list of *rank blocks*; a *slot* is what a token names. With
`blocks(t)` the blocks of token t's slot, for every part p of the projection (q, k, v of qkv):

    shrink:  h[t, j, p] = A[layer, blocks(t)[j], p] @ x[t]
    expand:  y[t, columns of p] += sum_j scale(t)[j] * h[t, j, p] @ B[layer, blocks(t)[j]][:, columns of p]

which is LoRA's `y += B A x` (Hu et al. 2021, eq. 3) with the rank cut into blocks. This file is the
specification of the other backends and what runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import typing

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    data_fields=["token_slots", "pair_tile", "pair_slot", "num_pairs"],
    meta_fields=["tile"],
)
@dataclasses.dataclass(frozen=True)
class LoRARouting:
    """Where the tokens of a step go; made once a step, used by every layer and projection.

    Tokens are cut into tiles of `tile` consecutive ones. A pair is one tile and one slot that
    occurs in it; kernels walk the `num_pairs` pairs (ordered by tile) and mask the other tokens
    of the tile. Tokens ordered by slot make the fewest pairs, any order is right.
    """

    token_slots: Int[Array, " tokens"]
    pair_tile: Int[Array, " tokens"]
    pair_slot: Int[Array, " tokens"]
    num_pairs: Int[Array, "1"]
    tile: int


def lora_routing(token_slots: Int[Array, " tokens"], tile: int) -> LoRARouting:
    """Lists the (tile, slot) pairs of a step.

    token_slots: the slot of each token, `NO_ADAPTER` for none.
    tile: tokens a tile.
    """
    tokens = token_slots.shape[0]
    padded = jnp.pad(token_slots, (0, -tokens % tile), constant_values=NO_ADAPTER)
    tiles = padded.reshape(-1, tile)
    same = tiles[:, :, None] == tiles[:, None, :]  # [tiles, tile, tile]
    seen_before = jnp.any(same & jnp.tri(tile, k=-1, dtype=bool)[None], axis=2)
    first = ((tiles != NO_ADAPTER) & ~seen_before).reshape(-1)
    index = jnp.cumsum(first, dtype=jnp.int32) - 1
    at = jnp.where(first, index, tokens)  # out of range: dropped
    empty = jnp.zeros(tokens, jnp.int32)
    tile_of_token = jnp.arange(padded.shape[0], dtype=jnp.int32) // tile
    return LoRARouting(
        token_slots=token_slots,
        pair_tile=empty.at[at].set(tile_of_token, mode="drop"),
        pair_slot=empty.at[at].set(padded, mode="drop"),
        num_pairs=jnp.sum(first, dtype=jnp.int32)[None],
        tile=tile,
    )


def token_blocks(token_slots: Int[Array, " tokens"], slots: SlotTable):
    """-> blocks [tokens, max_blocks], their scales; scale 0 and block 0 where there is none."""
    rows = jnp.maximum(token_slots, 0)
    column = jnp.arange(slots.blocks.shape[1], dtype=jnp.int32)
    used = (column[None] < slots.counts[rows][:, None]) & (token_slots >= 0)[:, None]
    return jnp.where(used, slots.blocks[rows], 0), jnp.where(used, slots.scales[rows], 0.0), used


def dot_precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: no TF32 or bf16 passes, which are the default of GPU and TPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def lora_shrink_xla(
    x: Float[Array, "tokens d_in"],
    a: Float[Array, "layers blocks parts rank d_in"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
) -> Float[Array, "1 tokens max_blocks parts rank"]:
    """See `jlora.kernels.lora_shrink`. Multiplies with every block of the layer and picks."""
    every = jnp.einsum(
        "td,nprd->tnpr",
        x,
        a[layer],
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
    blocks, _, used = token_blocks(routing.token_slots, slots)
    picked = jnp.take_along_axis(every, blocks[:, :, None, None], axis=1)
    return jnp.where(used[:, :, None, None], picked, 0.0)[None]


def lora_expand_xla(
    y: Float[Array, "tokens d_out"],
    h: Float[Array, "splits tokens max_blocks parts rank"],
    b: Float[Array, "layers blocks rank d_out"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    part_widths: tuple[int, ...],
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_expand`. Spreads h over every block of the layer, then multiplies."""
    blocks, scales, used = token_blocks(routing.token_slots, slots)
    h = jnp.where(used[:, :, None, None], jnp.sum(h, axis=0) * scales[:, :, None, None], 0.0)
    spread = (blocks[:, :, None] == jnp.arange(b.shape[1])) & used[:, :, None]
    mixed = jnp.einsum(
        "tjn,tjpr->tnpr", spread.astype(jnp.float32), h, precision=jax.lax.Precision.HIGHEST
    )
    b_layer, deltas, start = b[layer], [], 0
    for part, width in enumerate(part_widths):
        deltas.append(
            jnp.einsum(
                "tnr,nro->to",
                mixed[:, :, part].astype(b.dtype),
                b_layer[:, :, start : start + width],
                precision=dot_precision(b.dtype),
                preferred_element_type=jnp.float32,
            )
        )
        start += width
    return (y.astype(jnp.float32) + jnp.concatenate(deltas, axis=1)).astype(y.dtype)
