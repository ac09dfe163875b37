"""The LoRA matmuls as Pallas TPU kernels.

Both walk a list of *items*, one rank block of one slot that some token of a tile names, in
*groups* of up to `LANES // rank` items of the same tile. A group's blocks are copied from the pool
next to each other, so that one matmul with a full matrix unit serves them all, and the copies of
the next group run under the matmul of this one. The pool stays in HBM: what is not in use is not
read. The list depends on the routing and the slots only: XLA shares it between layers, and of a
scan over the layers only a few elementwise operations of it stay inside (seen on v5e).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jlora.kernels.lora import NO_ADAPTER, LoRADelta, LoRARouting, SlotTable, dot_precision

TOKEN_TILE = 128
WIDEST_TILE = 1 << 14  # columns that fit into VMEM
COLUMN_TILE = 4096  # of y in expand
LANES = 128
VMEM_BYTES = 64 * 2**20
NO_ITEM = -1
NO_SLOT = -2  # no token names it


class _Work(NamedTuple):
    """What the kernels prefetch; an item is slot * max_blocks + j, `NO_ITEM` past a tile's last."""

    items: Int[Array, " groups_x_group"]
    tiles: Int[Array, " groups"]  # tile of a group
    num_groups: Int[Array, "1"]
    blocks: Int[Array, " slots_x_max_blocks"]
    scales: Float[Array, " slots_x_max_blocks"]


def _work(routing: LoRARouting, slots: SlotTable, group: int) -> _Work:
    """Lists the groups, ordered by tile. Always at least one, if an empty one."""
    num_slots, max_blocks = slots.blocks.shape
    num_tiles = pl.cdiv(routing.token_slots.shape[0], routing.tile)
    pairs = min(routing.pair_tile.shape[0], num_tiles * num_slots)
    live = jnp.arange(pairs) < routing.num_pairs[0]
    counts = jnp.where(live, slots.counts[routing.pair_slot[:pairs]], 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)  # [pairs], counted in items
    in_tile = (routing.pair_tile[:pairs, None] == jnp.arange(num_tiles)) & live[:, None]
    tile_items = jnp.sum(jnp.where(in_tile, counts[:, None], 0), axis=0, dtype=jnp.int32)
    tile_groups = (tile_items + group - 1) // group
    group_ends = jnp.cumsum(tile_groups, dtype=jnp.int32)
    first_item = jnp.cumsum(tile_items, dtype=jnp.int32) - tile_items

    index = jnp.arange(pairs * max_blocks // group + num_tiles, dtype=jnp.int32)
    tile = jnp.minimum(_count(group_ends, index), num_tiles - 1)
    in_group = (index - (group_ends - tile_groups)[tile])[:, None] * group + jnp.arange(group)
    real = (index < group_ends[-1])[:, None] & (in_group < tile_items[tile][:, None])
    item = first_item[tile][:, None] + in_group  # [groups, group]
    pair = _pairs_of(item, tile, ends, jnp.sum(in_tile, axis=0, dtype=jnp.int32), routing.tile)
    flat = routing.pair_slot[pair] * max_blocks + item - (ends - counts)[pair]
    return _Work(
        items=jnp.where(real, flat, NO_ITEM).astype(jnp.int32).reshape(-1),
        tiles=tile,
        num_groups=jnp.maximum(group_ends[-1:], 1),
        blocks=slots.blocks.reshape(-1),
        scales=slots.scales.reshape(-1),
    )


def _pairs_of(
    item: Int[Array, "groups group"],
    tile: Int[Array, " groups"],
    ends: Int[Array, " pairs"],
    tile_pairs: Int[Array, " tiles"],
    width: int,
) -> Int[Array, "groups group"]:
    """The pair of each item, sought among the at most `width` pairs of the item's tile.

    Among all pairs that would be 10^9 comparisons at 16,384 tokens. The pairs of the next tile,
    which a narrow tile's window shows too, all end later.
    """
    first_pair = jnp.cumsum(tile_pairs, dtype=jnp.int32) - tile_pairs
    padded = jnp.pad(ends, (0, width), constant_values=jnp.iinfo(jnp.int32).max)
    windows = jax.vmap(lambda at: jax.lax.dynamic_slice_in_dim(padded, at, width))(first_pair)
    before = jnp.sum(windows[tile][:, None] <= item[:, :, None], axis=2, dtype=jnp.int32)
    return jnp.minimum(first_pair[tile][:, None] + before, ends.shape[0] - 1)


def _count(ends: Int[Array, " n"], index: Int[Array, " m"]) -> Int[Array, " m"]:
    """How many of the ends are at or before each index: where it lies in the ascending ends."""
    return jnp.sum(ends[None] <= index[:, None], axis=1, dtype=jnp.int32)


def check_dtypes(**arrays) -> None:
    for name, array in arrays.items():
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the TPU kernels take bfloat16 and float32"
            )


def _check_rank(rank: int) -> None:
    if rank not in (8, 16, 32, 64, 128):
        raise NotImplementedError(f"block rank {rank}; the TPU kernels take 8, 16, 32, 64 and 128")


def in_hbm(array, interpret: bool | object):
    """The array, which XLA may not move: it would copy a whole pool that fits into VMEM there,
    layer by layer, of which a kernel reads a few blocks.
    """
    if interpret or not isinstance(array, jax.core.Tracer):  # it takes effect in a jit only
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _copies(work: _Work, step, g, source, buffer, sems, method: str) -> None:
    """Starts or awaits the copies of group g's blocks into half `step % 2` of the buffer.

    Starting also zeroes what no item fills: old NaN there would outlive a product with zero.
    """
    group, half = buffer.shape[1], jax.lax.rem(step, 2)
    for i in range(group):
        item = work.items[g * group + i]

        @pl.when(item != NO_ITEM)
        def _(i=i, item=item):
            to = buffer.at[half, i]
            getattr(pltpu.make_async_copy(source(work.blocks[item]), to, sems.at[half]), method)()

        if method == "start":

            @pl.when(item == NO_ITEM)
            def _(i=i):
                buffer[half, i] = jnp.zeros(buffer.shape[2:], buffer.dtype)


def _shrink_kernel(layer, *refs, max_blocks: int):
    work, (rows_ref, x_ref, a_hbm, h_ref, buffer, sems) = _Work(*refs[:5]), refs[5:]
    g = pl.program_id(0)
    _, group, parts, rank, d_in = buffer.shape

    def copies(g, method):
        _copies(work, g, g, lambda block: a_hbm.at[layer[0], block], buffer, sems, method)

    pl.when(g == 0)(lambda: copies(g, "start"))
    pl.when(g + 1 < work.num_groups[0])(lambda: copies(g + 1, "start"))
    copies(g, "wait")
    a = buffer[jax.lax.rem(g, 2)].reshape(group * parts * rank, d_in)
    h = jax.lax.dot_general(
        x_ref[...],
        a.astype(x_ref.dtype),
        (((1,), (1,)), ((), ())),
        precision=dot_precision(x_ref.dtype),
        preferred_element_type=jnp.float32,
    )  # [tile, group * parts * rank]
    for i in range(group):
        item = work.items[g * group + i]

        @pl.when(item != NO_ITEM)
        def _(i=i, item=item):
            mine = rows_ref[...] == item // max_blocks  # [tile, 1]
            columns = h[:, i * parts * rank : (i + 1) * parts * rank]
            j = jax.lax.rem(item, max_blocks)
            h_ref[j] = jnp.where(mine, columns, h_ref[j])


def lora_shrink_tpu(
    x: Float[Array, "tokens d_in"],
    a: Float[Array, "layers blocks parts rank d_in"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    *,
    interpret: bool | object = False,
) -> Float[Array, "1 tokens max_blocks parts rank"]:
    """See `jlora.kernels.lora_shrink`."""
    check_dtypes(x=x, a=a)
    (tokens, d_in), (_, _, parts, rank, _) = x.shape, a.shape
    _check_rank(rank)
    max_blocks, tile, group = slots.blocks.shape[1], min(routing.tile, tokens), LANES // rank
    work = _work(routing, slots, group)

    def at_tile(g, layer, items, tiles, *_):
        return (tiles[g], 0)

    h = pl.pallas_call(
        functools.partial(_shrink_kernel, max_blocks=max_blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(work),
            grid=(work.num_groups[0],),
            in_specs=[
                pl.BlockSpec((tile, 1), at_tile),
                pl.BlockSpec((tile, d_in), at_tile),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                (max_blocks, tile, parts * rank),
                lambda g, layer, items, tiles, *_: (0, tiles[g], 0),
            ),
            scratch_shapes=[
                pltpu.VMEM((2, group, parts, rank, d_in), a.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((max_blocks, tokens, parts * rank), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="lora_shrink",
    )(_one(layer), *work, routing.token_slots[:, None], x, in_hbm(a, interpret))
    return h.reshape(max_blocks, tokens, parts, rank).transpose(1, 0, 2, 3)[None]


def _expand_kernel(layer, *refs, max_blocks: int, part_widths: tuple[int, ...]):
    work, refs = _Work(*refs[:5]), refs[5:]
    rows_ref, y_ref, h_ref, b_hbm, out_ref, buffer, acc_ref, sems = refs
    c, g = pl.program_id(0), pl.program_id(1)
    num_groups, tile = work.num_groups[0], work.tiles[g]
    _, group, rank, width = buffer.shape
    step = c * num_groups + g
    copies = functools.partial(_column_copies, work, layer[0], b_hbm, buffer, sems)

    pl.when(step == 0)(lambda: copies(step, "start"))
    pl.when(step + 1 < pl.num_programs(0) * num_groups)(lambda: copies(step + 1, "start"))
    copies(step, "wait")

    @pl.when((g == 0) | (work.tiles[jnp.maximum(g - 1, 0)] != tile))
    def _():
        acc_ref[...] = y_ref[...].astype(jnp.float32)

    b = buffer[jax.lax.rem(step, 2)].reshape(group * rank, width)
    start = 0
    for part, part_width in enumerate(part_widths):

        @pl.when((c * width < start + part_width) & ((c + 1) * width > start))
        def _(part=part, start=start, end=start + part_width):
            delta = jnp.dot(
                _group_h(work, g, rows_ref, h_ref, part, rank, max_blocks).astype(b.dtype),
                b,
                precision=dot_precision(b.dtype),
                preferred_element_type=jnp.float32,
            )  # [tile, width]
            column = c * width + jax.lax.broadcasted_iota(jnp.int32, delta.shape, 1)
            acc_ref[...] += jnp.where((column >= start) & (column < end), delta, 0.0)

        start += part_width

    @pl.when((g + 1 == num_groups) | (work.tiles[jnp.minimum(g + 1, num_groups - 1)] != tile))
    def _():
        out = acc_ref[...].astype(out_ref.dtype)
        out_ref[...] = jnp.where(rows_ref[...] != NO_ADAPTER, out, y_ref[...])


def _column_copies(work: _Work, layer, b_hbm, buffer, sems, step, method: str) -> None:
    """`_copies` of one tile of columns; the last tile may be narrower."""
    width, d_out, num_groups = buffer.shape[3], b_hbm.shape[3], work.num_groups[0]
    c, g = step // num_groups, jax.lax.rem(step, num_groups)
    whole, tail = divmod(d_out, width)

    def copies(columns):
        def source(block):
            at = 0 if d_out == width else pl.multiple_of(c * width, LANES)
            return b_hbm.at[layer, block, :, pl.ds(at, columns)]

        to = buffer if columns == width else buffer.at[:, :, :, pl.ds(0, columns)]
        _copies(work, step, g, source, to, sems, method)

    pl.when(c < whole)(lambda: copies(width))
    if tail:
        pl.when(c == whole)(lambda: copies(tail))


def _group_h(work: _Work, g, rows_ref, h_ref, part: int, rank: int, max_blocks: int):
    """h of a group's items side by side, scaled, zero for the tokens of other slots."""
    group, columns = LANES // rank, []
    for i in range(group):
        item = work.items[g * group + i]
        at = jnp.maximum(item, 0)
        mine = rows_ref[...] == jnp.where(item == NO_ITEM, NO_SLOT, at // max_blocks)  # [tile, 1]
        h = h_ref[jax.lax.rem(at, max_blocks)][:, part * rank : (part + 1) * rank]
        columns.append(jnp.where(mine, h * work.scales[at], 0.0))
    return jnp.concatenate(columns, axis=1)  # [tile, LANES]


def lora_expand_tpu(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta,
    part_widths: tuple[int, ...],
    *,
    interpret: bool | object = False,
) -> Float[Array, "tokens d_out"]:
    """See `jlora.kernels.lora_expand`. In place when y is donated."""
    h, b, layer, routing, slots = delta.h, delta.b, delta.layer, delta.routing, delta.slots
    check_dtypes(y=y, b=b)
    (tokens, d_out), (_, _, max_blocks, parts, rank) = y.shape, h.shape
    _check_rank(rank)
    # Tiles of columns begin and end where lanes do; an odd width is one tile.
    width = d_out if d_out % LANES else min(COLUMN_TILE, d_out)
    if width > WIDEST_TILE:
        raise NotImplementedError(
            f"d_out {d_out}; above {WIDEST_TILE} the TPU kernel takes multiples of {LANES}"
        )
    tile, group = min(routing.tile, tokens), LANES // rank
    work = _work(routing, slots, group)
    # As `lora_shrink_tpu` makes it: XLA drops both transpositions.
    h = jnp.sum(h, axis=0).transpose(1, 0, 2, 3).reshape(max_blocks, tokens, parts * rank)

    y_spec = pl.BlockSpec((tile, width), lambda c, g, layer, items, tiles, *_: (tiles[g], c))
    return pl.pallas_call(
        functools.partial(_expand_kernel, max_blocks=max_blocks, part_widths=part_widths),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(work),
            grid=(pl.cdiv(d_out, width), work.num_groups[0]),
            in_specs=[
                pl.BlockSpec((tile, 1), lambda c, g, layer, items, tiles, *_: (tiles[g], 0)),
                y_spec,
                pl.BlockSpec(
                    (max_blocks, tile, parts * rank),
                    lambda c, g, layer, items, tiles, *_: (0, tiles[g], 0),
                ),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=y_spec,
            scratch_shapes=[
                pltpu.VMEM((2, group, rank, width), b.dtype),
                pltpu.VMEM((tile, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        # Tiles without adapters stay as they are. A single tile is always written, and XLA keeps
        # y and the result in VMEM where they are two arrays (aliased, in some layers only).
        input_output_aliases={1 + len(work) + 1: 0} if tokens > tile else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="lora_expand",
    )(_one(layer), *work, routing.token_slots[:, None], y, h, in_hbm(b, interpret))


def _one(layer) -> Int[Array, "1"]:
    return jnp.asarray(layer, jnp.int32).reshape(1)
