"""The cases of add_and_norm, their inputs and check."""

from __future__ import annotations

import dataclasses

import numpy as np

from jlora import kernels
from tests.kernels.compare import NUMPY_DTYPE, Call, assert_close, run, seeded

_PLAIN = kernels.NormRule(1e-5)
_GEMMA = kernels.NormRule(1e-2, offset=1.0, in_float32=True)


@dataclasses.dataclass(frozen=True)
class NormCase:
    id: str
    tokens: int
    width: int = 128
    dtype: str = "bfloat16"
    rule: kernels.NormRule = _PLAIN
    big: bool = False


NORM_CASES = [
    NormCase("one", 1),
    NormCase("plain-float32", 7, dtype="float32"),
    NormCase("gemma-float32", 12, 72, "float32", _GEMMA),
    NormCase("gemma", 9, 576, rule=_GEMMA),
    NormCase("float16", 18, 200, "float16"),
    NormCase("wide", 3, 9000, "float32"),
    NormCase("too-wide", 2, 20000, "float32"),
    NormCase("prefill512-4k", 512, 4096, big=True),
]


def draw_norm(case: NormCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> hidden, y, weight."""
    rng, dtype = seeded(case.id), NUMPY_DTYPE[case.dtype]
    hidden, y = rng.standard_normal((2, case.tokens, case.width), np.float32)
    weight = rng.uniform(0.5, 1.5, case.width)
    return hidden.astype(dtype), y.astype(dtype), weight.astype(dtype)


def norm_call(case: NormCase, implementation, interpret=False) -> Call:
    def add_and_norm(*arrays):
        options = {"implementation": implementation, "interpret": interpret}
        return kernels.add_and_norm(*arrays, case.rule, **options)

    return Call(add_and_norm, draw_norm(case))


def check_norm(case: NormCase, implementation, interpret=False) -> None:
    hidden, y, weight = draw_norm(case)
    total, normed = map(np.asarray, run(norm_call(case, implementation, interpret)))
    assert total.dtype == normed.dtype == hidden.dtype
    assert_close(total, hidden.astype(np.float64) + y.astype(np.float64), case.dtype)
    wide = total.astype(np.float64)  # the norm is of the rounded sum
    scale = 1 / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + case.rule.eps)
    expected = wide * scale * (case.rule.offset + weight.astype(np.float64))
    assert_close(normed, expected, case.dtype)
