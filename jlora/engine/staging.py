"""Adapters on their way to the device, and the host memory in which they are packed for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jlora.model import place_on

_EACH = 4  # arrays of a kind, for the blocks of a large adapter: one is filled, others are sent


@dataclass
class StagedAdapter:
    """An adapter that only needs a place: blocks on the device, and arrays of its features.

    blocks: by BlockWrite.name, a, b and scales (these on the host). features: by FeatureWrite.name.
    number: by which other hosts know it.
    """

    blocks: dict[tuple, tuple[jax.Array, jax.Array, np.ndarray]] = field(default_factory=dict)
    features: dict[tuple, tuple[np.ndarray, ...]] = field(default_factory=dict)
    number: int = -1


class StagingBuffers:
    """Arrays that are filled, sent, and filled again once they have arrived.

    Memory fresh from the operating system costs more than filling it: up to 8 us a page were seen,
    160 ms for the 84 MB of an adapter.
    """

    def __init__(self) -> None:
        self._free: dict[tuple, list[np.ndarray]] = {}
        self._sent: list[tuple[jax.Array, np.ndarray]] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of whatever its last use left, to be filled and sent."""
        kind = (shape, np.dtype(dtype))
        on_its_way = [one for one in self._sent if _kind(one[1]) == kind]
        if not self._free.get(kind) and len(on_its_way) >= _EACH:
            self._arrived(*on_its_way[0])
        free = self._free.get(kind)
        return free.pop() if free else np.empty(shape, dtype)

    def send(self, array: np.ndarray, sharding: Sharding) -> jax.Array:
        """To the device. The array is not to be touched again, but by who gets it from `empty`."""
        sent = place_on(array, sharding)
        self._sent.append((sent, array))
        return sent

    def wait(self) -> None:
        """Until everything has arrived; what was sent is forgotten here."""
        while self._sent:
            self._arrived(*self._sent[0])

    def _arrived(self, sent: jax.Array, array: np.ndarray) -> None:
        self._sent = [other for other in self._sent if other[0] is not sent]
        sent.block_until_ready()
        if any(device.platform == "cpu" for device in sent.devices()):
            return  # the device's array may be this very memory
        free = self._free.setdefault(_kind(array), [])
        if len(free) < _EACH:
            free.append(array)


def _kind(array: np.ndarray) -> tuple:
    return array.shape, array.dtype
