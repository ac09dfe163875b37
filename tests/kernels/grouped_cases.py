"""The cases of grouped_matmul, their inputs, oracle and check."""

from __future__ import annotations

import dataclasses

import numpy as np

from jlora import kernels
from tests.kernels.compare import DTYPES, NUMPY_DTYPE, Call, assert_close, run, seeded


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """sizes: rows of each expert. padding: rows past the last group's, NaN in the inputs.

    total: experts among which the rows are spread, when these are some of them.
    """

    id: str
    sizes: tuple[int, ...]
    d_in: int = 128
    d_out: int = 128
    dtype: str = "bfloat16"
    padding: int = 0
    transpose_rhs: bool = False
    total: int | None = None


def draw_grouped(case: GroupedCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> x [rows, d_in], w [experts, d_in, d_out] (NaN where no row goes), group_sizes.

    w is [experts, d_out, d_in] with transpose_rhs.
    """
    rng, sizes = seeded(case.id), np.array(case.sizes, np.int32)
    x = rng.standard_normal((sizes.sum() + case.padding, case.d_in), np.float32)
    w = rng.standard_normal((len(sizes), case.d_in, case.d_out), np.float32) * case.d_in**-0.5
    x[sizes.sum() :] = np.nan
    w[sizes == 0] = np.nan
    w = np.ascontiguousarray(np.swapaxes(w, 1, 2)) if case.transpose_rhs else w
    return x.astype(NUMPY_DTYPE[case.dtype]), w.astype(NUMPY_DTYPE[case.dtype]), sizes


def grouped_oracle(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """In float64; zero past the last group."""
    out, start = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        if size:
            out[rows] = x[rows].astype(np.float64) @ w[expert].astype(np.float64)
        start += size
    return out


def grouped_call(case: GroupedCase, implementation, interpret=False) -> Call:
    def multiply(x, w, group_sizes):
        return kernels.grouped_matmul(
            x,
            w,
            group_sizes,
            transpose_rhs=case.transpose_rhs,
            total_experts=case.total,
            implementation=implementation,
            interpret=interpret,
        )

    return Call(multiply, draw_grouped(case))


def check_grouped(case: GroupedCase, implementation, interpret=False) -> None:
    call = grouped_call(case, implementation, interpret)
    out, (x, w, sizes) = np.asarray(run(call)), call.arguments
    assert out.dtype == x.dtype
    assert not out[sizes.sum() :].any()
    w = np.swapaxes(w, 1, 2) if case.transpose_rhs else w
    assert_close(out, grouped_oracle(x, w, sizes), case.dtype)


def drawn_sizes(rows: int, experts: int, skew: float = 0.0) -> tuple[int, ...]:
    """Rows that choose among the experts; with skew the first ones are chosen more often."""
    weights = np.arange(1, experts + 1) ** -skew
    return tuple(seeded(f"{rows}-{experts}").multinomial(rows, weights / weights.sum()).tolist())


GROUPED_CASES = [
    GroupedCase("one-row", (0, 1, 0)),
    GroupedCase("one-expert", (24,), dtype="float32"),
    *(GroupedCase(f"mixed-{dtype}", (5, 0, 17, 1, 16, 9), dtype=dtype) for dtype in DTYPES),
    GroupedCase("all-in-first", (40, 0, 0, 0)),
    GroupedCase("all-in-last", (0, 0, 0, 37), dtype="float32"),
    GroupedCase("empty-ends", (0, 0, 12, 0, 21, 0), 72, 200, "float32"),
    GroupedCase("whole-tiles", (16, 32, 16, 64), 128, 256),
    GroupedCase("boundaries-in-a-tile", (1, 2, 3, 1, 2, 1, 4, 1), 256, 128, "float32"),
    GroupedCase("padding", (3, 0, 14, 6), padding=9),
    GroupedCase("padding-f32", (20, 0, 1), 72, 72, "float32", padding=100),
    GroupedCase("only-padding", (0, 0, 0), padding=20),
    GroupedCase("nothing-divides", (7, 30, 0, 11), 600, 328, "float32", padding=3),
    GroupedCase("many-tiles", (100, 3, 0, 150, 47), 640, 384, padding=20),
    GroupedCase("decode-64-experts", drawn_sizes(96, 64), 256, 384),
    GroupedCase("prefill-8-experts", drawn_sizes(700, 8), 256, 640, "float16", padding=11),
    GroupedCase("skewed", drawn_sizes(512, 32, 1.5), 384, 256, padding=64),
    GroupedCase("decode-128-experts", drawn_sizes(256, 128), 128, 192),
    GroupedCase("transposed", (5, 0, 17, 1, 16, 9), 256, 96, padding=3, transpose_rhs=True),
    GroupedCase("transposed-f32", (7, 30, 0, 11), 600, 328, "float32", transpose_rhs=True),
    GroupedCase("transposed-experts", drawn_sizes(256, 128), 256, 192, transpose_rhs=True),
    GroupedCase("some-of-many", drawn_sizes(60, 8), 256, 384, padding=196, total=64),
    GroupedCase("mixtral-slice", drawn_sizes(512, 8), 1792, 512, "float32"),
]
