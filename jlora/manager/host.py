"""Adapters in host memory: how many there may be, and who leaves for another."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Set

from jlora.errors import AdapterInUseError
from jlora.manager.mixture import Adapter


class HostTier:
    """The adapters on the host, least recently used first, within limits of number and bytes."""

    def __init__(self, capacity: int, budget: int | None) -> None:
        """budget: bytes of all tensors at most; None: no limit."""
        self.capacity, self.budget = capacity, budget
        self.adapters: OrderedDict[int, Adapter] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(adapter.nbytes for adapter in self.adapters.values())

    def room(self, kept: Set[int]) -> int:
        """Bytes for others beside those that are kept; as good as endless without a limit."""
        if self.budget is None:
            return sys.maxsize
        return self.budget - sum(self.adapters[one].nbytes for one in kept)

    def victims(self, nbytes: int, kept: Set[int], instead: int | None = None) -> list[int] | None:
        """Who must leave for one more adapter of so many bytes; None if it cannot be.

        kept: those that do not leave. instead: one that leaves in any case.
        """
        count = len(self.adapters) + 1
        held = self.nbytes + nbytes if self.budget is not None else 0
        if instead is not None:
            count, held = count - 1, held - self.adapters[instead].nbytes
        victims: list[int] = []
        leaving = (one for one in self.adapters if one != instead and one not in kept)
        while count > self.capacity or (self.budget is not None and held > self.budget):
            victim = next(leaving, None)
            if victim is None:
                return None
            victims.append(victim)
            count, held = count - 1, held - self.adapters[victim].nbytes
        return victims

    def require_room(
        self, nbytes: int, kept: Set[int], instead: int | None = None, what: str = "an adapter"
    ) -> list[int]:
        """As `victims`; raises AdapterInUseError, which names the limit, when it cannot be."""
        victims = self.victims(nbytes, kept, instead)
        if victims is not None:
            return victims
        if self.victims(0, kept, instead) is None:
            raise AdapterInUseError(
                f"all {self.capacity} adapters on the host are pinned or in use, which leaves no "
                f"room for {what}; raise max_cpu_loras or remove one"
            )
        raise AdapterInUseError(
            f"no room on the host for {what} ({nbytes} bytes): max_cpu_lora_bytes={self.budget} "
            "beside those that are pinned or in use; raise max_cpu_lora_bytes or remove one"
        )
