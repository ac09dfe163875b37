"""Comparing arrays with their references, for the tests of the kernels."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of ‖out - ref‖ / ‖ref‖
DTYPES = ("bfloat16", "float32", "float16")
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


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
