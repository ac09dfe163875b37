"""What the TPU kernels move and multiply, added up from their grids, index maps and copies.

The compiler's own figure cannot be used: it does not see into a Pallas kernel, and believes what a
CostEstimate says. Here every operand of a kernel is followed as Pallas does: a block is fetched
when its index differs from that of the grid step before, a result is written when its index
changes, and what a kernel copies by itself is counted copy by copy. Routing is data, so it is given
in numpy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jlora.kernels import attention_tpu, grouped_tpu, lora_tpu

LANES, FLOAT32 = lora_tpu.LANES, 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of calls of kernels, on one device.

    pool: bytes read or written in arrays that stay in HBM: rank blocks, KV pages, experts.
    blocks: bytes of activations, in and out; they cost HBM only where XLA has put them there, which
    at decode is nowhere (see `jlora.engine.aot.kernel_blocks`).
    flops: of the matrix unit as the kernels use it, rows and columns that are masked included.
    """

    pool: int = 0
    blocks: int = 0
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(_fields(self), _fields(other), strict=True)))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(times * value for value in _fields(self)))


def _fields(traffic: Traffic) -> tuple[int, ...]:
    return dataclasses.astuple(traffic)


def fetches(indices: Iterable[tuple]) -> int:
    """How often a block is fetched (or written) whose index is this, grid step by grid step."""
    return sum(1 for _ in itertools.groupby(indices))


def lora_groups(token_slots: np.ndarray, counts: np.ndarray, rank: int) -> tuple[list[int], int]:
    """The tile of each group of items that the LoRA kernels walk, and the number of items.

    token_slots: the slot of each token, below 0 for none. counts: rank blocks of each slot.
    """
    tile = min(lora_tpu.TOKEN_TILE, len(token_slots))
    tiles, items = [], 0
    for at, start in enumerate(range(0, len(token_slots), tile)):
        slots = np.unique(token_slots[start : start + tile])
        mine = int(counts[slots[slots >= 0]].sum())
        tiles += [at] * -(-mine // (LANES // rank))
        items += mine
    return tiles or [0], items  # nothing to do is one group of nothing


def shrink(
    token_slots: np.ndarray,
    counts: np.ndarray,
    *,
    d_in: int,
    parts: int,
    max_blocks: int = 1,
    rank: int = 16,
    itemsize: int = 2,
) -> Traffic:
    """Of one `lora_shrink`."""
    tile = min(lora_tpu.TOKEN_TILE, len(token_slots))
    tiles, items = lora_groups(token_slots, counts, rank)
    visits = fetches((at,) for at in tiles)
    slots, x, h = tile * FLOAT32, tile * d_in * itemsize, max_blocks * tile * parts * rank * FLOAT32
    return Traffic(
        pool=items * parts * rank * d_in * itemsize,
        blocks=visits * (slots + x + h),
        flops=len(tiles) * 2 * tile * d_in * LANES * parts,
    )


def expand(
    token_slots: np.ndarray,
    counts: np.ndarray,
    *,
    part_widths: Sequence[int],
    parts: int,
    max_blocks: int = 1,
    rank: int = 16,
    itemsize: int = 2,
) -> Traffic:
    """Of one `lora_expand`. parts: of h."""
    tile, d_out = min(lora_tpu.TOKEN_TILE, len(token_slots)), sum(part_widths)
    width = min(lora_tpu.COLUMN_TILE, d_out)
    tiles, items = lora_groups(token_slots, counts, rank)
    columns = range(0, d_out, width)
    per_tile = fetches((at,) for _ in columns for at in tiles) * tile * FLOAT32
    y = sum(fetches((at,) for at in tiles) * tile * min(width, d_out - start) for start in columns)
    ends = list(itertools.accumulate(part_widths))
    dots = sum(
        start < end and start + width > end - part
        for start in columns
        for end, part in zip(ends, part_widths, strict=True)
    )
    return Traffic(
        pool=items * rank * d_out * itemsize,
        blocks=2 * y * itemsize + per_tile * (1 + max_blocks * parts * rank),
        flops=dots * len(tiles) * 2 * tile * LANES * width,
    )


def attention(
    q_lens: np.ndarray,
    kv_lens: np.ndarray,
    *,
    heads: int,
    page: tuple[int, int, int],
    max_pages: int,
    itemsize: int = 2,
) -> Traffic:
    """Of one call of JAX's ragged paged attention. page: (size, 2 x KV heads, head size).

    It copies whole blocks of keys, and all of a sequence's for each block of queries.
    """
    page_size, heads_2, head_dim = page
    if head_dim != LANES:
        raise NotImplementedError(f"head size {head_dim}; JAX's kernel takes {LANES}")
    tokens = int(q_lens.sum())
    keys = page_size * min(max_pages, max(1, attention_tpu.BLOCK_KEYS // page_size))
    queries = min(attention_tpu.BLOCK_QUERIES, tokens)
    starts, blocks = np.cumsum(q_lens) - q_lens, 0
    for start, q_len, kv_len in zip(starts, q_lens, kv_lens, strict=True):
        if q_len:
            query_blocks = (start + q_len - 1) // queries - start // queries + 1
            blocks += int(query_blocks) * -(-int(kv_len) // keys)
    return Traffic(
        pool=blocks * keys * heads_2 * head_dim * itemsize,
        blocks=2 * tokens * heads * head_dim * itemsize,
        flops=blocks * 4 * queries * heads * keys * head_dim,
    )


def write_kv(tokens: int, *, page: tuple[int, int, int], itemsize: int = 2) -> Traffic:
    """Of one `write_kv`: each token's keys and values are read and written."""
    size = tokens * page[1] * page[2] * itemsize
    return Traffic(pool=size, blocks=size)


def grouped(group_sizes: np.ndarray, *, d_in: int, d_out: int, itemsize: int = 2) -> Traffic:
    """Of one `grouped_matmul`, which reads the experts that have rows, else the first."""
    group_sizes = group_sizes if np.any(group_sizes) else np.eye(1, len(group_sizes), dtype=int)[0]
    rows, depth, columns = grouped_tpu.tiling(d_in, d_out, itemsize)
    ends = np.cumsum(group_sizes)
    pairs = [  # row tile, expert
        (tile, expert)
        for expert, (size, end) in enumerate(zip(group_sizes, ends, strict=True))
        if size
        for tile in range((end - size) // rows, (end - 1) // rows + 1)
    ]
    steps = [
        (n, *pair, k)
        for n in range(-(-d_out // columns))
        for pair in pairs
        for k in range(-(-d_in // depth))
    ]
    w = fetches((expert, k, n) for n, _, expert, k in steps)
    x = fetches((tile, k) for _, tile, _, k in steps)
    out = fetches((tile, n) for n, tile, _, _ in steps)
    return Traffic(
        pool=w * depth * columns * itemsize,
        blocks=(x * rows * depth + out * rows * columns) * itemsize,
        flops=len(steps) * 2 * rows * depth * columns,
    )


def one_hot(
    tokens: int,
    slots: int,
    *,
    d_in: int,
    parts: int,
    d_out: int,
    rank: int = 16,
    itemsize: int = 2,
) -> Traffic:
    """What shrink and expand of a row would take as masked einsums over every slot."""
    pool = slots * rank * (parts * d_in + d_out) * itemsize
    activations = tokens * (d_in + 2 * d_out) * itemsize
    h = 2 * tokens * slots * parts * rank * FLOAT32
    flops = 2 * tokens * slots * rank * (parts * d_in + d_out)
    return Traffic(pool, activations + h, flops)
