"""Several hosts that serve one model together: who decides, who follows, and who is still there.

The first process decides; it tells every other one each thing that it does to the devices, in the
order in which it does them. Programs that span hosts wait for each other on the devices, so a host
that is lost must be noticed on the way beside them.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import jax
import numpy as np

from jlora.engine.channel import Message
from jlora.engine.meeting import Links, host_name, meet_followers, meet_leader
from jlora.engine.staging import StagedAdapter
from jlora.errors import HostError

logger = logging.getLogger(__name__)
BEAT = 1.0  # seconds between signs of life
GRACE = 5.0  # seconds that a thread has to come back from a device that waits for a lost host
_POLL = 5e-5


class Hosts:
    """The connections of one process, and whether all is well with those at their other ends.

    When a host is lost nobody can go on: `error` says why, connections are closed so that who waits
    for a message is woken, and the process ends if its main thread does not come back from the
    device. A lost host is also missed by jax, which would wait for it at the end of the process, so
    the process then ends without that.
    """

    def __init__(self, links: dict[int, Links], timeout: float) -> None:
        """timeout: seconds without a sign of life after which a host counts as lost."""
        self.error: str | None = None
        self._links, self._timeout = links, timeout
        self._failed, self._lock = threading.Event(), threading.Lock()
        self._ending, self._busy = False, 0  # how often `working` has been entered
        self._watches = [
            threading.Thread(target=self._watch, args=(link,), name="jlora-watch", daemon=True)
            for link in links.values()
        ]
        for link in links.values():
            link.watch.limit(timeout)
        for thread in self._watches:
            thread.start()
        threading.Thread(target=self._beat, name="jlora-beat", daemon=True).start()
        atexit.register(self._at_exit)

    # -- signs of life -----------------------------------------------------------------------

    def _watch(self, link: Links) -> None:
        try:
            while (message := link.watch.receive()).op != "end":
                if message.op == "error":
                    self.fail(str(message.arguments[0]))
        except TimeoutError:
            self.fail(f"{link.name} has given no sign of life for {self._timeout:g} s")
        except OSError:
            self.fail(f"{link.name} has ended without a word: its connection was closed")

    def _beat(self) -> None:
        while not self._failed.wait(BEAT) and not self._ending:
            for link in self._links.values():
                with suppress(OSError):  # `_watch` sees it, too
                    link.watch.send("beat")

    def fail(self, reason: str) -> None:
        """All hosts are told, and none goes on. Only the first reason counts."""
        with self._lock:
            if self.error is not None or self._ending:
                return
            self.error = reason
        print(f"jlora, {host_name(jax.process_index())}: {reason}", file=sys.stderr, flush=True)
        for link in self._links.values():
            with suppress(OSError):  # it may be the lost one
                link.watch.send("error", [reason])
            link.close()
        self._failed.set()
        if self._busy:
            threading.Thread(target=self._last_resort, daemon=True).start()

    def _last_resort(self) -> None:
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if not self._busy:
                return
        self._exit(f"still waiting for the devices {GRACE:g} s later, so this process ends")

    def _exit(self, why: str) -> None:
        print(f"jlora, {host_name(jax.process_index())}: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def _at_exit(self) -> None:
        if self.error is None:
            self.close()
        if self.error is not None:
            self._exit("this process ends without waiting for the lost host")

    def check(self) -> None:
        """Raises HostError when a host is lost."""
        if self.error is not None:
            raise HostError(self.error)
        if self._ending:
            raise HostError("the engine has been shut down")

    def lost(self, link: Links) -> HostError:
        """What to raise when a connection is closed: the reason, which is about to be known."""
        self._failed.wait(BEAT)
        self.fail(f"{link.name}: its connection was closed")
        return HostError(self.error or "the engine has been shut down")

    @contextmanager
    def working(self) -> Iterator[None]:
        """The body may wait for the devices, and so for a lost host, where nothing can end it.

        What the devices say of a lost host is raised as HostError.
        """
        self._busy += 1  # first: who fails from here on sees that somebody may wait
        try:
            self.check()
            yield
        except jax.errors.JaxRuntimeError as error:
            self._failed.wait(BEAT)  # the reason is about to be known
            if self.error is None:
                raise
            raise HostError(self.error) from error
        finally:
            self._busy -= 1

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """As `working`; if the body fails here, an interrupt included, no host goes on."""
        try:
            with self.working():
                yield
        except BaseException as error:
            name = host_name(jax.process_index())
            self.fail(f"{name} failed at {what}: {type(error).__name__}: {error}")
            raise

    def wait(self, arrays: Any) -> None:
        """Until the device has computed a tree of arrays. Raises HostError when a host is lost."""
        with self.working():
            for array in jax.tree.leaves(arrays):
                while not array.is_ready():
                    self.check()
                    time.sleep(_POLL)
            jax.block_until_ready(arrays)  # raises what went wrong

    def close(self) -> None:
        """Says good-bye, waits until the others have done so, and closes the connections."""
        with self._lock:
            if self.error is not None or self._ending:
                return
            self._ending = True
        for link in self._links.values():
            with suppress(OSError):  # nobody may be there any more
                link.watch.send("end")
        deadline = time.monotonic() + self._timeout
        for thread in self._watches:
            thread.join(max(deadline - time.monotonic(), 0))
        for link in self._links.values():
            link.close()
        atexit.unregister(self._at_exit)


class Leader(Hosts):
    """The first process: tells the others what to do."""

    def __init__(self, timeout: float) -> None:
        """Waits for all others."""
        super().__init__(meet_followers(), timeout)
        self._numbers, self._dropped = itertools.count(), deque[int]()

    @contextmanager
    def agreed(
        self, op: str, arguments: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()
    ) -> Iterator[None]:
        """All hosts do something, this one in the body."""
        with self.all_or_none(repr(op)):
            dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
            for link in self._links.values():
                try:
                    link.steps.send(op, [dropped, *arguments], arrays)
                except OSError:
                    raise self.lost(link) from None
            yield

    def ask(self, op: str, arguments: Sequence[Any] = ()) -> dict[str, Any]:
        """What each other host answers, by its name; while an engine is made."""
        answers = {}
        for link in self._links.values():
            try:
                answers[link.name] = link.steps.request(op, arguments).arguments[0]
            except OSError:
                raise self.lost(link) from None
        return answers

    def least(self, value: int) -> int:
        """The least of what all hosts say; while an engine is made."""
        value = min(value, *self.ask("least").values())
        self._tell("least", [value])
        return value

    def _tell(self, op: str, arguments: Sequence[Any] = ()) -> None:
        with self.agreed(op, arguments):
            pass

    # -- adapters ----------------------------------------------------------------------------

    def number(self, staged: StagedAdapter) -> None:
        """Gives an adapter a number by which all hosts know it, for as long as it is kept here."""
        staged.number = next(self._numbers)
        # Whoever lets go of it may hold any lock, so that is only noted, and told with the next op.
        weakref.finalize(staged, self._dropped.append, staged.number).atexit = False

    def stage(self, op: str, arguments: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
        """Sends arrays of an adapter; from any thread. They may be changed afterwards."""
        for link in self._links.values():
            try:
                link.bulk.send(op, arguments, arrays)
            except OSError:
                raise self.lost(link) from None

    def confirm(self, number: int) -> None:
        """Waits until every host has an adapter. Raises RuntimeError that names one without."""
        faults = []
        for link in self._links.values():
            try:
                answer = link.bulk.request("ready", [number])
            except OSError:
                raise self.lost(link) from None
            if answer.op == "error":
                faults.append(f"{link.name}: {answer.arguments[0]}")
        if faults:
            raise RuntimeError("; ".join(faults))

    def close(self) -> None:
        """Ends the other processes' `follow`."""
        if self.error is None and not self._ending:
            try:
                self._tell("end")
            except HostError as error:
                logger.error("%s", error)
        super().close()


class Follower(Hosts):
    """Any other process: does what it is told."""

    def __init__(self, timeout: float) -> None:
        """Waits for the first process."""
        self.leader = meet_leader()
        super().__init__({0: self.leader}, timeout)

    def next_step(self) -> Message:
        """Waits for what is to be done next. Raises HostError when a host is lost."""
        try:
            return self.leader.steps.receive()
        except OSError:
            raise self.lost(self.leader) from None

    def answer(self, value: Any) -> None:
        """To what the first process has asked while an engine is made."""
        self.leader.steps.send("answer", [value])

    def least(self, value: int) -> int:
        """As Leader.least."""
        self.next_step()
        self.answer(value)
        return int(self.next_step().arguments[-1])


def agreed(
    hosts: Leader | None, op: str, arguments: Sequence[Any], arrays: Sequence[np.ndarray]
) -> AbstractContextManager[None]:
    """Leader.agreed, or nothing when there are no others."""
    return nullcontext() if hosts is None else hosts.agreed(op, arguments, arrays)


@contextmanager
def staging(hosts: Leader | None) -> Iterator[StagedAdapter]:
    """An adapter to be staged; what the body has done for it is done on all hosts in the end.

    Raises RuntimeError when one of them could not.
    """
    staged = StagedAdapter()
    if hosts is None:
        yield staged
        return
    hosts.number(staged)
    try:
        yield staged
    finally:  # nothing of it may come after it has been dropped
        hosts.confirm(staged.number)


def making(hosts: Leader | None) -> AbstractContextManager[None]:
    """Of an engine: if that fails here the others, who make it too, give up as well."""
    return nullcontext() if hosts is None else hosts.all_or_none("making the engine")


def working(hosts: Leader | None) -> AbstractContextManager[None]:
    """Hosts.working, or nothing when there are no others."""
    return nullcontext() if hosts is None else hosts.working()


def lead(timeout: float) -> Leader | None:
    """The other hosts of an engine that is made here; None when there are none.

    Raises RuntimeError in any process but the first.
    """
    if jax.process_count() == 1:
        return None
    if jax.process_index() != 0:
        raise RuntimeError(
            f"{host_name(jax.process_index())} cannot make an engine: call jlora.follow with the "
            "same EngineArgs in every process but the first"
        )
    return Leader(timeout)
