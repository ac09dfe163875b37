"""Python's garbage collector, kept from looking through what an engine's start has left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

_sparing = 0  # engines


def spare_collector(engine: object) -> Callable[[], object]:
    """Has the collector pass over what there is now, until no engine that asked for it is left.

    Imports and compiling leave a million objects, at which it would look from time to time in the
    midst of a step (0.4 s for half a million on a CPU). What is in a cycle now is not freed
    meanwhile, so the engine must be in none. Returns what ends it before the engine does.
    """
    global _sparing
    gc.collect()
    gc.freeze()
    _sparing += 1
    end = weakref.finalize(engine, _end)
    end.atexit = False
    return end


def _end() -> None:
    global _sparing
    _sparing -= 1
    if not _sparing:
        gc.unfreeze()
