"""The LoRA matmuls as Pallas kernels for GPU (Triton backend).

Both walk the (token tile, slot) pairs of the step, one program a pair and a piece of the wide axis,
and loop over the blocks that the slot really holds: what is read follows the ranks in use. No
program writes what another one writes, so there are no atomics and the same bits on every run.
Shrink cuts d_in into `splits`, so that a decode step fills the GPU, and leaves their sum to expand.
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

from jlora.kernels.lora import LoRARouting, SlotTable, dot_precision

TOKEN_TILE = 16  # the fewest rows that a Triton dot takes
BLOCK_RANKS = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """block_k: columns of x that a step of the loop takes; programs: how many to aim for."""

    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3

    @staticmethod
    def choose(tokens: int, d_in: int, parts: int, itemsize: int, programs: int = 264):
        """Few tiles (decode): more splits, each of at least one block_k and eight at most."""
        block_k = min(pl.next_power_of_2(max(d_in, 16)), 512 // itemsize)
        tiles = pl.cdiv(tokens, TOKEN_TILE)
        splits = min(8, pl.cdiv(d_in, block_k), max(1, programs // (tiles * parts)))
        return ShrinkConfig(block_k, splits)


@dataclasses.dataclass(frozen=True)
class ExpandConfig:
    """block_n: columns of y of one program."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def choose(tokens: int, part_widths: tuple[int, ...]):
        """Narrow tiles while there are few tokens, so that there are enough programs."""
        block_n = 128 if tokens <= 8 else 256
        return ExpandConfig(min(block_n, pl.next_power_of_2(max(*part_widths, 16))))


def _check_block_rank(rank: int) -> None:
    if rank not in BLOCK_RANKS:
        raise NotImplementedError(
            f"block rank {rank} is not supported by the GPU kernels; use one of {BLOCK_RANKS}"
        )


def _tile_rows(token_slots_ref, tile, slot, tokens: int):
    """-> token index of each row of a tile, and whether it belongs to the slot. [TOKEN_TILE]"""
    rows = tile * TOKEN_TILE + jnp.arange(TOKEN_TILE, dtype=jnp.int32)
    inside = rows < tokens
    slots = plgpu.load(token_slots_ref.at[rows], mask=inside, other=-1)
    return rows, inside & (slots == slot)


def dot(a, b, contract: tuple[int, int]):
    """Of two matrices, over the axes given, in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = dot_precision(a.dtype)
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _shrink_kernel(
    x_ref,  # [tokens, d_in]
    a_ref,  # [layers, blocks, parts, rank, d_in]
    layer_ref,  # [1]
    token_slots_ref,  # [tokens]
    pair_tile_ref,  # [tokens]
    pair_slot_ref,  # [tokens]
    num_pairs_ref,  # [1]
    blocks_ref,  # [slots, max_blocks]
    counts_ref,  # [slots]
    h_ref,  # [splits, tokens, max_blocks, parts, rank]
    *,
    config: ShrinkConfig,
):
    pair, split, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens, d_in = x_ref.shape
    rank, max_blocks, block_k = a_ref.shape[3], blocks_ref.shape[1], config.block_k
    steps = pl.cdiv(pl.cdiv(d_in, block_k), config.splits)

    # These loads, and each block's number a turn ahead, wait for one another as little as can be.
    layer, slot, tile = layer_ref[0], pair_slot_ref[pair], pair_tile_ref[pair]

    @pl.when(pair < num_pairs_ref[0])
    def _():
        rows, mine = _tile_rows(token_slots_ref, tile, slot, tokens)
        r = jnp.arange(max(rank, 16), dtype=jnp.int32)
        first = split * (steps * block_k)

        def one_block(j, block):
            def one_step(step, h):
                k = first + step * block_k + jnp.arange(block_k, dtype=jnp.int32)
                x = plgpu.load(
                    x_ref.at[rows[:, None], k[None, :]],
                    mask=mine[:, None] & (k < d_in)[None, :],
                    other=0.0,
                )  # [TOKEN_TILE, block_k]
                a = plgpu.load(
                    a_ref.at[layer, block, part, r[:, None], k[None, :]],
                    mask=(r < rank)[:, None] & (k < d_in)[None, :],
                    other=0.0,
                )  # [rank, block_k]
                return h + dot(x, a.astype(x.dtype), (1, 1))

            h = jnp.zeros((TOKEN_TILE, r.shape[0]), jnp.float32)
            h = lax.fori_loop(0, steps, one_step, h)
            plgpu.store(
                h_ref.at[split, rows[:, None], j, part, r[None, :]],
                h,
                mask=mine[:, None] & (r < rank)[None, :],
            )
            return blocks_ref[slot, jnp.minimum(j + 1, max_blocks - 1)]

        lax.fori_loop(0, counts_ref[slot], one_block, blocks_ref[slot, 0])


def lora_shrink_gpu(
    x: Float[Array, "tokens d_in"],
    a: Float[Array, "layers blocks parts rank d_in"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    *,
    interpret: bool = False,
) -> Float[Array, "splits tokens max_blocks parts rank"]:
    """See `jlora.kernels.lora_shrink`."""
    (tokens, d_in), (_, _, parts, rank, _) = x.shape, a.shape
    _check_block_rank(rank)
    config = ShrinkConfig.choose(tokens, d_in, parts, x.dtype.itemsize)
    shape = (config.splits, tokens, slots.blocks.shape[1], parts, rank)
    return pl.pallas_call(
        functools.partial(_shrink_kernel, config=config),
        name="lora_shrink",
        grid=(tokens, config.splits, parts),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(
        x,
        a,
        jnp.asarray(layer, jnp.int32)[None],
        routing.token_slots,
        routing.pair_tile,
        routing.pair_slot,
        routing.num_pairs,
        slots.blocks,
        slots.counts,
    )


def _column_tile(index, part_widths: tuple[int, ...], block_n: int):
    """-> part of a column tile, its first column and the end of the part. Tiles keep to a part."""
    part = start = end = jnp.int32(0)
    tiles = columns = 0  # of the parts before
    for p, width in enumerate(part_widths):
        here = index >= tiles
        part = jnp.where(here, p, part)
        start = jnp.where(here, columns + (index - tiles) * block_n, start)
        end = jnp.where(here, columns + width, end)
        tiles, columns = tiles + pl.cdiv(width, block_n), columns + width
    return part, start, end


def _expand_kernel(
    y_ref,  # [tokens, d_out]; the same memory as out_ref
    h_ref,  # [splits, tokens, max_blocks, parts, rank]
    b_ref,  # [layers, blocks, rank, d_out]
    layer_ref,  # [1]
    token_slots_ref,  # [tokens]
    pair_tile_ref,  # [tokens]
    pair_slot_ref,  # [tokens]
    num_pairs_ref,  # [1]
    blocks_ref,  # [slots, max_blocks]
    counts_ref,  # [slots]
    scales_ref,  # [slots, max_blocks]
    out_ref,  # [tokens, d_out]
    *,
    part_widths: tuple[int, ...],
    config: ExpandConfig,
):
    pair, column_tile = pl.program_id(0), pl.program_id(1)
    splits, tokens, max_blocks, _, rank = h_ref.shape
    part, start, end = _column_tile(column_tile, part_widths, config.block_n)

    # These loads, and each block's number a turn ahead, wait for one another as little as can be.
    layer, slot, tile = layer_ref[0], pair_slot_ref[pair], pair_tile_ref[pair]

    @pl.when(pair < num_pairs_ref[0])
    def _():
        rows, mine = _tile_rows(token_slots_ref, tile, slot, tokens)
        r = jnp.arange(max(rank, 16), dtype=jnp.int32)
        columns = start + jnp.arange(config.block_n, dtype=jnp.int32)

        def one_block(j, carry):
            block, delta = carry
            b = plgpu.load(
                b_ref.at[layer, block, r[:, None], columns[None, :]],
                mask=(r < rank)[:, None] & (columns < end)[None, :],
                other=0.0,
            )  # [rank, block_n]
            h = jnp.zeros((TOKEN_TILE, r.shape[0]), jnp.float32)
            for split in range(splits):
                h += plgpu.load(
                    h_ref.at[split, rows[:, None], j, part, r[None, :]],
                    mask=mine[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
            h = (h * scales_ref[slot, j]).astype(b.dtype)
            next_block = blocks_ref[slot, jnp.minimum(j + 1, max_blocks - 1)]
            return next_block, delta + dot(h, b, (1, 0))

        carry = blocks_ref[slot, 0], jnp.zeros((TOKEN_TILE, config.block_n), jnp.float32)
        _, delta = lax.fori_loop(0, counts_ref[slot], one_block, carry)
        at = (rows[:, None], columns[None, :])
        mask = mine[:, None] & (columns < end)[None, :]
        y = plgpu.load(y_ref.at[at], mask=mask, other=0.0).astype(jnp.float32)
        plgpu.store(out_ref.at[at], (y + delta).astype(out_ref.dtype), mask=mask)


def lora_expand_gpu(
    y: Float[Array, "tokens d_out"],
    h: Float[Array, "splits tokens max_blocks parts rank"],
    b: Float[Array, "layers blocks rank d_out"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    part_widths: tuple[int, ...],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_expand`. y is updated in place where XLA lets it."""
    _check_block_rank(b.shape[2])
    config = ExpandConfig.choose(y.shape[0], part_widths)
    column_tiles = sum(pl.cdiv(width, config.block_n) for width in part_widths)
    return pl.pallas_call(
        functools.partial(_expand_kernel, part_widths=part_widths, config=config),
        name="lora_expand",
        grid=(y.shape[0], column_tiles),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(
        y,
        h,
        b,
        jnp.asarray(layer, jnp.int32)[None],
        routing.token_slots,
        routing.pair_tile,
        routing.pair_slot,
        routing.num_pairs,
        slots.blocks,
        slots.counts,
        slots.scales,
    )
