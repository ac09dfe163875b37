"""The grouped matmul as a Pallas kernel for GPU (Triton backend).

One program a row tile of one expert and a tile of columns; it walks d_in and writes what no other
program writes, so there are no atomics and the same bits on every run. Row tiles start where their
group does: at decode, where an expert has a few rows, each weight in use is read once. Programs of
the same columns run together, ordered by expert, so an expert's later row tiles find its weight in
the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jlora.kernels.grouped import row_tiles
from jlora.kernels.lora_gpu import dot

SMALLEST_TILE = 16  # the fewest rows that a Triton dot takes


@dataclasses.dataclass(frozen=True)
class GroupedConfig:
    """Rows, columns of w and rows of w that a program takes at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(rows: int, experts: int, d_in: int, d_out: int, itemsize: int):
        """Few rows an expert: bound by reading w, so narrow tiles and more loads under way."""
        mean = pl.next_power_of_2(pl.cdiv(rows, experts))
        block_m = min(max(mean, SMALLEST_TILE), 128 if itemsize == 2 else 32)
        few = block_m == SMALLEST_TILE
        block_k, block_n = (256 if few else 128) // itemsize, 64 if few else 128
        return GroupedConfig(
            block_m,
            min(block_n, pl.next_power_of_2(max(d_out, 16))),
            min(block_k, pl.next_power_of_2(max(d_in, 16))),
            num_warps=8 if block_m == 128 else 4,
            num_stages=4 if few else 3,
        )


def _grouped_kernel(
    x_ref,  # [rows, d_in]
    w_ref,  # [experts, d_in, d_out], or with transpose_rhs [experts, d_out, d_in]
    expert_ref,  # [tiles]; `experts` for rows of padding
    first_ref,  # [tiles]
    end_ref,  # [tiles]
    real_ref,  # [1]
    out_ref,  # [rows, d_out]
    *,
    config: GroupedConfig,
    transpose_rhs: bool,
):
    tile = pl.program_id(0)
    experts, (d_in, d_out) = w_ref.shape[0], (x_ref.shape[1], out_ref.shape[1])
    expert, first, end, real = expert_ref[tile], first_ref[tile], end_ref[tile], real_ref[0]
    rows = first + jnp.arange(config.block_m, dtype=jnp.int32)
    columns = pl.program_id(1) * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32)
    mine, inside = (rows < end)[:, None], (columns < d_out)[None, :]

    def one_step(step, out):
        k = step * config.block_k + jnp.arange(config.block_k, dtype=jnp.int32)
        x = plgpu.load(
            x_ref.at[rows[:, None], k[None, :]], mask=mine & (k < d_in)[None, :], other=0.0
        )  # [block_m, block_k]
        at = (k[:, None], columns[None, :])
        w = plgpu.load(
            w_ref.at[(expert, *(reversed(at) if transpose_rhs else at))],
            mask=(k < d_in)[:, None] & inside,
            other=0.0,
        )  # [block_k, block_n]
        return out + dot(x, w.astype(x.dtype), (1, 0))

    def store(out):
        at = out_ref.at[rows[:, None], columns[None, :]]
        plgpu.store(at, out.astype(out_ref.dtype), mask=mine & inside)

    zero = jnp.zeros((config.block_m, config.block_n), jnp.float32)

    @pl.when((tile < real) & (expert < experts))
    def _():
        store(lax.fori_loop(0, pl.cdiv(d_in, config.block_k), one_step, zero))

    @pl.when((tile < real) & (expert == experts))
    def _():
        store(zero)


def grouped_matmul_gpu(
    x: Float[Array, "rows d_in"],
    w: Float[Array, "experts d_in d_out"] | Float[Array, "experts d_out d_in"],
    group_sizes: Int[Array, " experts"],
    total_experts: int,
    *,
    transpose_rhs: bool = False,
    interpret: bool = False,
) -> Float[Array, "rows d_out"]:
    """See `jlora.kernels.grouped_matmul`. Padding is walked as the rows of one expert more."""
    (rows, d_in), d_out = x.shape, w.shape[1 if transpose_rhs else 2]
    config = GroupedConfig.choose(rows, total_experts, d_in, d_out, x.dtype.itemsize)
    padding = rows - jnp.sum(group_sizes, dtype=jnp.int32)
    tiles = row_tiles(jnp.append(group_sizes, padding), rows, config.block_m)
    return pl.pallas_call(
        functools.partial(_grouped_kernel, config=config, transpose_rhs=transpose_rhs),
        name="grouped_matmul",
        grid=(tiles.expert.shape[0], pl.cdiv(d_out, config.block_n)),
        out_shape=jax.ShapeDtypeStruct((rows, d_out), x.dtype),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(x, w, *tiles)
