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
    """int32: the part of each column of B that a device stores.

    [1] when there is only one part: B of such a row may be divided otherwise than its output.
    """
    if len(row.parts) == 1:
        return np.zeros(1, np.int32)
    return np.repeat(np.arange(len(row.parts), dtype=np.int32), row.local_widths(shards))


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
    like: Sequence[jax.ShapeDtypeStruct],
    part_of: Sequence[np.ndarray],
) -> list[Matrices]:
    """One device's share of the pools of some rows, each with one block replaced by the new one.

    small: joined, for each row: the first layer and the block, int32, and the scales, float32
    [layers, experts, parts]. like: what these are. part_of: of each row, see `part_of`.
    """
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
    first: tuple[Any, ...] = (at[0], at[1])
    here = new_b.shape[1]
    if here < scales.shape[1]:  # this device's experts
        own = jax.lax.axis_index(AXIS) * here
        scales = jax.lax.dynamic_slice_in_dim(scales, own, here, axis=1)
    new_b = new_b.astype(jnp.float32) * scales[:, :, part_of][..., None]
    new_b = jnp.swapaxes(new_b, 2, 3)  # [layers, experts, rank, d_out]
    if b.ndim == 5:  # experts have an axis of their own there
        new_a, new_b = (jnp.expand_dims(new, 1) for new in (new_a, new_b))
    b = _update(b, new_b, first)
    if a.ndim == 3:
        new_a, first = jnp.swapaxes(new_a[0, :, 0], 1, 2), (at[1],)
    return _update(a, new_a, first), b


def _update(old: Array, new: Array, first: tuple[Any, ...]) -> Array:
    """old with new, cast, from this place on and from 0 in the other axes."""
    start = (*first, *(0,) * (old.ndim - len(first)))
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
