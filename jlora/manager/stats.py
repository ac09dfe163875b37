"""What an operator sees of adapters: where they are, counts, times and sizes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any


class AdapterState(enum.Enum):
    """Where an adapter is."""

    ON_DISK = "on disk"
    LOADING = "loading"
    ON_HOST = "on host"
    ON_DEVICE = "on device"
    IN_USE = "in use"
    PINNED = "pinned"
    FAILED = "failed"


@dataclass(frozen=True)
class AdapterStatus:
    """What an operator wants to know of one adapter.

    requests: sequences that run with it. reason, retry_in: of a failed one, why, and in how many
    seconds it is tried again (0: at the next request).
    """

    name: str
    state: AdapterState
    identity: str = ""
    slot: int | None = None
    rank: int = 0
    host_bytes: int = 0
    requests: int = 0
    reason: str | None = None
    retry_in: float | None = None


@dataclass
class Durations:
    """How often something was waited for, and how long, in seconds."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        """Once more."""
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    @property
    def mean(self) -> float:
        """Seconds each."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class LoRAStats:
    """Adapters since the start of an engine, and where they are now.

    hits: sequences whose adapter had a slot when they started. activations: those whose adapter was
    given one. loads: reads from disk, the Hub or memory, with their times; failures: those that
    failed or took too long. copies: host to device. waits: from a request's arrival to its start,
    by adapter name. free_blocks: rank blocks by row of the projection table.
    """

    hits: int
    activations: int
    loads: Durations
    failures: int
    copies: Durations
    slot_evictions: int
    host_evictions: int
    waits: dict[str, Durations]
    loading: int
    staged: int
    on_host: int
    on_device: int
    host_bytes: int
    free_slots: int
    free_blocks: dict[str, int]


@dataclass
class Counters:
    """What is counted while an engine runs."""

    hits: int = 0
    activations: int = 0
    failures: int = 0
    loads: Durations = field(default_factory=Durations)
    waits: dict[str, Durations] = field(default_factory=dict)

    def started(self, resident: bool) -> None:
        """A sequence has started. resident: its adapter had a slot before it came to that."""
        if resident:
            self.hits += 1
        else:
            self.activations += 1

    def waited(self, name: str, seconds: float) -> None:
        """A request for the adapter has started."""
        self.waits.setdefault(name, Durations()).add(seconds)

    def snapshot(self, copies: Durations, **now: Any) -> LoRAStats:
        """The counts, copied, and what is where now. copies: how long they took."""

        def copy(one: Durations) -> Durations:
            return Durations(one.count, one.total, one.longest)

        return LoRAStats(
            hits=self.hits,
            activations=self.activations,
            failures=self.failures,
            loads=copy(self.loads),
            copies=copy(copies),
            waits={name: copy(one) for name, one in self.waits.items()},
            **now,
        )
