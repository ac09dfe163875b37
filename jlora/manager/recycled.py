"""Host memory that adapters have left, for the next ones."""

from __future__ import annotations

import threading
import weakref

import numpy as np

_KEPT, _KEPT_BYTES = 4, 1 << 30  # of pieces that nobody uses now
_UNIT = 1 << 20


class RecycledMemory:
    """Gives out memory, and takes it back when no array uses it any more.

    Memory fresh from the operating system can cost more than reading a file into it: on virtual
    machines that hand unused memory back, 336 MB took 600 ms longer.
    """

    def __init__(self) -> None:
        self._unused: list[np.ndarray] = []
        self._taking = threading.Lock()

    def empty(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], of whatever its last use left."""
        with self._taking:
            fitting = [one for one in self._unused if nbytes <= one.nbytes <= 1.25 * nbytes + _UNIT]
            whole = min(fitting, key=lambda one: one.nbytes, default=None)
            if whole is not None:
                self._unused = [one for one in self._unused if one is not whole]
        if whole is None:
            whole = np.empty(-(-nbytes // _UNIT) * _UNIT, np.uint8)
        # Views of `memory` keep it alive, and not `whole`: so its end is that of the last view.
        memory = np.frombuffer(whole.data, np.uint8, nbytes) if nbytes else whole[:0]
        weakref.finalize(memory, self._take_back, whole).atexit = False
        return memory

    def _take_back(self, whole: np.ndarray) -> None:
        """At any time and in any thread, so without the lock."""
        kept = self._unused
        if len(kept) < _KEPT and sum(one.nbytes for one in kept) + whole.nbytes <= _KEPT_BYTES:
            kept.append(whole)
