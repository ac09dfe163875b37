"""Ragged paged attention and the KV write as Pallas kernels for GPU (Triton backend).

A program takes the queries of one tile of one sequence that share a KV head: row r of its matrix is
query r // group of the tile with head r % group of the group. It walks the keys that the tile sees,
in blocks gathered page by page, with an online softmax (Milakov and Gimelshein 2018, as in
FlashAttention); blocks that every query sees whole are not masked. Where tiles and KV heads alone
do not fill the GPU, the keys are split over more programs, whose partial results are combined by
their softmax sums (Flash-Decoding).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jlora.kernels.attention import MASKED, query_tiles
from jlora.kernels.lora_gpu import dot, load

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """rows: queries x group of a program; block_k: keys of a step; splits: pieces of the keys."""

    rows: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int = 3

    @staticmethod
    def choose(q_shape, kv_heads: int, itemsize: int, seqs: int, max_keys: int, programs=264):
        tokens, heads, head_dim = q_shape
        rows = max(16 if tokens <= 256 else 64, pl.next_power_of_2(heads // kv_heads))
        # 16 KiB of keys a step, and as much of values, so that three stages fit shared memory.
        dim_pad = pl.next_power_of_2(head_dim)
        block_k = 16384 // (dim_pad * itemsize)
        block_k = min(64, max(16, block_k))
        working = min(tokens, pl.cdiv(tokens * heads // kv_heads, rows) + seqs) * kv_heads
        splits = min(16, programs // working, max_keys // (2 * block_k))
        num_warps = 4 if rows * dim_pad <= 64 * 128 else 8  # else registers spill
        return AttentionConfig(rows, block_k, max(1, splits), num_warps)


@dataclasses.dataclass(frozen=True)
class _Options:
    config: AttentionConfig
    group: int
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None


def _attend(
    q, kv_pages_ref, page_indices_ref, seq, kv_head, q_position, seen, begin, stop, options
):
    """Online softmax of the rows over positions begin to stop.

    seen: (first, last) position from begin on of those that every row sees.
    -> weighted sum of the values [rows, head_dim], highest score and sum of the weights [rows];
    scores are in units of log 2.
    """
    (rows, dim_pad), config = q.shape, options.config
    page_size, head_dim = kv_pages_ref.shape[1], kv_pages_ref.shape[3]
    block_k = jnp.int32(config.block_k)
    dim = jnp.arange(dim_pad, dtype=jnp.int32)
    whole_dim = dim_pad == head_dim

    def one_block(i, carry, masked):
        acc, highest, total = carry
        position = begin + i * block_k + jnp.arange(config.block_k, dtype=jnp.int32)
        inside = position < stop

        page_at = lax.div(position, jnp.int32(page_size))
        page = load(page_indices_ref, seq, page_at, mask=inside if masked else None)
        offset = lax.rem(position, jnp.int32(page_size))

        def rows_of(which):  # [block_k, dim_pad]; what lies past the sequence may be NaN
            at = (page[:, None], offset[:, None], 2 * kv_head + which, dim[None, :])
            mask = inside[:, None] & (dim < head_dim)[None, :]
            return load(kv_pages_ref, *at, mask=None if whole_dim and not masked else mask)

        scores = dot(q, rows_of(0), (1, 1)) * options.sm_scale  # [rows, block_k]
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores * (1.0 / options.soft_cap))
        scores *= LOG2_E
        if masked:
            visible = inside[None, :] & (position[None, :] <= q_position[:, None])
            if options.sliding_window is not None:
                visible &= position[None, :] > q_position[:, None] - options.sliding_window
            scores = jnp.where(visible, scores, MASKED)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_highest[:, None])
        if masked:
            weights = jnp.where(visible, weights, 0.0)
        rescale = jnp.exp2(highest - new_highest)
        values = rows_of(1)
        acc = acc * rescale[:, None] + dot(weights.astype(values.dtype), values, (1, 0))
        return acc, new_highest, total * rescale + jnp.sum(weights, axis=1)

    blocks = lax.div(jnp.maximum(stop - begin, 0) + block_k - 1, block_k)
    first_seen, last_seen = seen
    whole_stop = jnp.maximum(jnp.minimum(stop, last_seen + 1) - begin, 0)
    last_whole = lax.div(whole_stop, block_k)  # past the last block that needs no mask
    masked = functools.partial(one_block, masked=True)
    unmasked = functools.partial(one_block, masked=False)
    zeros = jnp.zeros((rows,), jnp.float32)
    carry = (jnp.zeros((rows, dim_pad), jnp.float32), zeros + MASKED, zeros)
    first_whole = jnp.int32(0)
    if options.sliding_window is not None:
        first_whole = lax.div(jnp.maximum(first_seen - begin, 0) + block_k - 1, block_k)
        first_whole = jnp.minimum(first_whole, last_whole)
        carry = lax.fori_loop(0, first_whole, masked, carry)
    carry = lax.fori_loop(first_whole, last_whole, unmasked, carry)
    return lax.fori_loop(last_whole, blocks, masked, carry)


def _attention_kernel(
    q_ref,  # [tokens, heads, head_dim]
    kv_pages_ref,  # [pages, page_size, 2 * kv_heads, head_dim]
    kv_lens_ref,  # [seqs]
    page_indices_ref,  # [seqs, pages_per_seq]
    cu_q_lens_ref,  # [seqs + 1]
    num_seqs_ref,  # [1]
    tile_seq_ref,  # [tiles]
    tile_start_ref,  # [tiles]
    num_tiles_ref,  # [1]
    out_ref,  # [splits, tokens, heads, head_dim]
    highest_ref,  # [splits, tokens, heads]
    total_ref,  # [splits, tokens, heads]
    *,
    options: _Options,
):
    kv_head, index, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens, _, head_dim = q_ref.shape
    config, group = options.config, options.group
    tile = config.rows // group
    row = jnp.arange(config.rows, dtype=jnp.int32)
    dim = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    local, head = lax.div(row, jnp.int32(group)), kv_head * group + lax.rem(row, jnp.int32(group))

    def store(token, mask, acc, highest, total):
        at = (split, token[:, None], head[:, None], dim[None, :])
        mask_2d = mask[:, None] & (dim < head_dim)[None, :]
        plgpu.store(out_ref.at[at], acc.astype(out_ref.dtype), mask=mask_2d)
        if config.splits > 1:
            plgpu.store(highest_ref.at[split, token, head], highest, mask=mask)
            plgpu.store(total_ref.at[split, token, head], total, mask=mask)

    @pl.when(index < num_tiles_ref[0])
    def _():
        # A sequence's last tile sees the most keys, so the last are started first.
        at = num_tiles_ref[0] - 1 - index
        seq, start = tile_seq_ref[at], tile_start_ref[at]
        first, kv_len = cu_q_lens_ref[seq], kv_lens_ref[seq]
        q_len = cu_q_lens_ref[seq + 1] - first
        query = start + local
        mask = (local < tile) & (query < q_len)
        token = first + query
        q = plgpu.load(
            q_ref.at[token[:, None], head[:, None], dim[None, :]],
            mask=mask[:, None] & (dim < head_dim)[None, :],
            other=0.0,
        )
        history = kv_len - q_len
        stop = history + jnp.minimum(start + tile, q_len)  # past the last key that is seen
        begin = first_seen = jnp.int32(0)
        if options.sliding_window is not None:
            begin = jnp.maximum(history + start - (options.sliding_window - 1), 0)
            first_seen = stop - options.sliding_window
        if config.splits > 1:
            step = jnp.int32(config.block_k * config.splits)
            piece = lax.div(stop - begin + step - 1, step) * config.block_k
            begin += split * piece
            stop = jnp.minimum(begin + piece, stop)
        acc, highest, total = _attend(
            q,
            kv_pages_ref,
            page_indices_ref,
            seq,
            kv_head,
            history + query,
            (first_seen, history + start),
            begin,
            stop,
            options,
        )
        acc = acc / jnp.maximum(total, 1e-30)[:, None]
        store(token, mask, acc, highest, total)

    # Padding tokens get zeros, a tile's worth from every program.
    real = cu_q_lens_ref[num_seqs_ref[0]]

    @pl.when(real < tokens)
    def _():
        token = real + index * tile + local
        zeros = jnp.zeros((config.rows,), jnp.float32)
        acc = jnp.zeros((config.rows, dim.shape[0]), jnp.float32)
        store(token, (local < tile) & (token < tokens), acc, zeros, zeros)


def ragged_paged_attention_gpu(
    q: Float[Array, "tokens heads head_dim"],
    kv_pages: Float[Array, "pages page_size kv_heads_2 head_dim"],
    kv_lens: Int[Array, " seqs"],
    page_indices: Int[Array, "seqs pages_per_seq"],
    cu_q_lens: Int[Array, " seqs_1"],
    num_seqs: Int[Array, "1"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "tokens heads head_dim"]:
    """See `jlora.kernels.ragged_paged_attention`. Padding tokens get zeros."""
    tokens, heads, _ = q.shape
    seqs, pages_per_seq = page_indices.shape
    page_size, kv_heads = kv_pages.shape[1], kv_pages.shape[2] // 2
    max_keys = pages_per_seq * page_size
    if sliding_window is not None:
        max_keys = min(max_keys, sliding_window)
    config = AttentionConfig.choose(q.shape, kv_heads, q.dtype.itemsize, seqs, max_keys)
    options = _Options(config, heads // kv_heads, sm_scale, sliding_window, soft_cap)
    tiles = query_tiles(cu_q_lens, num_seqs, tokens, config.rows // options.group)
    one = config.splits == 1
    sums = (1, 1, 1) if one else (config.splits, tokens, heads)
    out, highest, total = pl.pallas_call(
        functools.partial(_attention_kernel, options=options),
        name="ragged_paged_attention",
        grid=(kv_heads, tiles.seq.shape[0], config.splits),
        out_shape=(
            jax.ShapeDtypeStruct((config.splits, *q.shape), q.dtype if one else jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
    )(
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        tiles.seq,
        tiles.start,
        tiles.num_tiles[None],
    )
    return out[0] if one else _combine(out, highest, total).astype(q.dtype)


def _combine(out, highest, total):
    """Softmax over the whole from that over each split: out [splits, tokens, heads, head_dim]."""
    weights = total * jnp.exp2(highest - jnp.max(highest, axis=0, keepdims=True))
    weights /= jnp.maximum(jnp.sum(weights, axis=0, keepdims=True), 1e-30)
    return jnp.sum(out * weights[..., None], axis=0)


def _write_kernel(
    kv_ref,  # [pages, page_size, 2 * kv_heads, head_dim]; the same memory as out_ref
    k_ref,  # [tokens, kv_heads, head_dim]
    v_ref,  # [tokens, kv_heads, head_dim]
    destinations_ref,  # [tokens]
    out_ref,
):
    del kv_ref
    token = pl.program_id(0)
    _, kv_heads, head_dim = k_ref.shape
    page_size = jnp.int32(out_ref.shape[1])
    destination = destinations_ref[token]

    @pl.when(destination >= 0)
    def _():
        head = jnp.arange(pl.next_power_of_2(kv_heads), dtype=jnp.int32)[:, None]
        dim = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
        mask = (head < kv_heads) & (dim < head_dim)
        page, offset = lax.div(destination, page_size), lax.rem(destination, page_size)
        for which, new_ref in enumerate((k_ref, v_ref)):
            new = plgpu.load(new_ref.at[token, head, dim], mask=mask, other=0.0)
            at = (page, offset, 2 * head + which, dim)
            plgpu.store(out_ref.at[at], new.astype(out_ref.dtype), mask=mask)


def write_kv_gpu(
    kv_pages: Float[Array, "pages page_size kv_heads_2 head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    destinations: Int[Array, " tokens"],
    *,
    interpret: bool = False,
) -> Float[Array, "pages page_size kv_heads_2 head_dim"]:
    """See `jlora.kernels.write_kv`. One program a token."""
    return pl.pallas_call(
        _write_kernel,
        name="write_kv",
        grid=(k.shape[0],),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(kv_pages, k, v, destinations)
