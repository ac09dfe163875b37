"""What reads of adapters leave for the next ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jlora.manager.recycled import RecycledMemory

_KEPT_BYTES = 1 << 23  # of headers; what is found out of one takes about ten times as much
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
        self._found: dict[tuple[bytes, int], Any] = {}

    def layout(self, header: bytes, size: int, make: Callable[[], Any]) -> Any:
        """What `make` returns for a file of that header and size, perhaps for an earlier one."""
        key = header, size
        found = self._found.get(key)
        if found is None:
            found = make()
            if len(header) <= _KEPT_BYTES:
                kept = dict(self._found)
                while kept and sum(len(one) for one, _ in kept) + len(header) > _KEPT_BYTES:
                    del kept[next(iter(kept))]
                self._found = kept | {key: found}  # at once: other threads read it
        return found

    def digests(self, memory: np.ndarray) -> list[Future[bytes]]:
        """Begins to hash memory, uint8 [bytes], in threads: of one piece after the other."""

        def digest(piece: np.ndarray) -> bytes:
            return hashlib.sha256(piece.data).digest()

        starts = range(0, memory.nbytes, _PIECE)
        return [self._hashing.submit(digest, memory[at : at + _PIECE]) for at in starts]
