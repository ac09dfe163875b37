"""What is jitted to write into the adapter pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.engine.dora import magnitude_factor, merged_norms, slot_blocks
from jlora.engine.joined import parted
from jlora.model import AXIS, RowPool
from jlora.projections import EMBED, HEAD, Projection


def replace_magnitudes(
    old: Array,
    weight: Array,
    pool: RowPool,
    at: Array,
    values: Array,
    *,
    row: Projection,
    shards: int,
    vocab: int,
) -> Array:
    """old with one layer and slot written; everything is one device's share."""
    layer, slot = at[0], at[1]
    sums = row.shard == "in"
    if row.name == EMBED:  # the vocabulary is its input, and divided; the pool's A is whole
        pool, weight = _embedding_as_input(pool, weight, vocab)
        sums = True
    if row.name == HEAD:
        weight = weight.T
    a, b = slot_blocks(pool, layer, slot)
    norms = merged_norms(weight, a, b, row.local_widths(shards), sums)
    new = magnitude_factor(values[layer], norms)
    return jax.lax.dynamic_update_slice(old, new[None, None], (layer, slot, 0))


def _embedding_as_input(pool: RowPool, weight: Array, vocab: int) -> tuple[RowPool, Array]:
    """A device's share of the vocabulary as the input of a projection; rows past it are zero."""
    count = weight.shape[0]
    token = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
    known = token < vocab
    a = pool.a[:, jnp.minimum(token, pool.a.shape[1] - 1)]  # [blocks, local vocab, rank]
    a = jnp.where(known[None, :, None], a, 0)
    a = jnp.swapaxes(a, 1, 2)[None, :, None]
    return dataclasses.replace(pool, a=a), jnp.where(known[:, None], weight, 0)


def layers_of(row: Projection) -> tuple[bool, bool]:
    """Rows for which this is equal have blocks for the same layers."""
    return row.per_layer, row.experts > 0


def part_of(row: Projection, shards: int) -> np.ndarray:
    """int32 [stored width]: the part of each stored column."""
    part_of_column = np.repeat(np.arange(len(row.parts)), [part.width for part in row.parts])
    return part_of_column[row.columns(shards)].astype(np.int32)


def replace_all(old: Sequence[Array], new: Array) -> list[Array]:
    """new, `joined`, in the place of the old arrays."""
    return [
        jax.lax.dynamic_update_slice(array, part, (0,) * array.ndim)
        for array, part in zip(old, parted(new, old), strict=True)
    ]


Matrices = tuple[Array, Array]  # A and B, of a row's pool or of a block on its way there


def replace_blocks(
    pools: Sequence[Matrices],
    small: Array,
    new: Sequence[Matrices],
    *,
    part_of: Sequence[np.ndarray],
) -> list[Matrices]:
    """The pools of some rows, each with one block replaced by the new one.

    small: joined, for each row: the first layer and the block (of the first expert), int32, and
    the scales, float32 [layers, experts, parts]. part_of: of each row, see `part_of`.
    """
    like = []
    for a, _ in new:
        like += [jax.ShapeDtypeStruct((2,), jnp.int32)]
        like += [jax.ShapeDtypeStruct(a.shape[:3], jnp.float32)]
    told = parted(small, like)
    each = zip(pools, told[::2], told[1::2], new, part_of, strict=True)
    return [
        _replace_block(*pool, at, scales, *block, part) for pool, at, scales, block, part in each
    ]


def _replace_block(
    a: Array,
    b: Array,
    at: Array,
    scales: Array,
    new_a: Array,
    new_b: Array,
    part_of: np.ndarray,
) -> Matrices:
    """a and b with one block replaced; the scale goes into B, in float32 before the cast.

    new_a [layers, experts, parts, rank, d_in], new_b [layers, experts, d_out, rank]. The a of
    embed_tokens is [blocks, vocabulary, rank].
    """
    first: tuple[Any, ...] = (at[0], at[1], 0, 0, 0)
    if a.ndim == 3:
        new_a, first = jnp.swapaxes(new_a[0, :, 0], 1, 2), (at[1], 0, 0)
    a = jax.lax.dynamic_update_slice(a, new_a.astype(a.dtype), first)
    scaled = new_b.astype(jnp.float32) * scales[:, :, part_of][..., None]
    scaled = jnp.swapaxes(scaled, 2, 3).astype(b.dtype)  # [layers, experts, rank, d_out]
    return a, jax.lax.dynamic_update_slice(b, scaled, (at[0], at[1], 0, 0))
