"""The cases of ragged paged attention and of the KV write, their inputs, oracles and checks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import kernels
from tests.kernels.compare import (
    DTYPES,
    NUMPY_DTYPE,
    Call,
    assert_close,
    assert_same_bits,
    run,
    seeded,
)


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
    rng, dtype = seeded(case.id), NUMPY_DTYPE[case.dtype]
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
    *(AttentionCase(f"ragged-{dtype}", _RAGGED, dtype=dtype) for dtype in DTYPES),
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
    *(WriteCase(f"scattered-{dtype}", 13, dtype=dtype, skipped=0.3) for dtype in DTYPES),
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
    rng = seeded(case.id)
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
