"""What reads of adapters leave for the next ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jlora.manager.recycled import RecycledMemory

_KEPT_BYTES = 1 << 23  # of headers; with what is found out of one it is five times as much
_KEPT = 256  # files
_HASHING = 4  # threads
_PIECE = 1 << 23  # bytes that are hashed in one call, in which other threads run


class EarlierReads:
    """Memory, and what has been found out of files of which others may be alike.

    An adapter has hundreds of tensors, and all of one trainer have the same names, shapes and
    places. For any thread.
    """

    def __init__(self) -> None:
        self.memory = RecycledMemory()
        self._hashing = ThreadPoolExecutor(_HASHING, "jlora-hash")
        self._found: dict[tuple[bytes, int], Any] = {}  # used last comes last
        self._bytes, self._changing = 0, threading.Lock()

    def layout(self, header: bytes, size: int, make: Callable[[], Any]) -> Any:
        """What `make` returns for a file of that header and size, perhaps for an earlier one."""
        key = header, size
        with self._changing:
            found = self._found.pop(key, None)
            if found is not None:
                self._found[key] = found
                return found
        found = make()
        with self._changing:
            if len(header) <= _KEPT_BYTES and key not in self._found:
                self._found[key] = found
                self._bytes += len(header)
                while self._bytes > _KEPT_BYTES or len(self._found) > _KEPT:
                    oldest = next(iter(self._found))
                    self._bytes -= len(oldest[0])
                    del self._found[oldest]
        return found

    def digests(self, memory: np.ndarray) -> list[Future[bytes]]:
        """Begins to hash memory, uint8 [bytes], in threads: of one piece after the other."""

        def digest(piece: np.ndarray) -> bytes:
            return hashlib.sha256(piece.data).digest()

        starts = range(0, memory.nbytes, _PIECE)
        return [self._hashing.submit(digest, memory[at : at + _PIECE]) for at in starts]
