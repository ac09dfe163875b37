"""The cases that the tests of every kernel backend share, with float64 oracles in numpy.

A case is a few numbers; `draw_lora` and `draw_attention` make its inputs from a seed of its own
(its id), and the `check_*` functions run one operation of `jlora.kernels` and compare. What the
contracts call unspecified or unread is poisoned: with NaN where nothing may be read, with large
finite numbers where a backend may multiply it by zero.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import kernels

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of ‖out - ref‖ / ‖ref‖
NUMPY_DTYPE = {name: np.dtype(jnp.dtype(name)) for name in TOLERANCE}


def assert_close(out, ref: np.ndarray, dtype: str) -> None:
    """Relative error of the whole, and no single entry far off."""
    out = np.asarray(out).astype(np.float64)
    assert out.shape == ref.shape
    assert np.isfinite(out).all(), f"{np.count_nonzero(~np.isfinite(out))} entries are not finite"
    if ref.size == 0:
        return
    error, tolerance = np.abs(out - ref), TOLERANCE[dtype]
    relative = np.linalg.norm(error) / max(np.linalg.norm(ref), 1e-30)
    assert relative < tolerance, f"relative error {relative:.2e}, tolerance {tolerance:.0e}"
    worst = error.max() / max(np.abs(ref).max(), 1e-30)
    assert worst < 4 * tolerance, f"worst entry is off by {worst:.2e} of the largest"


def assert_same_bits(out, ref) -> None:
    out, ref = np.ascontiguousarray(out), np.ascontiguousarray(ref)
    assert out.dtype == ref.dtype and out.shape == ref.shape
    np.testing.assert_array_equal(out.view(np.uint8), ref.view(np.uint8))


class Call(NamedTuple):
    """A function of arrays, for `jax.jit`, and its arguments."""

    function: Callable[..., jax.Array]
    arguments: tuple


def run(call: Call) -> jax.Array:
    return jax.jit(call.function)(*call.arguments)


def _seed(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# ----------------------------------------------------------------------------- LoRA


@dataclasses.dataclass(frozen=True)
class LoRACase:
    """One step's tokens and one projection's adapters.

    ranks: rank of each slot's adapter, 0 where it does not touch this projection.
    order: "sorted" or "shuffled" tokens, or "distinct" (token t has slot t).
    without: share of the tokens without an adapter.
    """

    id: str
    tokens: int
    ranks: tuple[int, ...]
    d_in: int = 128
    part_widths: tuple[int, ...] = (128,)
    dtype: str = "bfloat16"
    order: str = "shuffled"
    without: float = 0.0
    block_rank: int = 16
    layers: int = 1
    layer: int = 0
    traced_layer: bool = False
    splits: int = 2  # of the h given to expand
    big: bool = False


class LoRAInputs(NamedTuple):
    """Numpy arrays of a case, in the case's dtype."""

    token_slots: np.ndarray  # [tokens]
    slots: dict[str, np.ndarray]  # the fields of a SlotTable
    x: np.ndarray  # [tokens, d_in]
    a: np.ndarray  # [layers, blocks, parts, block_rank, d_in]
    y: np.ndarray  # [tokens, d_out]
    h: np.ndarray  # float32 [splits, tokens, max_blocks, parts, block_rank], NaN where unspecified
    b: np.ndarray  # [layers, blocks, block_rank, d_out]


def draw_lora(case: LoRACase) -> LoRAInputs:
    rng, dtype = _seed(case.id), NUMPY_DTYPE[case.dtype]
    slots, used_ranks = _draw_slots(rng, case)
    token_slots = _draw_token_slots(rng, case)
    blocks, parts, d_out = used_ranks.shape[0], len(case.part_widths), sum(case.part_widths)

    def pool(shape, scale):  # rows past a block's rank are zero, unused blocks hold garbage
        values = rng.standard_normal(shape, np.float32) * np.float32(scale)
        return values

    a = pool((case.layers, blocks, parts, case.block_rank, case.d_in), case.d_in**-0.5)
    b = pool((case.layers, blocks, case.block_rank, d_out), 0.25)
    row = np.arange(case.block_rank)
    empty = (row >= used_ranks[:, None]) & (used_ranks[:, None] >= 0)  # [blocks, block_rank]
    a[np.broadcast_to(empty[None, :, None], a.shape[:4])] = 0
    b[np.broadcast_to(empty[None], b.shape[:3])] = 0
    a[:, used_ranks < 0] *= 100
    b[:, used_ranks < 0] *= 100

    max_blocks = slots["blocks"].shape[1]
    h_shape = (case.splits, case.tokens, max_blocks, parts, case.block_rank)
    h = rng.standard_normal(h_shape, np.float32)
    h[:, ~used_blocks(token_slots, slots)] = np.nan
    x = rng.standard_normal((case.tokens, case.d_in), np.float32)
    y = rng.standard_normal((case.tokens, d_out), np.float32)
    return LoRAInputs(
        token_slots, slots, x.astype(dtype), a.astype(dtype), y.astype(dtype), h, b.astype(dtype)
    )


def _draw_slots(rng, case: LoRACase):
    """-> the slot table, and the rank used of each block of the pool (-1: no slot holds it)."""
    counts = np.array([-(-rank // case.block_rank) for rank in case.ranks], np.int32)
    max_blocks = int(counts.max(initial=0)) + 1
    pool = int(counts.sum()) + 3
    free = list(rng.permutation(pool))  # so that the blocks of a slot are scattered
    blocks = rng.integers(0, pool, (len(counts), max_blocks)).astype(np.int32)
    used = np.full(pool, -1)
    for slot, rank in enumerate(case.ranks):
        for j in range(counts[slot]):
            blocks[slot, j] = free.pop()
            used[blocks[slot, j]] = min(rank - j * case.block_rank, case.block_rank)
    scales = rng.uniform(0.25, 2.0, blocks.shape).astype(np.float32)
    return {"blocks": blocks, "counts": counts, "scales": scales}, used


def _draw_token_slots(rng, case: LoRACase) -> np.ndarray:
    if case.order == "distinct":
        token_slots = np.arange(case.tokens) % len(case.ranks)
    else:
        token_slots = rng.integers(0, len(case.ranks), case.tokens)
    bare = rng.permutation(case.tokens)[: round(case.without * case.tokens)]
    token_slots[bare] = kernels.NO_ADAPTER
    if case.order == "sorted":  # tokens without an adapter come last
        token_slots = token_slots[np.lexsort((token_slots, token_slots < 0))]
    return token_slots.astype(np.int32)


def used_blocks(token_slots: np.ndarray, slots: dict[str, np.ndarray]) -> np.ndarray:
    """[tokens, max_blocks]: which entries of h are specified."""
    rows = np.maximum(token_slots, 0)
    column = np.arange(slots["blocks"].shape[1])
    return (column < slots["counts"][rows][:, None]) & (token_slots >= 0)[:, None]


def _slot_blocks(case: LoRACase, inputs: LoRAInputs):
    """Yields (tokens of a slot, j, block, scale) for every block in use by some token."""
    for slot in np.unique(inputs.token_slots[inputs.token_slots >= 0]):
        at = np.flatnonzero(inputs.token_slots == slot)
        for j in range(inputs.slots["counts"][slot]):
            yield at, j, inputs.slots["blocks"][slot, j], float(inputs.slots["scales"][slot, j])


def shrink_oracle(case: LoRACase, inputs: LoRAInputs) -> np.ndarray:
    """h [tokens, max_blocks, parts, block_rank] in float64, zero where unspecified."""
    h = np.zeros(inputs.h.shape[1:])
    x, a = inputs.x.astype(np.float64), inputs.a[case.layer].astype(np.float64)
    for at, j, block, _ in _slot_blocks(case, inputs):
        h[at, j] = np.einsum("td,prd->tpr", x[at], a[block], optimize=True)
    return h


def expand_oracle(case: LoRACase, inputs: LoRAInputs, h: np.ndarray) -> np.ndarray:
    """y plus the delta, in float64, from h [tokens, max_blocks, parts, block_rank]."""
    y = inputs.y.astype(np.float64)
    ends = np.cumsum(case.part_widths)
    b = inputs.b[case.layer].astype(np.float64)
    for at, j, block, scale in _slot_blocks(case, inputs):
        for part, (end, width) in enumerate(zip(ends, case.part_widths, strict=True)):
            y[at, end - width : end] += scale * h[at, j, part] @ b[block, :, end - width : end]
    return y


def lora_call(case: LoRACase, inputs: LoRAInputs, function, *arrays) -> Call:
    """`function(layer, token_slots, slots, *arrays)`; the layer is traced if the case says so."""
    slots = kernels.SlotTable(**{name: jnp.asarray(v) for name, v in inputs.slots.items()})
    arguments = (inputs.token_slots, slots, *arrays)
    if case.traced_layer:
        return Call(function, (np.int32(case.layer), *arguments))
    return Call(lambda *arguments: function(case.layer, *arguments), arguments)


def shrink_call(case: LoRACase, inputs: LoRAInputs, implementation, interpret=False) -> Call:
    def shrink(layer, token_slots, slots, x, a):
        routing = kernels.lora_routing(token_slots, implementation=implementation)
        return kernels.lora_shrink(
            x, a, layer, routing, slots, implementation=implementation, interpret=interpret
        )

    return lora_call(case, inputs, shrink, inputs.x, inputs.a)


def expand_call(case: LoRACase, inputs: LoRAInputs, h, implementation, interpret=False) -> Call:
    def expand(layer, token_slots, slots, y, h, b):
        routing = kernels.lora_routing(token_slots, implementation=implementation)
        return kernels.lora_expand(
            y,
            h,
            b,
            layer,
            routing,
            slots,
            case.part_widths,
            implementation=implementation,
            interpret=interpret,
        )

    return lora_call(case, inputs, expand, inputs.y, h, inputs.b)


def check_shrink(case: LoRACase, implementation, interpret=False) -> None:
    inputs = draw_lora(case)
    out = np.asarray(run(shrink_call(case, inputs, implementation, interpret)))
    assert out.dtype == np.float32 and out.shape[1:] == inputs.h.shape[1:]
    used = used_blocks(inputs.token_slots, inputs.slots)
    out = out.astype(np.float64)[:, used].sum(axis=0)  # [entries, parts, block_rank]
    # Operands are exact in every dtype and products are summed in float32, but a backend may
    # round to bfloat16 in between on its way, so the tolerance is the dtype's.
    assert_close(out, shrink_oracle(case, inputs)[used], case.dtype)


def check_expand(case: LoRACase, implementation, interpret=False) -> None:
    inputs = draw_lora(case)
    out = np.asarray(run(expand_call(case, inputs, inputs.h, implementation, interpret)))
    _check_expanded(case, inputs, out, np.nan_to_num(inputs.h.astype(np.float64).sum(axis=0)))


def check_shrink_expand(case: LoRACase, implementation, interpret=False) -> None:
    """The two together, with whatever shrink leaves in the entries that it does not specify."""
    inputs = draw_lora(case)
    h = run(shrink_call(case, inputs, implementation, interpret))
    out = np.asarray(run(expand_call(case, inputs, h, implementation, interpret)))
    _check_expanded(case, inputs, out, shrink_oracle(case, inputs))


def _check_expanded(case: LoRACase, inputs: LoRAInputs, out: np.ndarray, h: np.ndarray) -> None:
    assert out.dtype == inputs.y.dtype
    bare = inputs.token_slots < 0
    assert_same_bits(out[bare], inputs.y[bare])
    assert_close(out[~bare], expand_oracle(case, inputs, h)[~bare], case.dtype)


_QKV, _MIXED_RANKS = (576, 192, 192), (8, 16, 64, 1, 32)
_DTYPES = ("bfloat16", "float32", "float16")

LORA_CASES = [
    LoRACase("none", 24, (16, 8), without=1.0),
    LoRACase("one-token", 1, (16,), dtype="float32"),
    LoRACase("one-token-none", 1, (16,), without=1.0),
    *(
        LoRACase(f"{tokens}-tokens", tokens, (16, 32, 8), 72, (72,), _DTYPES[tokens % 3])
        for tokens in (2, 7, 15, 16, 17, 31, 64)
    ),
    *(
        LoRACase(f"rank{rank}", 5, (rank, 8), 72, (72,), _DTYPES[rank % 3], splits=1)
        for rank in (1, 2, 8, 15, 16, 17, 64, 100, 256)
    ),
    *(
        LoRACase(f"mixed-{order}-{dtype}", 40, _MIXED_RANKS, 1000, (72,), dtype, order, 0.2)
        for order in ("sorted", "shuffled")
        for dtype in _DTYPES
    ),
    LoRACase("one-adapter", 20, (0, 24, 0), 576, (576,), order="sorted"),
    LoRACase("half-without", 20, (16, 48), 72, (1000,), "float32", without=0.5),
    LoRACase("absent-here", 12, (0, 16, 0, 0, 40), 72, (72,), without=0.25),
    LoRACase("only-absent", 6, (0, 0), 72, (72,)),
    LoRACase("distinct-qkv", 16, tuple(range(1, 49, 3)), 576, _QKV, order="distinct"),
    LoRACase("distinct-qkv-f32", 9, (4, 8, 16, 17, 33), 576, _QKV, "float32", "distinct"),
    LoRACase("gate-up", 33, _MIXED_RANKS, 576, (1536, 1536), order="sorted"),
    LoRACase("down", 9, _MIXED_RANKS, 1536, (576,), "float16", "sorted", splits=3),
    LoRACase("parts-uneven", 18, (16, 64), 72, (72, 1000, 8), "float32", without=0.1),
    LoRACase("layer-int", 6, (16, 20), layers=3, layer=2),
    LoRACase("layer-traced", 6, (16, 20), layers=3, layer=1, traced_layer=True),
    LoRACase("layer-traced-qkv", 17, (8, 40), 576, _QKV, layers=2, layer=1, traced_layer=True),
    LoRACase("many-slots", 24, (16,) * 128, 72, (72,), without=0.1),
    LoRACase("all-slots", 128, (8, 16) * 64, 128, (128,), order="distinct", big=True),
    LoRACase("block8", 10, (4, 8, 20), 72, (72,), block_rank=8),
    LoRACase("block32", 10, (4, 32, 80), 72, (72,), block_rank=32),
    LoRACase("decode32-4k", 32, (16,) * 32, 4096, (4096, 1024, 1024), order="distinct", big=True),
    LoRACase("decode-8k-f32", 8, (16, 64), 8192, (2048,), "float32", "sorted", big=True),
    LoRACase("prefill512", 512, _MIXED_RANKS, 1536, (1536,), order="sorted", big=True),
    LoRACase("prefill512-shuffled", 512, _MIXED_RANKS, 576, _QKV, "float16", big=True),
    LoRACase(
        "512-tokens-128-slots",
        512,
        (*(1 + 37 * slot % 128 for slot in range(127)), 256),
        576,
        (1000,),
        without=0.1,
        layers=2,
        layer=1,
        big=True,
    ),
]


# ------------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One step over paged keys and values; seqs holds (queries, positions) of each sequence."""

    id: str
    seqs: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    padding_seqs: int = 0
    padding_tokens: int = 0
    spare_pages: int = 0  # entries of page_indices that no sequence fills
    big: bool = False


class AttentionInputs(NamedTuple):
    """Numpy arrays of a case; q and kv_pages in the case's dtype, unwritten positions NaN."""

    q: np.ndarray  # [tokens, heads, head_dim]
    kv_pages: np.ndarray  # [pages, page_size, 2 * kv_heads, head_dim]
    kv_lens: np.ndarray  # [seqs]
    page_indices: np.ndarray  # [seqs, pages_per_seq]
    cu_q_lens: np.ndarray  # [seqs + 1]
    num_seqs: np.ndarray  # [1]


def draw_attention(case: AttentionCase) -> AttentionInputs:
    rng, dtype = _seed(case.id), NUMPY_DTYPE[case.dtype]
    q_lens = [q for q, _ in case.seqs] + [0] * case.padding_seqs
    kv_lens = np.array([kv for _, kv in case.seqs] + [0] * case.padding_seqs, np.int32)
    tokens = sum(q_lens) + case.padding_tokens
    num_pages = -(-kv_lens // case.page_size)
    pages = int(num_pages.sum()) + 2
    free = list(rng.permutation(pages))
    unused = free.pop()  # full of NaN
    per_seq = int(num_pages.max()) + case.spare_pages
    page_indices = np.full((len(kv_lens), per_seq), unused, np.int32)
    kv_pages = np.full((pages, case.page_size, 2 * case.kv_heads, case.head_dim), np.nan, dtype)
    for seq, length in enumerate(kv_lens):
        for i in range(num_pages[seq]):
            page_indices[seq, i] = free.pop()
            filled = min(case.page_size, length - i * case.page_size)
            values = rng.standard_normal((filled, *kv_pages.shape[2:]), np.float32)
            kv_pages[page_indices[seq, i], :filled] = values.astype(dtype)
    q = rng.standard_normal((tokens, case.heads, case.head_dim), np.float32).astype(dtype)
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    num_seqs = np.array([len(case.seqs)], np.int32)
    return AttentionInputs(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)


def attention_oracle(case: AttentionCase, inputs: AttentionInputs) -> np.ndarray:
    """Dense attention a sequence in float64: [real tokens, heads, head_dim]."""
    outs = []
    for seq, (q_len, kv_len) in enumerate(case.seqs):
        pages = inputs.page_indices[seq, : -(-kv_len // case.page_size)]
        kv = inputs.kv_pages[pages].reshape(-1, case.kv_heads, 2, case.head_dim)[:kv_len]
        kv = np.repeat(kv.astype(np.float64), case.heads // case.kv_heads, axis=1)
        start = inputs.cu_q_lens[seq]
        q = inputs.q[start : start + q_len].astype(np.float64)
        scores = np.einsum("qhd,khd->hqk", q, kv[:, :, 0], optimize=True) * case.head_dim**-0.5
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        q_position = np.arange(kv_len - q_len, kv_len)[:, None]
        k_position = np.arange(kv_len)[None]
        seen = k_position <= q_position
        if case.sliding_window is not None:
            seen &= k_position > q_position - case.sliding_window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        outs.append(np.einsum("hqk,khd->qhd", weights, kv[:, :, 1], optimize=True))
    return np.concatenate(outs)


def padded_pages(case: AttentionCase, pages: np.ndarray, implementation) -> np.ndarray:
    """pages in the shape that the backend keeps them in; what it adds is zero."""
    shape = kernels.kv_page_shape(
        case.page_size,
        case.kv_heads,
        case.head_dim,
        jnp.dtype(case.dtype),
        implementation=implementation,
    )
    widths = [(0, to - have) for have, to in zip(pages.shape[1:], shape, strict=True)]
    return np.pad(pages, [(0, 0), *widths])


def attention_call(
    case: AttentionCase, inputs: AttentionInputs, implementation, interpret=False
) -> Call:
    def attend(*arrays):
        return kernels.ragged_paged_attention(
            *arrays,
            kv_heads=case.kv_heads,
            sm_scale=case.head_dim**-0.5,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            implementation=implementation,
            interpret=interpret,
        )

    pages = padded_pages(case, inputs.kv_pages, implementation)
    return Call(attend, tuple(inputs._replace(kv_pages=pages)))


def check_attention(case: AttentionCase, implementation, interpret=False) -> None:
    inputs = draw_attention(case)
    out = np.asarray(run(attention_call(case, inputs, implementation, interpret)))
    assert out.dtype == inputs.q.dtype and out.shape == inputs.q.shape
    assert np.isfinite(out.astype(np.float32)).all()
    real = sum(q_len for q_len, _ in case.seqs)
    assert_close(out[:real], attention_oracle(case, inputs), case.dtype)


_RAGGED = ((1, 37), (5, 5), (1, 1), (17, 40), (1, 16), (3, 33))
_DECODE = ((1, 20), (1, 1), (1, 33), (1, 64))

ATTENTION_CASES = [
    AttentionCase("decode-one", ((1, 50),), dtype="float32"),
    AttentionCase("decode-first", ((1, 1),)),
    AttentionCase("prefill", ((24, 24),), dtype="float32"),
    AttentionCase("chunk", ((9, 70),), page_size=32),
    *(AttentionCase(f"ragged-{dtype}", _RAGGED, dtype=dtype) for dtype in _DTYPES),
    AttentionCase("ragged-page32", _RAGGED, page_size=32, dtype="float32"),
    AttentionCase("padding", _RAGGED, padding_seqs=3, padding_tokens=4, spare_pages=3),
    AttentionCase("decode-padding", _DECODE, padding_seqs=4, padding_tokens=4, dtype="float32"),
    AttentionCase("padding-tokens", _DECODE, padding_tokens=12, spare_pages=5),
    AttentionCase("page-full", ((1, 32), (16, 32), (1, 17)), dtype="float16"),
    *(
        AttentionCase(f"head-dim{head_dim}", _RAGGED[:4], 2, 1, head_dim)
        for head_dim in (80, 96, 128, 256)
    ),
    AttentionCase("head-dim80-f32", _RAGGED[:4], 4, 2, 80, dtype="float32"),
    AttentionCase("head-dim256-f32", _RAGGED[:2], 4, 4, 256, dtype="float32"),
    AttentionCase("head-dim256-kv8", _DECODE, 16, 8, 256, soft_cap=50.0),
    *(
        AttentionCase(f"kv{kv}-group{heads // kv}-{dtype}", _RAGGED[2:5], heads, kv, dtype=dtype)
        for heads, kv, dtype in (
            (1, 1, "float32"),
            (8, 1, "bfloat16"),
            (10, 2, "bfloat16"),
            (9, 3, "bfloat16"),
            (9, 3, "float32"),
            (28, 4, "float16"),
            (30, 5, "bfloat16"),
            (6, 6, "bfloat16"),
            (32, 8, "bfloat16"),
            (40, 10, "bfloat16"),
            (12, 12, "float16"),
        )
    ),
    AttentionCase("smollm-decode", _DECODE, 9, 3, padding_seqs=4, padding_tokens=4),
    AttentionCase("phi-decode", _DECODE, 40, 10, 128),
    *(
        AttentionCase(f"window{window}", _RAGGED, sliding_window=window, dtype="float32")
        for window in (1, 4, 16, 100)
    ),
    AttentionCase("window-long", ((1, 200), (7, 150), (1, 3)), sliding_window=40),
    AttentionCase("soft-cap", _RAGGED, soft_cap=5.0, dtype="float32"),
    AttentionCase("soft-cap-window", _RAGGED, 8, 4, 128, sliding_window=12, soft_cap=30.0),
    AttentionCase("long-decode", ((1, 1000), (1, 3)), 8, 2, 128, spare_pages=20),
    AttentionCase("decode64", tuple((1, 1 + 7 * i % 300) for i in range(64)), 8, 2, big=True),
    AttentionCase(
        "decode256",
        tuple((1, 1 + 11 * i % 100) for i in range(256)),
        9,
        3,
        padding_seqs=16,
        padding_tokens=16,
        big=True,
    ),
    AttentionCase("prefill512", ((512, 512),), 32, 8, 128, big=True),
    AttentionCase(
        "mixed512",
        ((200, 900), (1, 2000), (150, 150), (1, 5), (100, 164), (1, 1)),
        9,
        3,
        padding_seqs=10,
        padding_tokens=59,
        big=True,
    ),
    AttentionCase(
        "mixed512-window-cap",
        ((200, 900), (1, 2000), (150, 150), (1, 5)),
        8,
        4,
        256,
        page_size=32,
        sliding_window=128,
        soft_cap=50.0,
        padding_tokens=160,
        big=True,
    ),
    AttentionCase("decode-long", ((1, 8000), (1, 4001)), 32, 8, 128, spare_pages=12, big=True),
]


# ------------------------------------------------------------------------- KV write


@dataclasses.dataclass(frozen=True)
class WriteCase:
    id: str
    tokens: int
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    pages: int = 6
    dtype: str = "bfloat16"
    new_dtype: str | None = None  # of k and v; None: that of the pages
    skipped: float = 0.0  # share of the destinations that are negative
    big: bool = False


WRITE_CASES = [
    WriteCase("one", 1),
    WriteCase("one-skipped", 1, skipped=1.0),
    *(WriteCase(f"scattered-{dtype}", 13, dtype=dtype, skipped=0.3) for dtype in _DTYPES),
    WriteCase("all-skipped", 8, skipped=1.0, dtype="float32"),
    WriteCase("page32", 17, page_size=32, pages=3),
    WriteCase("every-position", 96, skipped=0.0),
    WriteCase("cast", 9, new_dtype="float32", skipped=0.2),
    *(WriteCase(f"kv{kv}", 9, kv, skipped=0.2) for kv in (1, 3, 5, 6, 8, 10, 12)),
    *(WriteCase(f"head-dim{d}", 9, 2, d, skipped=0.2) for d in (80, 96, 128, 256)),
    WriteCase("prefill512", 512, 8, 128, pages=64, skipped=0.1, big=True),
]


def draw_write(case: WriteCase, implementation):
    """-> kv_pages in the backend's shape, k, v, destinations."""
    rng = _seed(case.id)
    shape = kernels.kv_page_shape(
        case.page_size,
        case.kv_heads,
        case.head_dim,
        jnp.dtype(case.dtype),
        implementation=implementation,
    )
    pages = rng.standard_normal((case.pages, *shape), np.float32).astype(NUMPY_DTYPE[case.dtype])
    pages[rng.integers(case.pages)] = np.nan  # kept or overwritten like any other
    new = rng.standard_normal((2, case.tokens, case.kv_heads, case.head_dim), np.float32)
    k, v = new.astype(NUMPY_DTYPE[case.new_dtype or case.dtype])
    at = rng.permutation(case.pages * case.page_size)[: case.tokens].astype(np.int32)
    at[rng.permutation(case.tokens)[: round(case.skipped * case.tokens)]] = -1
    return pages, k, v, at


def write_call(case: WriteCase, implementation, interpret=False) -> Call:
    def write(*arrays):
        return kernels.write_kv(*arrays, implementation=implementation, interpret=interpret)

    return Call(write, draw_write(case, implementation))


def check_write_kv(case: WriteCase, implementation, interpret=False) -> None:
    call = write_call(case, implementation, interpret)
    (pages, k, v, at), out = call.arguments, np.asarray(run(call))
    assert out.shape == pages.shape and out.dtype == pages.dtype
    out, pages = (p.reshape(-1, *p.shape[2:]) for p in (out, pages))
    written = at[at >= 0]
    kept = np.setdiff1d(np.arange(len(out)), written)
    assert_same_bits(out[kept], pages[kept])
    new = out[written][:, : 2 * case.kv_heads, : case.head_dim]
    assert_same_bits(new[:, 0::2], k[at >= 0].astype(pages.dtype))
    assert_same_bits(new[:, 1::2], v[at >= 0].astype(pages.dtype))
