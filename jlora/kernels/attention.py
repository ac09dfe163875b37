"""The definition of ragged paged attention and of the KV write in plain XLA.

Keys and values lie in pages, `kv_pages[page, offset, 2 * head + (0 key, 1 value)]`, the layout of
the TPU kernel that ships with JAX. The tokens of a step are those of its sequences one after the
other; sequence s has queries `cu_q_lens[s] : cu_q_lens[s + 1]`, the last of its `kv_lens[s]`
positions, and its position i lies in page `page_indices[s, i // page_size]`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30  # finite: a row without any key gives zeros, not NaN


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seq", "start", "num_tiles"],
    meta_fields=["tile"],
)
@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """The queries of a step cut into tiles of `tile` queries of one sequence each."""

    seq: Int[Array, " tiles"]  # sequence of a tile
    start: Int[Array, " tiles"]  # its first query, counted from the sequence's first in this step
    num_tiles: Int[Array, ""]
    tile: int


def query_tiles(
    cu_q_lens: Int[Array, " seqs_1"], num_seqs: Int[Array, "1"], tokens: int, tile: int
) -> QueryTiles:
    """Cuts a step of at most `tokens` queries; there are at most tokens // tile + seqs tiles."""
    seqs = cu_q_lens.shape[0] - 1
    real = jnp.arange(seqs) < num_seqs[0]
    counts = jnp.where(real, (jnp.diff(cu_q_lens) + tile - 1) // tile, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(tokens // tile + seqs, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    seq = jnp.minimum(seq, seqs - 1)
    first_tile = ends - counts
    return QueryTiles(seq, (index - first_tile[seq]) * tile, ends[-1], tile)


def token_sequences(cu_q_lens: Int[Array, " seqs_1"], tokens: int) -> Int[Array, " tokens"]:
    """The sequence of each token of a step; padding tokens get the last one."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(cu_q_lens[1:], index, side="right", method="compare_all").astype(
        jnp.int32
    )
    return jnp.minimum(seq, cu_q_lens.shape[0] - 2)


def ragged_paged_attention_xla(
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
) -> Float[Array, "tokens heads head_dim"]:
    """See `jlora.kernels.ragged_paged_attention`.

    A tile of queries at a time, page by page, with a running softmax (Milakov and Gimelshein 2018).
    """
    tokens, heads, head_dim = q.shape
    _, page_size, kv_heads_2, _ = kv_pages.shape
    kv_heads = kv_heads_2 // 2
    tile = 8 if tokens <= 64 else 32
    tiles = query_tiles(cu_q_lens, num_seqs, tokens, tile)
    highest = jax.lax.Precision.HIGHEST
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))

    def one_tile(index, out):
        seq, start = tiles.seq[index], tiles.start[index]
        row, length = cu_q_lens[seq] + start, kv_lens[seq]
        first = length - (cu_q_lens[seq + 1] - cu_q_lens[seq]) + start  # position of row 0
        q_position = (first + jnp.arange(tile))[:, None]
        queries = jax.lax.dynamic_slice_in_dim(q, row, tile)
        queries = queries.reshape(tile, kv_heads, heads // kv_heads, head_dim)

        def one_page(page, carry):
            best, total, mixed = carry
            at = (page_indices[seq, page], 0, 0, 0)
            kv = jax.lax.dynamic_slice(kv_pages, at, (1, page_size, kv_heads_2, head_dim))
            kv = kv.reshape(page_size, kv_heads, 2, head_dim).astype(jnp.float32)
            scores = sm_scale * jnp.einsum(
                "qhgd,khd->hgqk", queries.astype(jnp.float32), kv[:, :, 0], precision=highest
            )
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            k_position = page * page_size + jnp.arange(page_size)[None]
            seen = (k_position <= q_position) & (k_position < length)
            if sliding_window is not None:
                seen &= k_position > q_position - sliding_window
            scores = jnp.where(seen[None, None], scores, MASKED)
            higher = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.where(seen[None, None], jnp.exp(scores - higher), 0.0)
            # Positions that nobody has written may hold NaN; their weight is 0, so is their value.
            values = jnp.where((k_position < length).reshape(-1, 1, 1), kv[:, :, 1], 0.0)
            fade = jnp.exp(best - higher)
            total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
            mixed = mixed * fade + jnp.einsum("hgqk,khd->hgqd", weights, values, precision=highest)
            return higher, total, mixed

        shape = (kv_heads, heads // kv_heads, tile)
        empty = (
            jnp.full((*shape, 1), MASKED, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )
        oldest = 0 if sliding_window is None else jnp.maximum(first - sliding_window + 1, 0)
        pages = (oldest // page_size, (length + page_size - 1) // page_size)
        _, total, mixed = jax.lax.fori_loop(*pages, one_page, empty)
        answer = mixed / jnp.maximum(total, 1e-30)  # [kv_heads, group, tile, head_dim]
        answer = answer.transpose(2, 0, 1, 3).reshape(tile, heads, head_dim).astype(q.dtype)
        # Rows past the sequence's last are those of the next tile, which comes later.
        return jax.lax.dynamic_update_slice_in_dim(out, answer, row, axis=0)

    out = jax.lax.fori_loop(0, tiles.num_tiles, one_tile, jnp.zeros_like(q))
    real = jnp.arange(tokens) < cu_q_lens[num_seqs[0]]
    return jnp.where(real[:, None, None], out[:tokens], 0)


def write_kv_xla(
    kv_pages: Float[Array, "pages page_size kv_heads_2 head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    destinations: Int[Array, " tokens"],
) -> Float[Array, "pages page_size kv_heads_2 head_dim"]:
    """See `jlora.kernels.write_kv`."""
    pages, page_size, heads, head_dim = kv_pages.shape
    new = jnp.stack([k, v], axis=2).reshape(-1, 1, heads, head_dim).astype(kv_pages.dtype)
    flat = kv_pages.reshape(pages * page_size, heads, head_dim)

    order = jnp.argsort(destinations < 0)  # those to be written first

    # One row at a time: a CPU scatters bfloat16 by converting all of the cache to float32.
    def write(index, flat):
        token = order[index]
        return jax.lax.dynamic_update_slice_in_dim(flat, new[token], destinations[token], axis=0)

    flat = jax.lax.fori_loop(0, jnp.sum(destinations >= 0), write, flat)
    return flat.reshape(kv_pages.shape)
