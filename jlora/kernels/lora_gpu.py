"""lora_shrink as a Pallas kernel for GPU (Triton backend), and what the other kernels share.

Tokens are cut into tiles, and a tile's pairs are the slots that occur in it. Shrink has a program
for each pair and piece of d_in (`splits` pieces, so that a decode step fills the GPU); their sum is
left to what reads h. What is read follows the ranks in use. No program writes what another one
writes, so there are no atomics and the same bits on every run.
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


@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """block_k: columns of x of a step of the loop; parts: of a program; turns: see turn_sizes."""

    block_k: int
    splits: int
    parts: int
    turns: tuple[int, ...] = (1,)
    num_warps: int = 4
    num_stages: int = 3

    @staticmethod
    def choose(
        tokens: int, d_in: int, parts: int, rank: int, max_blocks: int, tile: int, itemsize: int
    ) -> ShrinkConfig:
        """What was best on an H100 for an 8B's projections: see docs/benchmarks.md.

        With few tokens a part a program; with many x is read once for all parts.
        """
        many = tokens > 256
        block_k = min((256 if many else 512) // itemsize, pl.next_power_of_2(max(d_in, 16)))
        splits = min(16 if d_in > 8192 and not many else 8, pl.cdiv(d_in, block_k))
        steps = pl.cdiv(pl.cdiv(d_in, block_k), splits)
        together = parts if many and parts * rank <= 64 else 1
        largest = 2 if tile == 1 else max(64 // (together * rank), 1)
        sizes = turn_sizes(min(largest, 4), max_blocks)
        return ShrinkConfig(block_k, splits, together, sizes, num_stages=min(3, max(2, steps)))


def check_block_rank(rank: int) -> None:
    if rank not in BLOCK_RANKS:
        raise NotImplementedError(
            f"block rank {rank} is not supported by the GPU kernels; use one of {BLOCK_RANKS}"
        )


def token_tile(tokens: int, slots: int = 0) -> int:
    """Tokens a tile, where the tokens of a slot stand together.

    16 are the fewest rows of a Triton dot; above 256 tokens more share what is read. Where a slot
    has hardly more than one token, each token is a tile, and there are no dots.
    """
    if tokens <= 64 and tokens <= 2 * (pl.cdiv(tokens, 16) + slots - 1):
        return 1
    return 16 if tokens <= 256 else 32


def dot(a, b, contract: tuple[int, int]):
    """Of two matrices, over the axes given, in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = dot_precision(a.dtype)
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def range_of(size: int, at_least: int = 1) -> tuple[Array, Array | None]:
    """0, 1 ... and which of them are below size; None when all are (Triton takes powers of two)."""
    padded = max(pl.next_power_of_2(size), at_least)
    index = jnp.arange(padded, dtype=jnp.int32)
    return index, None if padded == size else index < size


def mask_of(rows, columns, of_rows=None, of_columns=None):
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


def turn_sizes(largest: int, max_blocks: int) -> tuple[int, ...]:
    """Blocks that a program takes at a time, and then, of those left over, one.

    Blocks of a turn are loaded together, and a large adapter waits for its turns.
    """
    size = min(largest, 1 << (max_blocks.bit_length() - 1))
    return (1,) if size == 1 else (size, 1)


def turns(slots: SlotTable, slot, sizes: tuple[int, ...]):
    """Cuts a slot's blocks: (blocks of a turn, the first block, turns) for each of the sizes."""
    first, count = jnp.int32(0), slots.counts[slot]
    for size in sizes:
        here = lax.div(count - first, jnp.int32(size))
        yield size, first, here
        first += here * size


def block_number(slots: SlotTable, slot, j):
    """Where block j of a slot is; to be called a turn ahead, as loading it takes time."""
    return load(slots.blocks, slot, jnp.minimum(j, slots.blocks.shape[1] - 1))


def _shrink_kernel(
    x_ref,  # [tokens, d_in]
    a_ref,  # [layers, blocks, parts, rank, d_in]
    layer_ref,  # [1]
    routing: LoRARouting,  # of refs
    slots: SlotTable,  # of refs
    h_ref,  # [splits, tokens, max_blocks, parts, rank]
    *,
    config: ShrinkConfig,
):
    pair, split, first_part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    (tokens, d_in), tile = x_ref.shape, routing.tile
    rank, block_k, here = a_ref.shape[3], config.block_k, config.parts
    steps = pl.cdiv(pl.cdiv(d_in, block_k), config.splits)

    # These loads, and each block's number a turn ahead, wait for one another as little as can be.
    layer, slot, tile_index = layer_ref[0], routing.pair_slot[pair], routing.pair_tile[pair]

    @pl.when(pair < routing.num_pairs[0])
    def _():
        rows = tile_index * tile + jnp.arange(tile, dtype=jnp.int32)
        first = split * (steps * block_k)
        in_tokens = rows < tokens if tokens % tile else None
        # Other slots' tokens of the tile are computed too, and not stored.
        mine = load(routing.token_slots, rows, mask=rows < tokens) == slot

        def take(size, first_block, count):
            # The ranks of the parts of this program, of the blocks of a turn, side by side.
            column, real = range_of(size * here * rank, at_least=1 if tile == 1 else 16)
            r, above = lax.rem(column, jnp.int32(rank)), lax.div(column, jnp.int32(rank))
            offset = jnp.int32(0) if size == 1 else lax.div(above, jnp.int32(here))
            part = first_part * here + above - offset * here

            def one_turn(index, block):
                j = first_block + index * size + offset

                def one_step(step, h):
                    k = first + step * block_k + jnp.arange(block_k, dtype=jnp.int32)
                    in_k = k < d_in if d_in % (block_k * config.splits) else None
                    in_x, in_a = mask_of(rows, k, in_tokens, in_k), mask_of(column, k, real, in_k)
                    of_column = jnp.broadcast_to(block, column.shape)[:, None]
                    at = (layer, of_column, part[:, None], r[:, None], k[None, :])
                    a = load(a_ref, *at, mask=in_a)
                    if tile == 1:
                        x = load(x_ref, tile_index, k, mask=in_k).astype(jnp.float32)
                        return h + a.astype(jnp.float32) * x[None, :]
                    x = load(x_ref, rows[:, None], k[None, :], mask=in_x)
                    return h + dot(x, a.astype(x.dtype), (1, 1))

                shape = (column.shape[0], block_k) if tile == 1 else (tile, column.shape[0])
                h = lax.fori_loop(0, steps, one_step, jnp.zeros(shape, jnp.float32))
                if tile == 1:
                    h = jnp.sum(h, axis=1)[None, :]
                of_column = jnp.broadcast_to(j, column.shape)[None, :]
                at = h_ref.at[split, rows[:, None], of_column, part[None, :], r[None, :]]
                plgpu.store(at, h, mask=mask_of(rows, column, mine & (rows < tokens), real))
                return block_number(slots, slot, j + size)

            lax.fori_loop(0, count, one_turn, block_number(slots, slot, first_block + offset))

        for each in turns(slots, slot, config.turns):
            take(*each)


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
    check_block_rank(rank)
    pairs = routing.pair_slot.shape[0]
    max_blocks, tile, itemsize = slots.blocks.shape[1], routing.tile, x.dtype.itemsize
    config = ShrinkConfig.choose(tokens, d_in, parts, rank, max_blocks, tile, itemsize)
    shape = (config.splits, tokens, max_blocks, parts, rank)
    return pl.pallas_call(
        functools.partial(_shrink_kernel, config=config),
        name="lora_shrink",
        grid=(pairs, config.splits, parts // config.parts),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(x, a, jnp.asarray(layer, jnp.int32)[None], routing, slots)
