"""What reads a projection's output, as Pallas kernels for GPU (Triton backend) that add the delta.

An adapter's delta is a few dots more where the output is read anyway: by the activation of the MLP,
and by the turning of queries and keys and the KV write. So the output is read once, and its sum
with the delta is never written. `lora_expand` is the one that only adds.

A program takes the tokens of one pair (a tile and a slot that occurs in it) and a piece of the
columns. Where all tokens must be written there are programs for those without an adapter, too: one
more a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jlora.kernels.lora import NO_ADAPTER, LoRADelta
from jlora.kernels.lora_gpu import (
    block_number,
    check_block_rank,
    dot,
    load,
    mask_of,
    range_of,
    token_tile,
    turn_sizes,
    turns,
)


@dataclasses.dataclass(frozen=True)
class ExpandConfig:
    """block_n: columns of one program, and as many again of `up` with a gate."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    @staticmethod
    def choose(
        tokens: int, tile: int, part_widths: tuple[int, ...], gate: bool = False
    ) -> ExpandConfig:
        """What was best on an H100 for an 8B's projections: see docs/benchmarks.md."""
        block_n = {1: 512 if tokens > 8 else 256, 16: 256}.get(tile, 128)
        num_warps = 2 if gate and tile == 16 else 4
        return ExpandConfig(min(block_n, pl.next_power_of_2(max(*part_widths, 16))), num_warps)


def _programs(tokens: int, tile: int, delta: LoRADelta | None) -> int:
    """Along the first axis of the grid, where all tokens are written: see `_tokens_of`."""
    pairs = 0 if delta is None else delta.routing.pair_slot.shape[0]
    return pairs + pl.cdiv(tokens, tile)


def _tokens_of(item, tile: int, tokens: int, delta: LoRADelta | None):
    """Of the item-th program: its slot, tokens, which of them it writes, and whether it has any.

    Past the pairs come the tiles, for their tokens without an adapter; without a delta for all.
    """
    slot, tile_index, there = jnp.int32(NO_ADAPTER), item, item >= 0
    if delta is not None:
        routing, pairs = delta.routing, delta.routing.pair_slot.shape[0]
        pair = jnp.minimum(item, pairs - 1)
        slot = jnp.where(item < pairs, routing.pair_slot[pair], slot)
        tile_index = jnp.where(item < pairs, routing.pair_tile[pair], item - pairs)
        bare = routing.tile_bare[jnp.maximum(item - pairs, 0)]
        there = jnp.where(item < pairs, item < routing.num_pairs[0], bare)
    rows = tile_index * tile + jnp.arange(tile, dtype=jnp.int32)
    mine = (rows < tokens) & there
    if delta is not None:
        mine &= load(delta.routing.token_slots, rows, mask=mine) == slot
    return slot, rows, mine, there


def _summed_h(h_ref, rows, mine, j, part, r, real):
    """h of ranks r of blocks j, its splits summed: [rows, ranks], or [ranks] of a single row."""
    splits, j = h_ref.shape[0], jnp.broadcast_to(j, r.shape)[None, :]
    if rows.shape[0] == 1:
        split, in_splits = range_of(splits)
        in_h = mask_of(split, r, in_splits, real)
        at = (split[:, None], rows[0], j, part, r[None, :])
        return jnp.sum(load(h_ref, *at, mask=in_h), axis=0)
    h, in_h = jnp.zeros((rows.shape[0], r.shape[0]), jnp.float32), mask_of(rows, r, mine, real)
    for piece in range(splits):
        h += load(h_ref, piece, rows[:, None], j, part, r[None, :], mask=in_h)
    return h


def _deltas(delta: LoRADelta | None, slot, rows, mine, pieces, in_columns) -> list:
    """The delta of the rows, float32 [rows, columns], for each (part, columns) of the pieces.

    in_columns: which columns there are, None for all. Of rows that are not the slot's it is
    anything.
    """
    shape = (rows.shape[0], pieces[0][1].shape[0])
    zeros = [jnp.zeros(shape, jnp.float32) for _ in pieces]
    if delta is None:
        return zeros
    slots, (max_blocks, rank) = delta.slots, (delta.h.shape[2], delta.h.shape[4])
    layer, known_slot = delta.layer[0], jnp.maximum(slot, 0)

    def take(size, first_block, count, sums):
        column, real = range_of(size * rank, at_least=1 if shape[0] == 1 else 16)
        r = lax.rem(column, jnp.int32(rank))
        offset = lax.div(column, jnp.int32(rank)) if size > 1 else jnp.int32(0)

        def times_b(h, columns, block):
            in_b = mask_of(r, columns, real, in_columns)
            of_rank = jnp.broadcast_to(block, r.shape)[:, None]
            b = load(delta.b, layer, of_rank, r[:, None], columns[None, :], mask=in_b)
            h = h.astype(b.dtype)
            if shape[0] > 1:
                return dot(h, b, (1, 0))
            return jnp.sum(h.astype(jnp.float32)[:, None] * b.astype(jnp.float32), axis=0)[None, :]

        def one_turn(index, carry):
            block, sums = carry
            j = first_block + index * size + offset
            next_block = block_number(slots, known_slot, j + size)
            scale, more = load(slots.scales, known_slot, j), []
            last_part: Any = None
            h: Any = None
            for part, columns in pieces:
                if part is not last_part:  # else it is loaded already
                    h = _summed_h(delta.h, rows, mine, j, part, r, real) * scale
                more.append(times_b(h, columns, block))
                last_part = part
            return next_block, [old + new for old, new in zip(sums, more, strict=True)]

        first = block_number(slots, known_slot, first_block + offset)
        return lax.fori_loop(0, jnp.where(slot < 0, 0, count), one_turn, (first, sums))[1]

    sums = zeros
    sizes = turn_sizes(2 if shape[0] == 1 else 1, max_blocks)
    for size, first_block, count in turns(slots, known_slot, sizes):
        sums = take(size, first_block, count, sums)
    return sums


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
    delta: LoRADelta,  # of refs
    out_ref,  # [tokens, d_out]
    *,
    part_widths: tuple[int, ...],
    block_n: int,
):
    item, column_tile = pl.program_id(0), pl.program_id(1)
    slot, rows, mine, there = _tokens_of(item, delta.routing.tile, y_ref.shape[0], delta)

    @pl.when(there)
    def _():
        part, start, end = _column_tile(column_tile, part_widths, block_n)
        columns = start + jnp.arange(block_n, dtype=jnp.int32)
        in_part = columns < end if any(width % block_n for width in part_widths) else None
        at, in_y = (rows[:, None], columns[None, :]), mask_of(rows, columns, mine, in_part)
        y = load(y_ref, *at, mask=in_y)
        (more,) = _deltas(delta, slot, rows, mine, [(part, columns)], in_part)
        out = (y.astype(jnp.float32) + more).astype(out_ref.dtype)
        plgpu.store(out_ref.at[at], out, mask=in_y)


def _on_device(delta: LoRADelta, tokens: int) -> LoRADelta:
    """As the kernels take it."""
    check_block_rank(delta.b.shape[2])
    h = delta.h
    if tokens > 256:  # every piece of columns reads all of h, so it is summed before
        h = jnp.sum(h, axis=0, keepdims=True)
    return dataclasses.replace(delta, h=h, layer=jnp.asarray(delta.layer, jnp.int32)[None])


def lora_expand_gpu(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta,
    part_widths: tuple[int, ...],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_expand`. y is updated in place where XLA lets it."""
    config = ExpandConfig.choose(y.shape[0], delta.routing.tile, part_widths)
    column_tiles = sum(pl.cdiv(width, config.block_n) for width in part_widths)
    return pl.pallas_call(
        functools.partial(_expand_kernel, part_widths=part_widths, block_n=config.block_n),
        name="lora_expand",
        grid=(delta.routing.pair_slot.shape[0], column_tiles),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(y, _on_device(delta, y.shape[0]))


def _gated_kernel(
    y_ref,  # [tokens, 2 * half]
    delta: LoRADelta,  # of refs
    out_ref,  # [tokens, half]
    *,
    activation: Callable[[Any], Any],
    block_n: int,
):
    item, column_tile = pl.program_id(0), pl.program_id(1)
    tokens, half = out_ref.shape
    slot, rows, mine, there = _tokens_of(item, delta.routing.tile, tokens, delta)

    @pl.when(there)
    def _():
        columns = column_tile * block_n + jnp.arange(block_n, dtype=jnp.int32)
        in_half = columns < half if half % block_n else None
        in_y = mask_of(rows, columns, mine, in_half)
        up_part = min(1, delta.h.shape[3] - 1)  # gate and up may share their A
        pieces = [(0, columns), (up_part, columns + half)]
        y = [load(y_ref, rows[:, None], at[None, :], mask=in_y) for _, at in pieces]
        more = _deltas(delta, slot, rows, mine, pieces, in_half)
        gate, up = (old.astype(jnp.float32) + new for old, new in zip(y, more, strict=True))
        out = (activation(gate) * up).astype(out_ref.dtype)
        plgpu.store(out_ref.at[rows[:, None], columns[None, :]], out, mask=in_y)


def takes(activation: Callable[[Array], Array]) -> bool:
    """Whether Triton can compute it: Pallas knows neither erf nor erfc there (the exact gelu)."""
    return "erf" not in str(jax.make_jaxpr(activation)(jnp.float32(0)))


def gated_gpu(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta,
    activation: Callable[[Array], Array],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens half"]:
    """See `jlora.kernels.gated`."""
    tokens, half, tile = y.shape[0], y.shape[1] // 2, delta.routing.tile
    config = ExpandConfig.choose(tokens, tile, (half,), gate=True)
    return pl.pallas_call(
        functools.partial(_gated_kernel, activation=activation, block_n=config.block_n),
        name="gated",
        grid=(_programs(tokens, tile, delta), pl.cdiv(half, config.block_n)),
        out_shape=jax.ShapeDtypeStruct((tokens, half), y.dtype),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(y, _on_device(delta, tokens))


def _rope_kernel(
    kv_ref,  # [pages, page_size, 2 * kv_heads, head_dim]; the same memory as kv_out_ref
    qkv_ref,  # [tokens, (heads + 2 * kv_heads) * head_dim]
    delta: LoRADelta | None,  # of refs
    cos_ref,  # [tokens, half]
    sin_ref,  # [tokens, half]
    destinations_ref,  # [tokens]
    first_page_ref,  # [1]
    kv_out_ref,
    q_ref,  # [tokens, heads, head_dim]
    *,
    tile: int,
):
    del kv_ref
    head = pl.program_id(1)
    tokens, heads, head_dim = q_ref.shape
    page_size, kv_heads = jnp.int32(kv_out_ref.shape[1]), kv_out_ref.shape[2] // 2
    slot, rows, mine, there = _tokens_of(pl.program_id(0), tile, tokens, delta)

    @pl.when(there)
    def _():
        half = head_dim // 2
        dim, in_half = range_of(half)
        in_y = mask_of(rows, dim, mine, in_half)
        piece = (head >= heads).astype(jnp.int32) + (head >= heads + kv_heads).astype(jnp.int32)
        one_part = delta is None or delta.h.shape[3] == 1  # q, k and v share their A
        part = jnp.int32(0) if one_part else piece
        pieces = [(part, head * head_dim + start + dim) for start in (0, half)]
        y = [load(qkv_ref, rows[:, None], at[None, :], mask=in_y) for _, at in pieces]
        cos, sin = (load(ref, rows[:, None], dim[None, :], mask=in_y) for ref in (cos_ref, sin_ref))
        destination = load(destinations_ref, rows, mask=mine)
        more = _deltas(delta, slot, rows, mine, pieces, in_half)
        first, second = (old.astype(jnp.float32) + new for old, new in zip(y, more, strict=True))
        turned = first * cos - second * sin, second * cos + first * sin

        @pl.when(piece == 0)
        def _():
            for start, values in zip((0, half), turned, strict=True):
                at = q_ref.at[rows[:, None], head, start + dim[None, :]]
                plgpu.store(at, values.astype(q_ref.dtype), mask=in_y)

        @pl.when(piece > 0)
        def _():
            kv_head = lax.rem(head - heads, jnp.int32(kv_heads))
            written = mine & (destination >= 0)
            offset, page = lax.rem(destination, page_size), lax.div(destination, page_size)
            # The interpreter writes masked rows back; past the last page nothing comes of it.
            page = jnp.where(written, first_page_ref[0] + page, kv_out_ref.shape[0])
            written = mask_of(rows, dim, written, in_half)
            kept = zip((0, half), turned, (first, second), strict=True)
            for start, key, value in kept:
                at = (page[:, None], offset[:, None], 2 * kv_head + piece - 1, start + dim[None, :])
                values = jnp.where(piece == 1, key, value).astype(kv_out_ref.dtype)
                plgpu.store(kv_out_ref.at[at], values, mask=written)


def rope_and_write_kv_gpu(
    qkv: Float[Array, "tokens width"],
    delta: LoRADelta | None,
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    kv_pages: Float[Array, "pages page_size kv_heads_2 head_dim"],
    destinations: Int[Array, " tokens"],
    first_page: Int[Array, ""] | int,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `jlora.kernels.rope_and_write_kv`; all of a head's dimensions turn."""
    tokens, (_, _, kv_heads_2, head_dim) = qkv.shape[0], kv_pages.shape
    heads = qkv.shape[1] // head_dim - kv_heads_2
    tile = token_tile(tokens) if delta is None else delta.routing.tile
    kv_pages, q = pl.pallas_call(
        functools.partial(_rope_kernel, tile=tile),
        name="rope_and_write_kv",
        grid=(_programs(tokens, tile, delta), heads + kv_heads_2),
        out_shape=(
            jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
            jax.ShapeDtypeStruct((tokens, heads, head_dim), qkv.dtype),
        ),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=2 if tile <= 16 else 4, num_stages=2),
        interpret=interpret,
    )(
        kv_pages,
        qkv,
        None if delta is None else _on_device(delta, tokens),
        cos,
        sin,
        destinations,
        jnp.asarray(first_page, jnp.int32)[None],
    )
    return q, kv_pages
