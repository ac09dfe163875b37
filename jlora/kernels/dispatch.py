"""Chooses the backend of each operation. The docstrings here are the operations' contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.kernels import (
    attention,
    attention_gpu,
    attention_tpu,
    expand_gpu,
    grouped,
    grouped_gpu,
    grouped_tpu,
    lora,
    lora_gpu,
    lora_tpu,
    norm_gpu,
    rope,
)
from jlora.kernels.lora import LoRADelta, LoRARouting, SlotTable
from jlora.kernels.norm import NormRule, rms_norm

Implementation = Literal["xla", "gpu", "tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "gpu", "tpu")


def default_implementation(platform: str | None = None) -> Implementation:
    """The backend for a JAX platform name (`jax.default_backend()` when None)."""
    match platform or jax.default_backend():
        case "gpu" | "cuda":
            return "gpu"
        case "tpu":
            return "tpu"
        case _:
            return "xla"


def _resolve(implementation: Implementation | None) -> Implementation:
    if implementation is None:
        return default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


def lora_routing(
    token_slots: Int[Array, " tokens"],
    grouped_slots: int | None = None,
    *,
    implementation: Implementation | None = None,
) -> LoRARouting:
    """The routing of a step for the LoRA matmuls of the same implementation.

    token_slots: int32, the adapter slot of each token, -1 for none.
    grouped_slots: the number of slots, if the tokens of each slot stand together: none of another
    slot is between them, though some without an adapter may be. It makes for fewer programs.
    """
    match _resolve(implementation):
        case "gpu":
            # Slots in any order: a tile has as many pairs as tokens at worst.
            tokens = token_slots.shape[0]
            tile = 16 if grouped_slots is None else lora_gpu.token_tile(tokens, grouped_slots)
            return lora.lora_routing(token_slots, tile, grouped_slots)
        case "tpu":
            return lora.lora_routing(token_slots, lora_tpu.TOKEN_TILE)
        case _:
            return lora.lora_routing(token_slots, 16)


def lora_shrink(
    x: Float[Array, "tokens d_in"],
    a: Float[Array, "layers blocks parts rank d_in"],
    layer: Int[Array, ""] | int,
    routing: LoRARouting,
    slots: SlotTable,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "splits tokens max_blocks parts rank"]:
    """x · Aᵀ with the blocks of each token's slot, for one layer of the pool.

    Returns float32 partial sums over d_in; their sum over `splits` is the product. Entries of
    tokens without an adapter and of blocks past the slot's count are unspecified (and unread by
    `lora_expand`). Dots accumulate in float32 and take their operands in x's dtype.
    """
    match _resolve(implementation):
        case "gpu":
            return lora_gpu.lora_shrink_gpu(x, a, layer, routing, slots, interpret=interpret)
        case "tpu":
            return lora_tpu.lora_shrink_tpu(x, a, layer, routing, slots, interpret=interpret)
        case _:
            return lora.lora_shrink_xla(x, a, layer, routing, slots)


def lora_embedding_shrink(
    tokens: Int[Array, " tokens"],
    a: Float[Array, "blocks vocab rank"],
    routing: LoRARouting,
    slots: SlotTable,
) -> Float[Array, "1 tokens max_blocks 1 rank"]:
    """The shrink of an embedding's adapter: A's rows of the token ids, where x is one-hot.

    tokens: int32 ids, at least 0 and less than vocab. h[0, t, j, 0] is row tokens[t] of block j of
    token t's slot, in float32, for `lora_expand` with any routing of these slots; 0 for tokens
    without an adapter and blocks past the slot's count. Plain XLA on every platform.
    """
    return lora.lora_embedding_shrink(tokens, a, routing, slots)


def lora_expand(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta,
    part_widths: tuple[int, ...],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "tokens d_out"]:
    """y plus scale · h · Bᵀ of each token's blocks; y of tokens without an adapter is unchanged.

    part_widths: columns of each part, in order; they sum to d_out. h is rounded to b's dtype for
    the dot, sums are float32, the result has y's dtype. y may be donated by the backend.
    """
    parts = delta.h.shape[3]
    if sum(part_widths) != y.shape[1] or len(part_widths) != parts:
        raise ValueError(
            f"part_widths {part_widths} must name {parts} parts of {y.shape[1]} columns in all"
        )
    match _resolve(implementation):
        case "gpu":
            return expand_gpu.lora_expand_gpu(y, delta, part_widths, interpret=interpret)
        case "tpu":
            return lora_tpu.lora_expand_tpu(y, delta, part_widths, interpret=interpret)
        case _:
            return lora.lora_expand_xla(y, delta, part_widths)


def gated(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta | None,
    activation: Callable[[Array], Array],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "tokens half"]:
    """activation(gate) * up, the halves of y plus the delta: one part, or one each.

    activation: elementwise. With one kernel for it all the result is rounded to y's dtype once.
    """
    half = y.shape[1] // 2
    if delta is not None:
        if _resolve(implementation) == "gpu" and expand_gpu.takes(activation):
            return expand_gpu.gated_gpu(y, delta, activation, interpret=interpret)
        widths = (half, half) if delta.h.shape[3] == 2 else (2 * half,)
        y = lora_expand(y, delta, widths, implementation=implementation, interpret=interpret)
    return activation(y[:, :half]) * y[:, half:]


def rope_and_write_kv(
    qkv: Float[Array, "tokens width"],
    delta: LoRADelta | None,
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    kv_pages: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
    destinations: Int[Array, " tokens"],
    first_page: Int[Array, ""] | int = 0,
    *,
    heads: int,
    kv_heads: int,
    in_float32: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "tokens heads head_dim"], Array]:
    """Turns queries and keys by their position (see `apply_rope`) and writes keys and values.

    qkv: the queries of all heads, then the keys, then the values; delta is added first.
    destinations: as `write_kv` takes them, counted from page first_page on.
    in_float32: the turn is not rounded to qkv's dtype on the way; a kernel for it all never does.
    -> the turned queries, and kv_pages, in place when donated.
    """
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    options: dict[str, Any] = {"implementation": implementation, "interpret": interpret}
    if _resolve(implementation) == "gpu" and head_dim == 2 * cos.shape[1]:
        arrays = (qkv, delta, cos, sin, kv_pages, destinations, first_page)
        return expand_gpu.rope_and_write_kv_gpu(*arrays, interpret=interpret)
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if delta is not None:
        part_widths = widths if delta.h.shape[3] == 3 else (sum(widths),)
        qkv = lora_expand(qkv, delta, part_widths, **options)
    parts = jnp.split(qkv, [widths[0], widths[0] + widths[1]], axis=1)
    q, k, v = (part.reshape(tokens, -1, head_dim) for part in parts)
    q, k = (rope.apply_rope(part, cos, sin, in_float32) for part in (q, k))
    first = jnp.asarray(first_page, jnp.int32) * kv_pages.shape[1]
    destinations = jnp.where(destinations < 0, -1, destinations + first)
    return q, write_kv(kv_pages, k, v, destinations, **options)


def add_and_norm(
    hidden: Float[Array, "tokens width"],
    y: Float[Array, "tokens width"],
    weight: Float[Array, " width"],
    rule: NormRule,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
    """hidden + y, and the RMS norm of that sum. hidden may be donated by the backend."""
    if _resolve(implementation) == "gpu" and y.shape[1] <= norm_gpu.MAX_WIDTH:
        return norm_gpu.add_and_norm_gpu(hidden, y, weight, rule, interpret=interpret)
    hidden = hidden + y
    return hidden, rms_norm(hidden, weight, rule)


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    w: Float[Array, "experts d_in d_out"] | Float[Array, "experts d_out d_in"],
    group_sizes: Int[Array, " experts"],
    *,
    transpose_rhs: bool = False,
    total_experts: int | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "rows d_out"]:
    """x[r] @ w[expert of row r], for rows sorted by expert.

    group_sizes: int32, the rows of each expert, zero or more; they sum to `rows` at most.
    w: in x's dtype, or in what `storage_dtype` makes of it. transpose_rhs: w is [experts, d_out,
    d_in]. A TPU wants the last axis in whole lanes of 128: else XLA copies all of w.
    total_experts: among how many the rows are spread, where w has only some of them; tiles are
    chosen by it (a TPU's are always of 128 rows), results do not depend on it.
    Sums are float32, the result has x's dtype. An expert without rows is not read, and what an
    expert or a row holds stays with its own rows: NaN and infinity do not spread to others. The
    rows past the sum of the sizes are padding: they may hold anything, and their result is 0.
    """
    total = w.shape[0] if total_experts is None else total_experts
    match _resolve(implementation):
        case "gpu":
            return grouped_gpu.grouped_matmul_gpu(
                x, w, group_sizes, total, transpose_rhs=transpose_rhs, interpret=interpret
            )
        case "tpu":
            return grouped_tpu.grouped_matmul_tpu(
                x, w, group_sizes, transpose_rhs=transpose_rhs, interpret=interpret
            )
        case _:
            return grouped.grouped_matmul_xla(x, w, group_sizes, total, transpose_rhs=transpose_rhs)


def storage_dtype(dtype: Any, *, implementation: Implementation | None = None) -> jnp.dtype:
    """How KV pages and adapter pools of a dtype are kept.

    Plain XLA keeps bfloat16 as float32, which holds the same numbers: a CPU reads a slice of a
    bfloat16 array by converting all of it (0.2 s a step for 0.3 GB of KV).
    """
    if _resolve(implementation) == "xla" and jnp.dtype(dtype) == jnp.bfloat16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def kv_page_shape(
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    *,
    implementation: Implementation | None = None,
) -> tuple[int, int, int]:
    """Shape of one KV page, (page_size, 2 x kv heads, head_dim), padded where a backend must."""
    if _resolve(implementation) == "tpu":
        return attention_tpu.kv_page_shape(page_size, kv_heads, head_dim, dtype)
    return (page_size, 2 * kv_heads, head_dim)


def ragged_paged_attention(
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
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "tokens heads head_dim"]:
    """Causal attention of each sequence's queries over its own pages.

    kv_pages holds the keys and values of the queries already (`write_kv` comes first).
    kv_lens: positions of each sequence, its queries included. cu_q_lens: where each sequence's
    queries start; from sequence num_seqs on they repeat the number of real tokens. page_indices
    of unused pages must be valid pages. kv_heads: KV heads before padding.
    sliding_window: a query sees the last `sliding_window` positions, its own included.
    soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, before the mask.
    Returns q's dtype; rows of padding tokens are unspecified but finite.
    """
    tensors: tuple[Any, ...] = (q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    options: dict[str, Any] = {
        "sm_scale": sm_scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
    }
    match _resolve(implementation):
        case "gpu":
            return attention_gpu.ragged_paged_attention_gpu(
                *tensors, **options, interpret=interpret
            )
        case "tpu":
            return attention_tpu.ragged_paged_attention_tpu(
                *tensors, kv_heads=kv_heads, **options, interpret=interpret
            )
        case _:
            return attention.ragged_paged_attention_xla(*tensors, **options)


def write_kv(
    kv_pages: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    destinations: Int[Array, " tokens"],
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "pages page_size kv_heads_2 kv_head_dim"]:
    """kv_pages with the keys and values of the tokens written, in place when donated.

    destinations: `page * page_size + offset` of each token, distinct; negative ones are not
    written.
    """
    match _resolve(implementation):
        case "gpu":
            return attention_gpu.write_kv_gpu(kv_pages, k, v, destinations, interpret=interpret)
        case "tpu":
            return attention_tpu.write_kv_tpu(kv_pages, k, v, destinations, interpret=interpret)
        case _:
            return attention.write_kv_xla(kv_pages, k, v, destinations)
