"""The definition of the grouped matmul in plain XLA, and the list of row tiles that backends walk.

Rows come sorted by expert, `group_sizes[e]` of them for expert e:

    out[r] = x[r] @ w[expert(r)]

which is the matmul of a mixture of experts after its rows were sorted (Gale et al. 2022,
"MegaBlocks"). This file is the specification of the other backends and what runs on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.kernels.lora import dot_precision


class RowTiles(NamedTuple):
    """Rows `first[i] <= r < end[i]`, a tile's worth at most, of one expert, for i < `real[0]`.

    A tile starts where its group does or whole tiles after, so an expert whose group fits in one
    tile has one tile, wherever its rows lie.
    """

    expert: Int[Array, " tiles"]
    first: Int[Array, " tiles"]
    end: Int[Array, " tiles"]
    real: Int[Array, "1"]


def row_tiles(group_sizes: Int[Array, " experts"], rows: int, tile: int) -> RowTiles:
    """Cuts the groups of `rows` rows into tiles of at most `tile` rows, in the order of the rows.

    group_sizes: int32, summing to `rows` at most.
    """
    experts = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tiles = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    ragged = min(experts, rows)  # at most so many groups end within a tile
    index = jnp.arange((rows - ragged) // tile + ragged, dtype=jnp.int32)
    expert = jnp.sum(tile_ends[None] <= index[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    first = (ends - group_sizes)[expert] + (index - (tile_ends - tiles)[expert]) * tile
    end = jnp.minimum(first + tile, ends[expert])
    return RowTiles(expert, first, end, tile_ends[-1:])


def grouped_matmul_xla(
    x: Float[Array, "rows d_in"],
    w: Float[Array, "experts d_in d_out"] | Float[Array, "experts d_out d_in"],
    group_sizes: Int[Array, " experts"],
    total_experts: int,
    *,
    transpose_rhs: bool = False,
) -> Float[Array, "rows d_out"]:
    """See `jlora.kernels.grouped_matmul`. One tile of one expert's rows at a time.

    On a CPU XLA computes `jax.lax.ragged_dot` for all rows and experts: 128 experts and 128 rows
    took 17 times as long.
    """
    rows, d_out = x.shape[0], w.shape[1 if transpose_rhs else 2]
    # A mean group's worth: small tiles waste no work on few rows, large ones copy w less often.
    tile = min(max(8, 1 << (rows // total_experts).bit_length() >> 1), 64)
    tiles = row_tiles(group_sizes, rows, tile)
    x = jnp.pad(x, ((0, tile), (0, 0)))  # so that no slice is moved to fit

    def one_tile(index, out):
        first = tiles.first[index]
        new = jax.lax.dot_general(
            jax.lax.dynamic_slice_in_dim(x, first, tile),
            jax.lax.dynamic_index_in_dim(w, tiles.expert[index], keepdims=False),
            (((1,), (1 if transpose_rhs else 0,)), ((), ())),
            precision=dot_precision(w.dtype),
            preferred_element_type=jnp.float32,
        ).astype(x.dtype)
        mine = first + jnp.arange(tile) < tiles.end[index]
        old = jax.lax.dynamic_slice_in_dim(out, first, tile)
        new = jnp.where(mine[:, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(out, new, first, axis=0)

    out = jnp.zeros((rows + tile, d_out), x.dtype)
    return jax.lax.fori_loop(0, tiles.real[0], one_tile, out)[:rows]
