"""Arrays on their way to the device: in pieces, from memory that is filled again."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jlora.engine import staging
from jlora.engine.staging import StagingBuffers, Transfers

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize("shape", [(1, 5), (7, 100, 3), (32, 2)])
@pytest.mark.parametrize("piece", [64, 1000, 1 << 22])
def test_pieces_are_the_array(shape, piece, monkeypatch):
    monkeypatch.setattr(staging, "_PIECE", piece)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    pieces = Transfers().send(array, SHARDING)
    np.testing.assert_array_equal(np.concatenate(pieces), array)
    rows = array.nbytes // len(array)
    assert all(one.nbytes <= max(piece + rows, rows) for one in pieces)


def test_sent_arrays_keep_their_values_when_the_buffers_are_filled_again():
    buffers, transfers, sent = StagingBuffers(), Transfers(), []
    for value in range(8):
        array = buffers.empty((100, 1000), np.float32)
        array[:] = value
        sent.append(transfers.send(array, SHARDING))
    for value, pieces in enumerate(sent):
        for array in pieces:
            assert np.asarray(array).min() == np.asarray(array).max() == value


def test_two_pieces_are_on_their_way_at_a_time(monkeypatch):
    under_way, most = [], []

    class Sent:
        def block_until_ready(self):
            most.append(len(under_way))
            time.sleep(0.001)
            under_way.pop()
            return self

    def device_put(array, sharding):
        under_way.append(threading.get_ident())
        return Sent()

    monkeypatch.setattr(jax, "device_put", device_put)
    monkeypatch.setattr(staging, "_PIECE", 8)
    transfers = Transfers()
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: transfers.send(np.zeros((10, 2)), SHARDING), range(4)))
    assert len(most) == 4 * 10 and max(most) == 2


def test_buffers_are_filled_again_where_the_device_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    buffers = StagingBuffers()
    first = buffers.empty((4, 4), np.float16)
    assert buffers.empty((4, 4), np.float16) is first
    for shape, dtype in (((2, 8), np.float16), ((4, 4), np.float32)):
        array = buffers.empty(shape, dtype)
        assert array.shape == shape and array.dtype == dtype
