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
    data_fields=["seq", "start", "num_tiles", "first_tile"],
    meta_fields=["tile"],
)
@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """The queries of a step cut into tiles of `tile` queries of one sequence each."""

    seq: Int[Array, " tiles"]  # sequence of a tile
    start: Int[Array, " tiles"]  # its first query, counted from the sequence's first in this step
    num_tiles: Int[Array, ""]
    first_tile: Int[Array, " seqs"]
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
    return QueryTiles(seq, (index - first_tile[seq]) * tile, ends[-1], first_tile, tile)


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
    """See `jlora.kernels.ragged_paged_attention`. One tile of queries at a time."""
    tokens, heads, head_dim = q.shape
    kv_heads = kv_pages.shape[2] // 2
    tile = min(8, tokens)
    tiles = query_tiles(cu_q_lens, num_seqs, tokens, tile)
    q_lens = jnp.diff(cu_q_lens)
    highest = jax.lax.Precision.HIGHEST

    def attend(one):
        seq, start = one
        local = start + jnp.arange(tile)  # [tile]
        rows = jnp.minimum(cu_q_lens[seq] + local, tokens - 1)
        q_tile = q[rows].reshape(tile, kv_heads, heads // kv_heads, head_dim)
        kv = kv_pages[page_indices[seq]].reshape(-1, kv_heads, 2, head_dim)  # [keys, ...]
        scores = sm_scale * jnp.einsum(
            "qhgd,khd->hgqk",
            q_tile,
            kv[:, :, 0],
            precision=highest,
            preferred_element_type=jnp.float32,
        )
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        q_position = (kv_lens[seq] - q_lens[seq] + local)[:, None]
        k_position = jnp.arange(kv.shape[0])[None]
        seen = (k_position <= q_position) & (k_position < kv_lens[seq])
        if sliding_window is not None:
            seen &= k_position > q_position - sliding_window
        scores = jnp.where(seen, scores, MASKED)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)) * seen
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        # Unwritten pages may hold NaN; their weight is 0, so must be their value.
        values = jnp.where(
            (k_position < kv_lens[seq]).reshape(-1, 1, 1), kv[:, :, 1].astype(jnp.float32), 0.0
        )
        out = jnp.einsum("hgqk,khd->qhgd", weights, values, precision=highest)
        return out.reshape(tile, heads, head_dim).astype(q.dtype)

    out = jax.lax.map(attend, (tiles.seq, tiles.start))  # [tiles, tile, heads, head_dim]
    seq = token_sequences(cu_q_lens, tokens)
    local = jnp.arange(tokens) - cu_q_lens[seq]
    at = jnp.clip(tiles.first_tile[seq] + local // tile, 0, out.shape[0] - 1)
    real = jnp.arange(tokens) < cu_q_lens[num_seqs[0]]
    return jnp.where(real[:, None, None], out[at, local % tile], 0)


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
