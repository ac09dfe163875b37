"""Work in the background: reading adapters and copying them, never by the thread that steps."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

# Seconds after which Python lets another thread run. A load comes back from a hundred numpy calls
# that let others run, and waits so long each time beside a thread that never waits: with Python's
# own 5 ms 84 MB took 183 ms to read and 92 to pack, with this 72 and 35; with 0.1 ms no less, but
# the thread that steps is interrupted more often.
_SWITCH_INTERVAL = 5e-4
_IDLE_SECONDS = 10.0  # for which a thread waits for more to do


class LoadTimeout(Exception):
    """A function took longer than it may."""


@dataclass
class _Job:
    function: Callable[[], Any]
    future: Future = field(default_factory=Future)
    started: float | None = None
    seconds: float = 0.0

    def end(self, result: Any, error: BaseException | None) -> None:
        """Says what the function returned or raised."""
        assert self.started is not None  # it has run
        self.seconds = time.monotonic() - self.started
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Threads:
    """Run jobs, one after the other and at most `limit` at once.

    They know nothing of whose jobs they are, which can be let go of while they wait for more.
    """

    def __init__(self, limit: int) -> None:
        self.queue: deque[_Job] = deque()
        self.limit, self.busy, self._idle = limit, 0, 0
        lock = threading.Lock()  # for everything here, and for the jobs
        self.changed, self._queued = threading.Condition(lock), threading.Condition(lock)

    def hire(self) -> None:
        """Wakes a thread for what is queued, or starts one; under the lock.

        Raises RuntimeError when there is none and the system starts no more. Starting one waits
        until it runs, which was 1.3 ms where others load: so threads stay.
        """
        self._queued.notify()
        if len(self.queue) > self._idle and self.busy + self._idle < self.limit:
            self.busy += 1
            try:
                threading.Thread(target=self._work, name="jlora-load", daemon=True).start()
            except RuntimeError:
                self.busy -= 1
                if not self.busy + self._idle:
                    raise

    def _work(self) -> None:
        while True:
            with self.changed:
                if not self._next():
                    return
                job = self.queue.popleft()
                job.started = time.monotonic()
            result, error = None, None
            try:
                result = job.function()
            except BaseException as caught:  # whoever collects it decides
                error = caught
            with self.changed:
                if job.future.done():
                    return  # given up, and somebody else works in its place
                job.end(result, error)
                self.changed.notify_all()
            del job, result, error  # nothing of it is kept while this waits

    def _next(self) -> bool:
        """Waits for a job; False when none has come for a while, and the thread is to end."""
        self.busy -= 1
        if not self.queue:
            self._idle += 1
            self._queued.wait(_IDLE_SECONDS)
            self._idle -= 1
        self.busy += bool(self.queue)
        return bool(self.queue)


class BackgroundLoads:
    """Runs functions in threads, at most `limit` at once and one for each key.

    Results are handed to the thread that asks for them, so that nothing else needs a lock. A
    function that takes longer than `timeout` seconds is given up: its thread, which cannot be
    ended, no longer counts and what it still returns is dropped.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        """Starts no thread before there is work. Shortens this process's switch interval."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self.limit, self.timeout = limit, timeout
        self._jobs: dict[Hashable, _Job] = {}
        self._threads = _Threads(limit)
        self._changed = self._threads.changed

    def __contains__(self, key: Hashable) -> bool:
        """Whether a job is under way, or finished and not collected."""
        return key in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def keys(self) -> list[Hashable]:
        """Of the jobs under way, and of those that have finished and are not collected."""
        return list(self._jobs)

    def start(self, key: Hashable, function: Callable[[], Any]) -> Future:
        """Runs the function, unless a job of that key is there already; the future of either."""
        with self._changed:
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(function)
                job.future.set_running_or_notify_cancel()  # who waits for it cannot cancel it
                self._threads.queue.append(job)
                try:
                    self._threads.hire()
                except RuntimeError:
                    self._threads.queue.remove(job)
                    del self._jobs[key]
                    raise
            return job.future

    def collect(self) -> list[tuple[Hashable, Future, float]]:
        """(key, finished future, seconds that it took) of what has ended since the last time."""
        now = time.monotonic()
        with self._changed:
            for job in self._jobs.values():
                late = job.started is not None and now - job.started > self.timeout
                if late and not job.future.done():
                    job.seconds = self.timeout
                    job.future.set_exception(LoadTimeout(f"took longer than {self.timeout:g} s"))
                    self._threads.busy -= 1
                    with suppress(RuntimeError):  # the next job tries again
                        self._threads.hire()
            ended = [(key, job) for key, job in self._jobs.items() if job.future.done()]
            for key, _ in ended:
                del self._jobs[key]
        return [(key, job.future, job.seconds) for key, job in ended]

    def wait(self, seconds: float) -> None:
        """Until something has ended, for at most so long."""
        with self._changed:
            if self._jobs and not any(job.future.done() for job in self._jobs.values()):
                self._changed.wait(seconds)
