"""Ragged paged attention and the KV write on TPU.

Attention is the kernel that ships with JAX wherever it compiles, and `_flash` below elsewhere.
Compiled for v5e and v6e with jax 0.10.2 and 0.11.2, any number of queries a KV head (1 to 8 tried):

    head size           KV heads                          kernel
    128                 1, 2, 4, multiples of 8           JAX's (float32 with more than 4 KV heads
                                                          refuses one query head a KV head: two)
    128                 3, 5, 6, 7, 10, 12 ...            refused: padded to the next above
    64, 80, 96 ...      any                               refused: padded to 128
    256, 512            any but bfloat16 with 1           refused: `_flash`

So pages are padded to those KV heads and to multiples of 128; what is added stays in this file.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as shipped
from jaxtyping import Array, Float, Int

from jlora.kernels.attention import MASKED, query_tiles
from jlora.kernels.lora import dot_precision
from jlora.kernels.lora_tpu import in_hbm

LANES = 128
BLOCK_QUERIES, BLOCK_KEYS = 32, 512  # of JAX's kernel
FLASH_QUERY_TILE, FLASH_BLOCK_KEYS = 32, 256
VMEM_BYTES = 64 * 2**20


def kv_page_shape(
    page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[int, int, int]:
    """See `jlora.kernels.kv_page_shape`."""
    del dtype  # the same padding serves both
    heads = next((n for n in (1, 2, 4) if n >= kv_heads), -(-kv_heads // 8) * 8)
    return (page_size, 2 * heads, -(-head_dim // LANES) * LANES)


def _pad(x: Array, *sizes: int) -> Array:
    """Zeros after the last entries of the last axes, up to these sizes."""
    last = zip(x.shape[-len(sizes) :], sizes, strict=True)
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(sizes)) + [(0, to - have) for have, to in last])


def ragged_paged_attention_tpu(
    q: Float[Array, "tokens heads head_dim"],
    kv_pages: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
    kv_lens: Int[Array, " seqs"],
    page_indices: Int[Array, "seqs pages_per_seq"],
    cu_q_lens: Int[Array, " seqs_1"],
    num_seqs: Int[Array, "1"],
    *,
    kv_heads: int,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool | object = False,
) -> Float[Array, "tokens heads head_dim"]:
    """See `jlora.kernels.ragged_paged_attention`."""
    if q.dtype not in (jnp.bfloat16, jnp.float32) or kv_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"q has dtype {q.dtype} and kv_pages {kv_pages.dtype}; attention on TPU takes bfloat16 "
            "or float32, the same for both"
        )
    (tokens, heads, head_dim), (_, _, padded_2, padded_dim) = q.shape, kv_pages.shape
    padded, group = padded_2 // 2, heads // kv_heads
    padded_group = 2 if group == 1 and padded > 4 and q.dtype == jnp.float32 else group
    q = q.reshape(tokens, kv_heads, group, head_dim)
    q = _pad(q, padded, padded_group, padded_dim).reshape(tokens, -1, padded_dim)
    attend = _shipped if padded_dim == LANES else _flash
    out = attend(
        *(q, in_hbm(kv_pages, interpret), kv_lens, page_indices, cu_q_lens, num_seqs),
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    out = out[:tokens].reshape(tokens, padded, padded_group, padded_dim)
    out = out[:, :kv_heads, :group, :head_dim].reshape(tokens, heads, head_dim)
    real = jnp.arange(tokens) < cu_q_lens[num_seqs[0]]  # other rows are whatever VMEM held
    return jnp.where(real[:, None, None], out, 0)


def _shipped(q, kv_pages, *tables, interpret, **options) -> Array:
    page_size, pages_per_seq = kv_pages.shape[1], tables[1].shape[1]
    # The kernel names no precision of its own.
    precision = "highest" if q.dtype == jnp.float32 else None
    with contextlib.ExitStack() as context:
        if precision:
            context.enter_context(jax.default_matmul_precision(precision))
        if interpret:  # nor an interpret argument
            params = interpret
            context.enter_context(pltpu.force_tpu_interpret_mode(params))
        return shipped.ragged_paged_attention(
            q,
            kv_pages,
            *tables,
            **options,
            num_kv_pages_per_block=min(pages_per_seq, max(1, BLOCK_KEYS // page_size)),
            num_queries_per_block=min(BLOCK_QUERIES, q.shape[0]),
            vmem_limit_bytes=VMEM_BYTES,
        )


# ------------------------------------------------------------------ head sizes above 128


def _flash(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, interpret, **options):
    """One tile of one sequence's queries a grid step, over the pages that it can see.

    Returns [tokens + tile, ...]: a tile writes all its rows, and those past its sequence's queries
    are overwritten by the tiles that follow.
    """
    (tokens, heads, head_dim), (_, page_size, kv_heads_2, _) = q.shape, kv_pages.shape
    tile, kv_heads = min(FLASH_QUERY_TILE, tokens), kv_heads_2 // 2
    tiles = query_tiles(cu_q_lens, num_seqs, tokens, tile)
    rows = tile * heads // kv_heads
    keys = page_size * min(page_indices.shape[1], max(1, FLASH_BLOCK_KEYS // page_size))
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    return pl.pallas_call(
        functools.partial(_flash_kernel, **options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(jnp.maximum(tiles.num_tiles, 1),),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((tile, heads, head_dim), q.dtype),
                # Lanes apart: Mosaic loads every n-th row of 128 lanes only.
                pltpu.VMEM((2, head_dim // LANES, keys, kv_heads_2, LANES), kv_pages.dtype),
                pltpu.VMEM((2, kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((tile, heads, head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="paged_flash_attention",
    )(tiles.seq, tiles.start, kv_lens, page_indices, cu_q_lens, q, kv_pages)


def _flash_kernel(seqs, starts, kv_lens, page_indices, cu_q_lens, *refs, sliding_window, **options):
    q_hbm, kv_hbm, out_hbm, q_ref, kv_ref, max_sum_ref, acc_ref, sems = refs
    t = pl.program_id(0)
    seq, start = seqs[t], starts[t]
    tile, keys, page_size = q_ref.shape[0], kv_ref.shape[2], kv_hbm.shape[1]
    at = pl.ds(cu_q_lens[seq] + start, tile)
    position = kv_lens[seq] - (cu_q_lens[seq + 1] - cu_q_lens[seq]) + start  # of the first query
    end = jnp.minimum(position + tile, kv_lens[seq])  # the keys before it are seen
    first = 0 if sliding_window is None else jnp.maximum(position - sliding_window + 1, 0) // keys

    def copies(block, method):
        half = jax.lax.rem(block, 2)
        for i in range(keys // page_size):
            page = block * (keys // page_size) + i

            @pl.when(page * page_size < end)
            def _(i=i, page=page):
                for c in range(kv_ref.shape[1]):
                    source = kv_hbm.at[page_indices[seq, page], :, :, pl.ds(c * LANES, LANES)]
                    to = kv_ref.at[half, c, pl.ds(i * page_size, page_size)]
                    getattr(pltpu.make_async_copy(source, to, sems.at[half]), method)()

    def step(block, _):
        pl.when((block + 1) * keys < end)(lambda: copies(block + 1, "start"))
        copies(block, "wait")
        shape = (max_sum_ref.shape[2], keys)  # a row is a query and one of the heads that share k
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (shape[0] // tile)
        key = block * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (key <= position + query) & (key < end)
        if sliding_window is not None:
            seen &= key > position + query - sliding_window
        half = kv_ref.at[jax.lax.rem(block, 2)]
        written = block * keys + jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0) < end
        _flash_block(q_ref, half, max_sum_ref, acc_ref, seen, written, **options)
        return 0

    pl.when(first * keys < end)(lambda: copies(first, "start"))
    pltpu.sync_copy(q_hbm.at[at], q_ref)
    max_sum_ref[0] = jnp.full(max_sum_ref.shape[1:], MASKED, jnp.float32)
    max_sum_ref[1] = jnp.zeros(max_sum_ref.shape[1:], jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    jax.lax.fori_loop(first, pl.cdiv(end, keys), step, 0)
    q_ref[...] = acc_ref[...].astype(q_ref.dtype)
    pltpu.sync_copy(q_ref, out_hbm.at[at])


def _flash_block(q_ref, kv_ref, max_sum_ref, acc_ref, seen, written, sm_scale, soft_cap):
    """Adds a block of keys to every head's running maximum, sum and mean of values."""
    tile, heads, head_dim = q_ref.shape
    kv_heads = max_sum_ref.shape[1]
    group = heads // kv_heads
    precision = dot_precision(q_ref.dtype)
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        k, v = _keys_values(kv_ref, head)
        q = q_ref[:, mine].astype(jnp.float32).reshape(-1, head_dim).astype(k.dtype)
        scores = sm_scale * jax.lax.dot_general(
            *(q, k, (((1,), (1,)), ((), ()))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )  # [tile * group, keys]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen, scores, MASKED)
        old_max, old_sum = max_sum_ref[0, head], max_sum_ref[1, head]  # [tile * group, LANES]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_max[:, :1]), 0.0)
        old_sum *= jnp.exp(old_max - new_max)
        new_sum = old_sum + jnp.sum(weights, axis=1, keepdims=True)
        max_sum_ref[0, head], max_sum_ref[1, head] = new_max, new_sum
        # The mean so far, so that nothing is left to divide at the end.
        share = 1.0 / jnp.maximum(new_sum, 1e-30)[:, :1]
        add = jnp.dot(
            weights.astype(v.dtype),
            jnp.where(written, v, 0),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        old = acc_ref[:, mine].reshape(-1, head_dim) * old_sum[:, :1]
        acc_ref[:, mine] = ((old + add) * share).reshape(tile, group, head_dim)


def _keys_values(kv_ref, head: int):
    """k and v [keys, head_dim] of a head from [lane tiles, keys, 2 * kv heads, LANES]."""
    lane_tiles, keys, heads_2, _ = kv_ref.shape
    ks, vs = [], []
    for c in range(lane_tiles):
        rows = kv_ref.at[c].reshape(keys * heads_2, LANES)
        if kv_ref.dtype == jnp.float32:
            ks.append(rows[pl.ds(2 * head, keys, stride=heads_2)])
            vs.append(rows[pl.ds(2 * head + 1, keys, stride=heads_2)])
        else:  # two rows share a word, the key in its low half
            words = rows.bitcast(jnp.uint32)[pl.ds(head, keys, stride=heads_2 // 2)]
            ks.append(pltpu.bitcast(words << 16, jnp.float32).astype(kv_ref.dtype))
            vs.append(
                pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32).astype(kv_ref.dtype)
            )
    return jnp.concatenate(ks, axis=1), jnp.concatenate(vs, axis=1)


# ------------------------------------------------------------------------------ KV write


def write_kv_tpu(
    kv_pages: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    destinations: Int[Array, " tokens"],
    *,
    interpret: bool | object = False,
) -> Float[Array, "pages page_size kv_heads_2 kv_head_dim"]:
    """See `jlora.kernels.write_kv`. One copy a token, all under way at once."""
    if kv_pages.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"kv_pages has dtype {kv_pages.dtype}; the KV write on TPU takes bfloat16 and float32"
        )
    _, _, heads_2, padded_dim = kv_pages.shape
    new = jnp.stack([k, v], axis=2).astype(kv_pages.dtype)  # [tokens, kv_heads, 2, head_dim]
    new = _pad(new, heads_2 // 2, 2, padded_dim).reshape(-1, heads_2, padded_dim)
    return pl.pallas_call(
        _write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA(())],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="write_kv",
    )(destinations, new, kv_pages)


def _write_kernel(destinations, new_hbm, _, pages_hbm, sem):
    page_size = pages_hbm.shape[1]

    def each(method):
        def one(token, _):
            at = destinations[token]

            @pl.when(at >= 0)
            def _():
                to = pages_hbm.at[at // page_size, jax.lax.rem(at, page_size)]
                getattr(pltpu.make_async_copy(new_hbm.at[token], to, sem), method)()

            return 0

        jax.lax.fori_loop(0, new_hbm.shape[0], one, 0)

    each("start")
    each("wait")
