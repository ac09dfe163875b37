"""Messages between hosts, over TCP: JSON and raw arrays. Nothing in them is ever executed."""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (so that numpy knows "bfloat16")
import numpy as np

_LENGTH = struct.Struct(">Q")
_SMALL = 1 << 16  # bytes up to which a message goes out in one piece
_MAX_HEADER = 1 << 26


class Message(NamedTuple):
    """What is to be done, with what: JSON, and arrays of numbers."""

    op: str
    arguments: list[Any]
    arrays: list[np.ndarray]


class Channel:
    """One connection between two hosts. Threads may send at the same time; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        """sock: connected."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self._socket, self._lock = sock, threading.RLock()

    def limit(self, seconds: float | None) -> None:
        """After so long without a byte sending and receiving raise TimeoutError."""
        self._socket.settimeout(seconds)

    def send(
        self, op: str, arguments: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()
    ) -> None:
        """Returns when the arrays may be changed. arguments: what JSON can hold.

        Raises OSError when the connection is closed.
        """
        described = [(array.dtype.name, array.shape) for array in arrays]
        header = json.dumps([op, arguments, described]).encode()
        parts: list[Any] = [_LENGTH.pack(len(header)) + header]
        parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
        if sum(map(len, parts)) <= _SMALL:
            parts = [b"".join(parts)]
        with self._lock:
            for part in parts:
                self._socket.sendall(part)

    def receive(self) -> Message:
        """Waits for the next message. Raises OSError when the connection is closed."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _MAX_HEADER:
            raise OSError(f"a header of {length} bytes is not one of jlora's")
        op, arguments, described = json.loads(bytes(self._read(length)))
        arrays = []
        for name, shape in described:
            dtype = np.dtype(name)
            data = self._read(math.prod(shape) * dtype.itemsize)
            arrays.append(np.frombuffer(data, dtype).reshape(shape))
        return Message(op, arguments, arrays)

    def request(
        self, op: str, arguments: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()
    ) -> Message:
        """Sends, and waits for the answer; nobody else sends meanwhile."""
        with self._lock:
            self.send(op, arguments, arrays)
            return self.receive()

    def _read(self, size: int) -> memoryview:
        data = np.empty(size, np.uint8).data
        done = 0
        while done < size:
            count = self._socket.recv_into(data[done:])
            if not count:
                raise ConnectionResetError("the connection has been closed")
            done += count
        return data

    def close(self) -> None:
        """Whoever waits for a message, here or there, is woken by an OSError."""
        with suppress(OSError):  # it may be closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
