"""Adapters on their way to the device, and the host memory in which they are packed for it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jlora.model import place_on
from jlora.projections import Projection

_PINNED = "pinned_host"
# Arrays of a kind, for the blocks of a large adapter: one is filled, others are sent. From pinned
# memory they are sent faster than they are filled.
_EACH, _EACH_PINNED = 4, 2


StagedBlock = tuple[jax.Array, jax.Array, np.ndarray]  # a and b on the devices, and scales


class PlacedBlock(NamedTuple):
    """A StagedBlock, and where it is to go; block is counted without experts."""

    row: Projection
    layer: int
    block: int
    a: jax.Array
    b: jax.Array
    scales: np.ndarray


@dataclass
class StagedAdapter:
    """An adapter that only needs a place: blocks on the device, and arrays of its features.

    blocks: by BlockWrite.name. features: by FeatureWrite.name. number: for other hosts.
    """

    blocks: dict[tuple, StagedBlock] = field(default_factory=dict)
    features: dict[tuple, tuple[np.ndarray, ...]] = field(default_factory=dict)
    number: int = -1


class Landings:
    """Memory of the device for what arrives there, which stays where it is between two arrivals.

    Were it given back, the memory of a step would be now here, now there, see StepArrays.
    """

    def __init__(self, device: jax.Device) -> None:
        self._device, self._limit = device, 0
        self._kept: dict[tuple, list[jax.Array]] = {}

    def reserve(self, places: Mapping[tuple[int, ...], int], dtype: Any) -> None:
        """Takes memory for so many arrays of each shape; more than that is never kept."""
        self._limit = 0
        for shape, count in places.items():
            kept = self._kept.setdefault((shape, np.dtype(dtype)), [])
            kept += [jnp.zeros(shape, dtype, device=self._device) for _ in range(count - len(kept))]
            self._limit += count * kept[0].nbytes

    def keep_after(self, adapter: StagedAdapter) -> None:
        """Keeps the memory of an adapter's blocks from when all have let go of the adapter.

        Nobody may use its arrays after that: they are deleted when others come.
        """
        weakref.finalize(adapter, self._keep, adapter.blocks).atexit = False

    def _keep(self, blocks: dict[tuple, StagedBlock]) -> None:
        room = self._limit - sum(one.nbytes for kept in [*self._kept.values()] for one in [*kept])
        for array in (array for a, b, _ in blocks.values() for array in (a, b)):
            if array.nbytes <= room:
                room -= array.nbytes
                self._kept.setdefault(_kind(array), []).append(array)

    def make_room(self, array: np.ndarray) -> None:
        """Gives back what an array of the same kind had, else as many bytes of other kinds."""
        missing = array.nbytes
        for kept in (self._kept.get(_kind(array), []), *self._kept.values()):
            while kept and missing > 0:
                one = kept.pop()
                missing -= one.nbytes
                one.delete()


class StagingBuffers:
    """Arrays that are filled, sent, and filled again once they have arrived.

    Memory fresh from the operating system costs more than filling it: up to 8 us a page were seen,
    160 ms for the 84 MB of an adapter.
    """

    def __init__(self, pinned: Sharding | None = None, landings: Landings | None = None) -> None:
        """pinned: where to have the arrays, see `pinned_memory`."""
        self._landings = landings
        self._pinned, self._each = pinned, _EACH if pinned is None else _EACH_PINNED
        self._free: dict[tuple, list[np.ndarray]] = {}
        self._sent: list[tuple[jax.Array, np.ndarray]] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of whatever its last use left, to be filled and sent."""
        kind = (shape, np.dtype(dtype))
        on_its_way = [one for one in self._sent if _kind(one[1]) == kind]
        if not self._free.get(kind) and len(on_its_way) >= self._each:
            self._arrived(*on_its_way[0])
        free = self._free.get(kind)
        return free.pop() if free else self._new(shape, dtype)

    def _new(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        return array if self._pinned is None else _Pinned.like(array, self._pinned)

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Has the pinned arrays of a kind made now: the device stands still meanwhile (0.7 s)."""
        kind = (shape, np.dtype(dtype))
        if self._pinned is not None and kind not in self._free:
            self._free[kind] = [self._new(shape, dtype) for _ in range(self._each)]

    def send(self, array: np.ndarray, sharding: Sharding) -> jax.Array:
        """To the device. The array is not to be touched again, but by who gets it from `empty`."""
        held = getattr(array, "held", None)  # which views and copies have not
        if held is None:
            sent = place_on(np.asarray(array), sharding)
        else:
            if self._landings is not None:
                self._landings.make_room(array)
            sent = _to_its_device(held, sharding)
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
        if len(free) < self._each:
            free.append(array)


def pinned_memory(mesh: Mesh) -> Sharding | None:
    """Memory of this host that a GPU reads by itself, several times as fast; None without one.

    From other memory the transfer is a copy by the processor, for which what a step sends waits.
    """
    device = mesh.devices.flat[0]
    if mesh.size > 1 or device.platform != "gpu":
        return None
    kinds = {memory.kind for memory in device.addressable_memories()}
    return SingleDeviceSharding(device, memory_kind=_PINNED) if _PINNED in kinds else None


class _Pinned(np.ndarray):
    """Pinned memory as the host fills it; held: the same memory as the device reads it."""

    held: jax.Array

    @classmethod
    def like(cls, array: np.ndarray, pinned: Sharding) -> _Pinned:
        """Of the shape and dtype of an array."""
        held = jax.device_put(array, pinned).block_until_ready()
        memory: Any = (ctypes.c_char * held.nbytes).from_address(held.unsafe_buffer_pointer())
        memory.held = held  # lives as long as any view of it
        view = np.frombuffer(memory, held.dtype).reshape(held.shape).view(cls)
        view.held = held
        return view


def _to_its_device(held: jax.Array, sharding: Sharding) -> jax.Array:
    """Pinned memory on its way to the device; sharding: over that device only."""
    (device,) = held.devices()
    there = jax.device_put(held, SingleDeviceSharding(device, memory_kind="device"))
    return jax.make_array_from_single_device_arrays(held.shape, sharding, [there])


def _kind(array: np.ndarray | jax.Array) -> tuple:
    return array.shape, array.dtype
