"""The LoRA matmuls as Pallas kernels for GPU (Triton backend).

Tokens are cut into tiles, and a tile's pairs are the slots that occur in it. Shrink has a program
for each pair and piece of d_in (`splits` pieces, so that a decode step fills the GPU); their sum is
left to what reads h. Expand has one for each pair, 16 of its tokens and piece of the columns. What
is read follows the ranks in use. A decode step with few slots is one tile, and for it the base's
own matmul is the same kernel: B adds some rows to W, and the ranks of h are as many more columns of
x. No program writes what another one writes, so there are no atomics and the same bits on every
run.
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

BLOCK_RANKS = (8, 16, 32, 64)
EXPAND_TOKENS = 16  # of a program; the fewest rows that a Triton dot takes
# Steps of up to so many tokens, which can have so many pairs, are one kernel with the base's
# matmul. With more pairs it is slower than two: see docs/benchmarks.md.
ONE_KERNEL_TOKENS, ONE_KERNEL_PAIRS = 64, 16


@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """block_k: columns of x of a step of the loop; parts: of a program."""

    block_k: int
    splits: int
    parts: int
    num_warps: int = 4
    num_stages: int = 3

    @staticmethod
    def choose(tokens, d_in, parts, rank, itemsize, tile, programs: int = 264) -> ShrinkConfig:
        """Few tiles (decode): a part a program and more splits, of at least one block_k each.

        Many: x is read once for all parts.
        """
        together = parts if tokens > 256 and parts * rank <= 64 else 1
        block_k = min(pl.next_power_of_2(max(d_in, 16)), (512 if tile <= 32 else 128) // itemsize)
        tiles = pl.cdiv(tokens, tile) * (parts // together)
        splits = min(8 if d_in <= 8192 else 16, pl.cdiv(d_in, block_k), max(1, programs // tiles))
        return ShrinkConfig(block_k, splits, together)


@dataclasses.dataclass(frozen=True)
class ExpandConfig:
    """block_n: columns of y of one program."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def choose(tokens: int, part_widths: tuple[int, ...]) -> ExpandConfig:
        """Narrow tiles while there are few tokens, so that there are enough programs."""
        block_n = 128 if tokens <= 8 else 256
        return ExpandConfig(min(block_n, pl.next_power_of_2(max(*part_widths, 16))))


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """block_n: columns of w of one program; splits: pieces of d_in; at_once: pairs of a dot."""

    block_n: int
    block_k: int
    splits: int
    at_once: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(tile, d_in, part_widths: tuple[int, ...], rank, itemsize) -> MatmulConfig:
        """What was best on an H100 for the four matmuls of an 8B: see docs/benchmarks.md."""
        widest = pl.next_power_of_2(max(*part_widths, 16))
        if sum(part_widths) >= 200 * 128:
            block_n, splits, num_stages = 128, 1, 3
            block_k = (256 if tile <= 16 else 128) // itemsize
        else:
            block_n, splits, num_stages, block_k = 64, 2, 4, 256 // itemsize
        block_k = min(block_k, pl.next_power_of_2(max(d_in, 16)))
        splits = min(splits, pl.cdiv(d_in, block_k))
        num_warps = 8 if tile >= 64 and block_n >= 128 else 4
        at_once = 64 // max(rank, 16)
        return MatmulConfig(min(block_n, widest), block_k, splits, at_once, num_warps, num_stages)


def _check_block_rank(rank: int) -> None:
    if rank not in BLOCK_RANKS:
        raise NotImplementedError(
            f"block rank {rank} is not supported by the GPU kernels; use one of {BLOCK_RANKS}"
        )


def token_tile(tokens: int) -> int:
    """Tokens a tile."""
    return min(ONE_KERNEL_TOKENS, pl.next_power_of_2(max(tokens, 16)))


def dot(a, b, contract: tuple[int, int]):
    """Of two matrices, over the axes given, in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = dot_precision(a.dtype)
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _mask(rows, columns, of_rows=None, of_columns=None):
    """The mask of a matrix's load from one of its rows and one of its columns; None: all of them.

    Triton does not see that a mask is always true, and then cannot make wide loads: hence None.
    """
    if of_rows is None and of_columns is None:
        return None
    shape = (rows.shape[0], columns.shape[0])
    masks = [] if of_rows is None else [jnp.broadcast_to(of_rows[:, None], shape)]
    masks += [] if of_columns is None else [jnp.broadcast_to(of_columns[None, :], shape)]
    return functools.reduce(jnp.logical_and, masks)


def load(ref, *at, mask=None):
    """ref[at]; 0 where a mask says no."""
    return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else 0)


def _shrink_kernel(
    x_ref,  # [tokens, d_in]
    a_ref,  # [layers, blocks, parts, rank, d_in]
    layer_ref,  # [1]
    token_slots_ref,  # [tokens]
    pair_tile_ref,  # [pairs]
    pair_slot_ref,  # [pairs]
    num_pairs_ref,  # [1]
    blocks_ref,  # [slots, max_blocks]
    counts_ref,  # [slots]
    h_ref,  # [splits, tokens, max_blocks, parts, rank]
    *,
    tile: int,
    config: ShrinkConfig,
):
    pair, split, first_part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens, d_in = x_ref.shape
    rank, max_blocks = a_ref.shape[3], blocks_ref.shape[1]
    block_k, here = config.block_k, config.parts
    steps = pl.cdiv(pl.cdiv(d_in, block_k), config.splits)

    # These loads, and each block's number a turn ahead, wait for one another as little as can be.
    layer, slot, tile_index = layer_ref[0], pair_slot_ref[pair], pair_tile_ref[pair]

    @pl.when(pair < num_pairs_ref[0])
    def _():
        rows = tile_index * tile + jnp.arange(tile, dtype=jnp.int32)
        # The ranks of the parts of this program, side by side.
        column = jnp.arange(max(16, pl.next_power_of_2(here * rank)), dtype=jnp.int32)
        part = first_part * here + lax.div(column, jnp.int32(rank))
        r, real = lax.rem(column, jnp.int32(rank)), column < here * rank
        first = split * (steps * block_k)
        in_tokens = rows < tokens if tokens % tile else None

        def one_block(j, block):
            def one_step(step, h):
                k = first + step * block_k + jnp.arange(block_k, dtype=jnp.int32)
                in_k = k < d_in if d_in % (block_k * config.splits) else None
                in_x, in_a = _mask(rows, k, in_tokens, in_k), _mask(column, k, real, in_k)
                x = load(x_ref, rows[:, None], k[None, :], mask=in_x)
                a = load(a_ref, layer, block, part[:, None], r[:, None], k[None, :], mask=in_a)
                return h + dot(x, a.astype(x.dtype), (1, 1))

            h = jnp.zeros((tile, column.shape[0]), jnp.float32)
            h = lax.fori_loop(0, steps, one_step, h)
            # Other slots' tokens of the tile have been computed too, and are not stored.
            mine = load(token_slots_ref, rows, mask=rows < tokens) == slot
            plgpu.store(
                h_ref.at[split, rows[:, None], j, part[None, :], r[None, :]],
                h,
                mask=(mine & (rows < tokens))[:, None] & real[None, :],
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
    pairs = routing.pair_slot.shape[0]
    config = ShrinkConfig.choose(tokens, d_in, parts, rank, x.dtype.itemsize, routing.tile)
    shape = (config.splits, tokens, slots.blocks.shape[1], parts, rank)
    return pl.pallas_call(
        functools.partial(_shrink_kernel, tile=routing.tile, config=config),
        name="lora_shrink",
        grid=(pairs, config.splits, parts // config.parts),
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


def _in_part(columns, end, part_widths: tuple[int, ...]):
    """Which columns of a tile are of its part; None when all are, in every tile."""
    whole = all(width % columns.shape[0] == 0 for width in part_widths)
    return None if whole else columns < end


def _num_column_tiles(part_widths: tuple[int, ...], block_n: int) -> int:
    return sum(pl.cdiv(width, block_n) for width in part_widths)


def _add_delta(acc, routes, h_ref, b_ref, rows, part, columns, in_part, pairs, at_once: int):
    """acc plus the delta of all tokens, one tile, in some columns of one part.

    in_part: which of the columns are, None for all. pairs: how many to add.

    The ranks of `at_once` pairs are one dot: where a token is not of a pair's slot, its h is zero
    there. That would not keep a B that is not finite from other tokens, so such values are taken
    out of it and put into the h of its own tokens.
    """
    layer_ref, token_slots_ref, pair_slot_ref, blocks_ref, counts_ref, scales_ref = routes
    splits, tokens, _, _, rank = h_ref.shape
    ranks, tile, layer = max(16, rank), rows.shape[0], layer_ref[0]
    in_tile = rows < tokens
    slot_of_row = load(token_slots_ref, rows, mask=in_tile)
    column = jnp.arange(at_once * ranks, dtype=jnp.int32)
    r = lax.rem(column, jnp.int32(ranks))
    rank_at = jnp.arange(ranks, dtype=jnp.int32)
    own = in_tile & (slot_of_row >= 0)
    blocks_of_row = load(counts_ref, jnp.maximum(slot_of_row, 0), mask=own)

    def one_block(j, acc):
        h = jnp.zeros((tile, ranks), jnp.float32)
        in_rank = rank_at < rank if rank < ranks else None
        h_mask = _mask(rows, rank_at, own & (j < blocks_of_row), in_rank)
        for split in range(splits):
            h += load(h_ref, split, rows[:, None], j, part, rank_at[None, :], mask=h_mask)
        wide = jnp.broadcast_to(h[:, None, :], (tile, at_once, ranks)).reshape(tile, -1)

        def some_pairs(i, acc):
            pair = i * at_once + lax.div(column, jnp.int32(ranks))
            slot = load(pair_slot_ref, pair, mask=pair < pairs)
            there = (pair < pairs) & (r < rank)
            there &= j < load(counts_ref, slot, mask=there)
            block = load(blocks_ref, slot, j, mask=there)
            scale = load(scales_ref, slot, j, mask=there)
            in_b = _mask(column, columns, there, in_part)
            b = load(b_ref, layer, block[:, None], r[:, None], columns[None, :], mask=in_b)
            wide_b = b.astype(jnp.float32)
            nan_or_0 = jnp.sum(wide_b * 0.0, axis=1)
            b = jnp.where(jnp.abs(wide_b) < jnp.inf, wide_b, 0.0).astype(b.dtype)
            mine = (slot_of_row[:, None] == slot[None, :]) & in_tile[:, None] & there[None, :]
            delta_h = jnp.where(mine, wide * scale[None, :] + nan_or_0[None, :], 0.0)
            return acc + dot(delta_h.astype(b.dtype), b, (1, 0))

        return lax.fori_loop(0, lax.div(pairs + at_once - 1, at_once), some_pairs, acc)

    num_blocks = jnp.where(pairs > 0, jnp.max(blocks_of_row), 0)
    return lax.fori_loop(0, num_blocks, one_block, acc)


def _expand_kernel(
    y_ref,  # [tokens, d_out]; the same memory as out_ref
    h_ref,  # [splits, tokens, max_blocks, parts, rank]
    b_ref,  # [layers, blocks, rank, d_out]
    layer_ref,  # [1]
    token_slots_ref,  # [tokens]
    pair_tile_ref,  # [pairs]
    pair_slot_ref,  # [pairs]
    num_pairs_ref,  # [1]
    blocks_ref,  # [slots, max_blocks]
    counts_ref,  # [slots]
    scales_ref,  # [slots, max_blocks]
    out_ref,  # [tokens, d_out]
    *,
    part_widths: tuple[int, ...],
    tile: int,
    config: ExpandConfig,
):
    pair, some_tokens, column_tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, tokens, max_blocks, _, rank = h_ref.shape
    part, start, end = _column_tile(column_tile, part_widths, config.block_n)

    # These loads, and each block's number a turn ahead, wait for one another as little as can be.
    layer, slot, first = layer_ref[0], pair_slot_ref[pair], pair_tile_ref[pair] * tile
    rows = first + some_tokens * EXPAND_TOKENS + jnp.arange(EXPAND_TOKENS, dtype=jnp.int32)
    mine = (rows < tokens) & (pair < num_pairs_ref[0])
    mine &= load(token_slots_ref, rows, mask=mine) == slot

    @pl.when(jnp.max(mine.astype(jnp.int32)) > 0)
    def _():
        r = jnp.arange(max(rank, 16), dtype=jnp.int32)
        columns = start + jnp.arange(config.block_n, dtype=jnp.int32)
        in_rank, in_part = r < rank if rank < 16 else None, _in_part(columns, end, part_widths)
        in_h, in_b = _mask(rows, r, mine, in_rank), _mask(r, columns, in_rank, in_part)
        at, in_y = (rows[:, None], columns[None, :]), _mask(rows, columns, mine, in_part)

        def one_block(j, carry):
            block, delta = carry
            b = load(b_ref, layer, block, r[:, None], columns[None, :], mask=in_b)
            h = jnp.zeros((EXPAND_TOKENS, r.shape[0]), jnp.float32)
            for split in range(splits):
                h += load(h_ref, split, rows[:, None], j, part, r[None, :], mask=in_h)
            h = (h * scales_ref[slot, j]).astype(b.dtype)
            next_block = blocks_ref[slot, jnp.minimum(j + 1, max_blocks - 1)]
            return next_block, delta + dot(h, b, (1, 0))

        carry = blocks_ref[slot, 0], jnp.zeros((EXPAND_TOKENS, config.block_n), jnp.float32)
        _, delta = lax.fori_loop(0, counts_ref[slot], one_block, carry)
        y = load(y_ref, *at, mask=in_y).astype(jnp.float32)
        plgpu.store(out_ref.at[at], (y + delta).astype(out_ref.dtype), mask=in_y)


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
    tokens = y.shape[0]
    if tokens > 256:  # every piece of columns reads all of h, so it is summed before
        h = jnp.sum(h, axis=0, keepdims=True)
    config = ExpandConfig.choose(tokens, part_widths)
    column_tiles = _num_column_tiles(part_widths, config.block_n)
    return pl.pallas_call(
        functools.partial(
            _expand_kernel, part_widths=part_widths, tile=routing.tile, config=config
        ),
        name="lora_expand",
        grid=(routing.pair_slot.shape[0], routing.tile // EXPAND_TOKENS, column_tiles),
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


def _matmul_kernel(
    x_ref,  # [tokens, d_in]
    w_ref,  # [d_in, d_out]
    h_ref,  # [h_splits, tokens, max_blocks, parts, rank]
    b_ref,  # [layers, blocks, rank, d_out]
    layer_ref,  # [1]
    token_slots_ref,  # [tokens]
    pair_slot_ref,  # [pairs]
    num_pairs_ref,  # [1]
    blocks_ref,  # [slots, max_blocks]
    counts_ref,  # [slots]
    scales_ref,  # [slots, max_blocks]
    out_ref,  # [splits, tokens, d_out]
    *,
    part_widths: tuple[int, ...],
    tile: int,
    config: MatmulConfig,
):
    column_tile, split = pl.program_id(0), pl.program_id(1)
    (tokens, d_in), block_k, block_n = x_ref.shape, config.block_k, config.block_n
    part, start, end = _column_tile(column_tile, part_widths, block_n)
    rows, columns = jnp.arange(tile, dtype=jnp.int32), start + jnp.arange(block_n, dtype=jnp.int32)
    steps = pl.cdiv(pl.cdiv(d_in, block_k), config.splits)
    in_tokens = rows < tokens if tokens < tile else None
    in_part = _in_part(columns, end, part_widths)

    def one_step(step, acc):
        k = (split * steps + step) * block_k + jnp.arange(block_k, dtype=jnp.int32)
        in_k = k < d_in if d_in % (block_k * config.splits) else None
        x = load(x_ref, rows[:, None], k[None, :], mask=_mask(rows, k, in_tokens, in_k))
        w = load(w_ref, k[:, None], columns[None, :], mask=_mask(k, columns, in_k, in_part))
        return acc + dot(x, w, (1, 0))

    acc = lax.fori_loop(0, steps, one_step, jnp.zeros((tile, block_n), jnp.float32))
    routes = (layer_ref, token_slots_ref, pair_slot_ref, blocks_ref, counts_ref, scales_ref)
    pairs = jnp.where(split == 0, num_pairs_ref[0], 0)
    acc = _add_delta(acc, routes, h_ref, b_ref, rows, part, columns, in_part, pairs, config.at_once)
    plgpu.store(
        out_ref.at[split, rows[:, None], columns[None, :]],
        acc.astype(out_ref.dtype),
        mask=_mask(rows, columns, in_tokens, in_part),
    )


def lora_matmul_gpu(
    x: Float[Array, "tokens d_in"],
    w: Float[Array, "d_in d_out"],
    h: Float[Array, "splits tokens max_blocks parts rank"],
    b: Float[Array, "layers blocks rank d_out"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    part_widths: tuple[int, ...],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_matmul`. One kernel for one tile of few pairs, else two."""
    tokens, (d_in, d_out), pairs = x.shape[0], w.shape, routing.pair_slot.shape[0]
    if tokens > routing.tile or pairs > ONE_KERNEL_PAIRS or w.dtype != x.dtype:
        y = jnp.dot(x, w, precision=dot_precision(x.dtype))
        return lora_expand_gpu(y, h, b, layer, routing, slots, part_widths, interpret=interpret)
    _check_block_rank(b.shape[2])
    config = MatmulConfig.choose(routing.tile, d_in, part_widths, b.shape[2], x.dtype.itemsize)
    out = pl.pallas_call(
        functools.partial(
            _matmul_kernel, part_widths=part_widths, tile=routing.tile, config=config
        ),
        name="lora_matmul",
        grid=(_num_column_tiles(part_widths, config.block_n), config.splits),
        out_shape=jax.ShapeDtypeStruct(
            (config.splits, tokens, d_out), x.dtype if config.splits == 1 else jnp.float32
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(
        x,
        w,
        h,
        b,
        jnp.asarray(layer, jnp.int32)[None],
        routing.token_slots,
        routing.pair_slot,
        routing.num_pairs,
        slots.blocks,
        slots.counts,
        slots.scales,
    )
    return out[0] if config.splits == 1 else jnp.sum(out, axis=0).astype(x.dtype)
