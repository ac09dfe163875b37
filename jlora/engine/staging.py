"""Adapters on their way to the device, and the host memory in which they are packed for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

# Bytes that are sent at once, and how many such pieces may be on their way: what a step sends waits
# until they have arrived, 1 ms or so. The 84 MB of an adapter would keep it for ten.
_PIECE, _ON_THE_WAY = 1 << 22, 2

Pieces = tuple[jax.Array, ...]  # one array, parted along its first axis


@dataclass
class StagedAdapter:
    """An adapter that only needs a place: blocks on the device, and arrays of its features.

    blocks: by BlockWrite.name, a, b and scales. features: by FeatureWrite.name.
    """

    blocks: dict[tuple, tuple[Pieces, Pieces, jax.Array]] = field(default_factory=dict)
    features: dict[tuple, tuple[np.ndarray, ...]] = field(default_factory=dict)


class Transfers:
    """Sends arrays in pieces, few at a time whichever threads send."""

    def __init__(self) -> None:
        self._room = threading.Semaphore(_ON_THE_WAY)

    def send(self, array: np.ndarray, sharding: Sharding) -> Pieces:
        """To the device; returns when everything is there."""
        count = min(-(-array.nbytes // _PIECE), len(array))
        return tuple(self._send(piece, sharding) for piece in np.array_split(array, max(count, 1)))

    def _send(self, piece: np.ndarray, sharding: Sharding) -> jax.Array:
        with self._room:
            return jax.device_put(piece, sharding).block_until_ready()


class StagingBuffers:
    """Arrays that one thread fills and sends, and fills again.

    Memory fresh from the operating system costs more than filling it: up to 8 us a page were seen,
    160 ms for the 84 MB of an adapter.
    """

    def __init__(self) -> None:
        # The CPU's arrays may be the very memory that they were made from.
        self._again = jax.default_backend() != "cpu"
        self._arrays: dict[tuple, np.ndarray] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of whatever its last use left: what was sent of that shape is gone."""
        if not self._again:
            return np.empty(shape, dtype)
        kind = (shape, np.dtype(dtype))
        if kind not in self._arrays:
            self._arrays[kind] = np.empty(shape, dtype)
        return self._arrays[kind]
