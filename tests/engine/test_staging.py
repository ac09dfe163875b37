"""Host buffers of writes: filled again only when what was sent has arrived."""

import types

import jax
import numpy as np
import pytest

from jlora.engine.staging import StagingBuffers

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_sent_arrays_keep_their_values_when_the_buffers_are_filled_again():
    staging, sent = StagingBuffers(), []
    for value in range(8):
        array = staging.empty((100, 1000), np.float32)
        array[:] = value
        sent.append(staging.send(array, SHARDING))
    for value, array in enumerate(sent):
        assert np.asarray(array).min() == np.asarray(array).max() == value


class FakeArray:
    """On a device with memory of its own, where it arrives when it is waited for."""

    def __init__(self, array):
        self.array, self.value = array, None

    def block_until_ready(self):
        self.value = self.array.copy() if self.value is None else self.value

    def devices(self):
        return [types.SimpleNamespace(platform="gpu")]


def test_buffers_are_filled_again_once_they_have_arrived(monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging, sent, seen = StagingBuffers(), [], set()
    for value in range(6):
        array = staging.empty((4, 4), np.float16)
        array[:] = value
        seen.add(array.ctypes.data)
        sent.append(staging.send(array, SHARDING))
    assert len(seen) == 4
    staging.wait()
    assert [float(one.value.max()) for one in sent] == list(range(6))
    assert staging.empty((4, 4), np.float16).ctypes.data in seen


def test_a_transfer_that_fails_is_told_once(monkeypatch):
    """And its buffer, which may still be read, is not used again."""
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging = StagingBuffers()
    lost = staging.empty((4, 4), np.float16)
    sent = staging.send(lost, SHARDING)

    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(sent, "block_until_ready", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        staging.wait()
    staging.wait()
    assert staging.empty((4, 4), np.float16).ctypes.data != lost.ctypes.data


def test_shapes_and_dtypes_are_kept_apart(monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging = StagingBuffers()
    staging.send(staging.empty((4, 4), np.float16), SHARDING)
    staging.wait()
    for shape, dtype in (((2, 8), np.float16), ((4, 4), np.float32)):
        array = staging.empty(shape, dtype)
        assert array.shape == shape and array.dtype == dtype
