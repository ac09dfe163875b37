"""The grouped matmul on TPU: the `gmm` kernel of MegaBlox that ships with JAX.

It walks the (row tile, expert) pairs with rows in them and masks the tile's other rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jaxtyping import Array, Float, Int

from jlora.kernels.lora_tpu import LANES, check_dtypes, in_hbm

ROW_TILE = 128
WEIGHT_BYTES = 4 * 2**20  # of a tile of w; two of them and the rest must fit in 16 MB of VMEM
DEPTH_TILE = 2048  # of d_in


def _divisor(size: int, limit: int) -> int:
    """The widest tile of whole lanes, `limit` at most, that divides the size (else all of it)."""
    tiles = (tile for tile in range(limit // LANES * LANES, 0, -LANES) if size % tile == 0)
    return size if size <= limit else next(tiles, limit)


def tiling(d_in: int, d_out: int, itemsize: int) -> tuple[int, int, int]:
    depth = _divisor(d_in, DEPTH_TILE * 2 // itemsize)
    columns = max(WEIGHT_BYTES // (depth * itemsize) // LANES * LANES, LANES)
    return ROW_TILE, depth, _divisor(d_out, min(columns, DEPTH_TILE))


def grouped_matmul_tpu(
    x: Float[Array, "rows d_in"],
    w: Float[Array, "experts d_in d_out"] | Float[Array, "experts d_out d_in"],
    group_sizes: Int[Array, " experts"],
    *,
    transpose_rhs: bool = False,
    interpret: bool | object = False,
) -> Float[Array, "rows d_out"]:
    """See `jlora.kernels.grouped_matmul`."""
    check_dtypes(x=x, w=w)
    (rows, d_in), d_out = x.shape, w.shape[1 if transpose_rhs else 2]
    grouped = jnp.arange(rows) < jnp.sum(group_sizes)
    # Without any row the grid of `gmm` would be empty, which no TPU has been seen to take.
    group_sizes = group_sizes.at[0].add(jnp.sum(group_sizes) == 0)
    # float32 means float32; `gmm` leaves the precision of its dot to this setting.
    with jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default"):
        out = gmm(
            jnp.pad(x, ((0, -rows % ROW_TILE), (0, 0))),
            in_hbm(w, interpret),  # XLA would copy every expert into VMEM, those without rows too
            group_sizes,
            preferred_element_type=x.dtype,
            tiling=tiling(d_in, d_out, w.dtype.itemsize),
            transpose_rhs=transpose_rhs,
            interpret=interpret,
        )[:rows]
    # `gmm` leaves what is past the last group as it found it.
    return jnp.where(grouped[:, None], out, 0)
