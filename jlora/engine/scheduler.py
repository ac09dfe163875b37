"""Which tokens run in the next step: continuous batching, chunked prefill, preemption."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from jlora.engine.kv_pages import PageAllocator
from jlora.engine.sequence import RequestState, Sequence, Status
from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager import TieredLoRAManager
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """A sequence's share of a step: positions `start : start + count`."""

    sequence: Sequence
    start: int
    count: int
    sample: bool


@dataclass
class Plan:
    """One step. admitted: sequences whose rows must be filled first."""

    entries: list[Entry]
    admitted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(entry.count for entry in self.entries)


class Scheduler:
    """Sequences that wait and run. First come, first served; the last to come is preempted.

    A sequence whose adapter is not on the device lets others pass, but only so many of them: then
    adapters in use start nobody else until it has a slot. While others run, a step either writes an
    adapter or starts with it: both together would be long (docs/benchmarks.md).
    """

    def __init__(
        self,
        pages: PageAllocator,
        lora: TieredLoRAManager | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        restarts_above: int | None = None,
    ) -> None:
        """lora: gives slots to the sequences that start to run.

        restarts_above: a sequence that grows longer is computed anew (ModelConfig.restarts_above).
        """
        self.pages, self.lora = pages, lora
        self.max_tokens, self.max_model_len = max_num_batched_tokens, max_model_len
        self.restarts_above = restarts_above
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._next: list[Sequence] = []  # wait, and begin once their adapters have been written
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.failed: list[Sequence] = []  # finished here with an error, to be reported
        self.num_preemptions = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """A sequence waits for its turn, which is that of its request's arrival."""
        at = len(self.waiting)
        while at and self.waiting[at - 1].request.arrival > sequence.request.arrival:
            at -= 1
        self.waiting.insert(at, sequence)

    def schedule(self, in_flight: bool) -> Plan | None:
        """The next step, or None when the one in flight must be collected first.

        in_flight: a step is dispatched and not collected, so nothing can be preempted. A plan
        may be empty.
        """
        outgrown = [sequence for sequence in self.running if self._outgrown(sequence)]
        if in_flight and (outgrown or self._lacks_pages()):
            return None
        for sequence in outgrown:
            sequence.rope_length = sequence.length
            self._preempt(sequence)
        plan, budget, preemptions = Plan([], []), self.max_tokens, self.num_preemptions
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            count = min(self._runnable(sequence), budget)
            if count > 0:
                if not self._make_room(sequence, count):
                    continue  # it was itself the last one, and is preempted
                budget -= self._enter(plan, sequence, count)
            index += 1
        if budget > 0 and self.num_preemptions == preemptions:  # else they would come right back
            self._admit(plan, budget)
        for adapter_id in dict.fromkeys(entry.sequence.adapter_id for entry in plan.entries):
            if adapter_id is not None and self.lora is not None:
                self.lora.manager.touch(adapter_id)
        plan.entries.sort(key=lambda entry: entry.sequence.slot)  # fewer tiles in the kernels
        return plan

    def _outgrown(self, sequence: Sequence) -> bool:
        """Whether its keys are turned as those of a short sequence, which it no longer is."""
        limit = self.restarts_above
        return limit is not None and sequence.rope_length == 0 and sequence.length > limit

    def _runnable(self, sequence: Sequence) -> int:
        """Tokens that could run now; 0 for a sequence that only waits for its last token."""
        length = sequence.length
        last = min(sequence.num_prompt + sequence.request.max_tokens, self.max_model_len)
        return 0 if sequence.in_flight and length >= last else length - sequence.num_computed

    def _new_pages(self, sequence: Sequence, count: int) -> int:
        size = self.pages.page_size
        return -(-(sequence.num_computed + count) // size) - len(sequence.pages)

    def _lacks_pages(self) -> bool:
        """Whether the running sequences want more pages than are free."""
        most = len(self.running) + self.max_tokens // self.pages.page_size
        return most > self.pages.num_free and self._pages_wanted() > self.pages.num_free

    def _pages_wanted(self) -> int:
        budget, wanted = self.max_tokens, 0
        for sequence in self.running:
            count = min(self._runnable(sequence), budget)
            budget -= count
            wanted += max(self._new_pages(sequence, count), 0) if count else 0
        return wanted

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Preempts from the end until the sequence has its pages; False when it went itself."""
        while (need := self._new_pages(sequence, count)) > self.pages.num_free:
            victim = self.running[-1]
            logger.debug("no free KV pages: preempts %s", victim.request.request_id)
            self._preempt(victim)
            if victim is sequence:
                return False
        if need > 0:
            sequence.pages += self.pages.allocate(need)
        return True

    def _enter(self, plan: Plan, sequence: Sequence, count: int) -> int:
        sample = sequence.num_computed + count == sequence.length
        plan.entries.append(Entry(sequence, sequence.num_computed, count, sample))
        sequence.num_computed += count
        sequence.in_flight += sample
        self.register_pages(sequence)
        return count

    def _admit(self, plan: Plan, budget: int) -> None:
        """Starts waiting sequences in order; one whose adapter is not there lets others pass."""
        passed: list[Sequence] = []
        held: list[Sequence] = []  # their adapters are written in this step
        failed, others_run = len(self.failed), bool(plan.entries)
        self._take_slots_again()
        not_now = self._prepare_adapters()  # adapters of which nobody starts in this step
        while self.waiting and budget > 0 and len(self._free_rows) > len(held):
            sequence = self.waiting.popleft()
            adapter = sequence.adapter_id
            if sequence.slot < 0:
                if adapter in not_now:  # first: so it is with most of a long queue
                    passed.append(sequence)
                    continue
                sequence.found_slot = self._has_slot(adapter)
                if not self._acquire_slot(sequence):
                    if not sequence.finished:
                        passed.append(sequence)
                        not_now.add(adapter)
                    continue
            if others_run and not self._is_written(adapter):
                held.append(sequence)
                passed.append(sequence)
                not_now.add(adapter)
                continue
            if not self._is_as_checked(sequence):
                continue
            first = self._bind(sequence)
            count = self._start(sequence, budget)
            if count == 0:  # no pages: nobody behind it may take them
                if first:
                    self._unbind(sequence.request)
                self._release_slot(sequence)
                self.waiting.appendleft(sequence)
                break
            self._note_start(sequence)
            for other in passed:
                other.passes += 1
            self.running.append(sequence)
            plan.admitted.append(sequence)
            budget -= self._enter(plan, sequence, count)
        self.waiting.extendleft(reversed(passed))
        self._let_slots_go(held)
        # Who failed in this step may have been what others were not prepared for.
        nothing_to_wait_for = len(self.failed) == failed and (
            self.lora is None or not self.lora.busy
        )
        if self.waiting and not self.running and not plan.entries and nothing_to_wait_for:
            reason = "it can get no slot, rank blocks or place on the host: pinned adapters"
            self._fail(self.waiting.popleft(), reason, AdapterInUseError(reason))

    def _prepare_adapters(self) -> set[int | None]:
        """Has the adapters of waiting sequences fetched; returns those that nobody can start with.

        They are on their way, or in use by sequences that must end first. The latter are as few as
        leave room for the first sequences that have been passed often enough, an eighth of the
        slots at a time: emptying more makes batches small (docs/benchmarks.md).
        """
        if self.lora is None or not (self.waiting or self.lora.staged):
            return set()
        wanted: dict[int, LoRARequest] = {}
        late: dict[int, None] = {}
        limit, manager = self.lora.lora_config.max_lora_passes, self.lora.manager
        for sequence in self.waiting:
            adapter_id, request = sequence.adapter_id, sequence.request.lora_request
            if request is None or adapter_id is None:
                continue
            wanted.setdefault(adapter_id, request)
            if sequence.passes >= limit:
                late[adapter_id] = None
        on_their_way = self.lora.want(wanted)
        at_once = max(self.lora.lora_config.max_loras // 8, 1)
        without = [adapter_id for adapter_id in late if not self._has_slot(adapter_id)]
        first = {one: self.lora.version(one) for one in without[:at_once]}
        needs = {one: version.needs for one, version in first.items()}
        nbytes = {
            one: version.nbytes
            for one, version in first.items()
            if manager.get_adapter(one) is None
        }
        return {*manager.to_drain(needs, nbytes), *on_their_way}

    def _take_slots_again(self) -> None:
        """For those whose adapters have been written, and still have a slot."""
        self._next = [one for one in self._next if one.status is Status.WAITING]
        for sequence in self._next:
            if self._has_slot(sequence.adapter_id):
                self._acquire_slot(sequence)

    def _let_slots_go(self, held: list[Sequence]) -> None:
        """Until the next step: who has not begun keeps nobody from replacing an adapter."""
        waiting = [one for one in self._next + held if one.status is Status.WAITING]
        self._next = list(dict.fromkeys(one for one in waiting if one.slot >= 0))
        for sequence in self._next:
            self._release_slot(sequence)

    def _bind(self, sequence: Sequence) -> bool:
        """Its request uses the version that acts now, to its end; False when it was so before."""
        request, adapter_id = sequence.request, sequence.adapter_id
        if adapter_id is None or request.adapter_identity or self.lora is None:
            return False
        request.adapter_identity = self.lora.version(adapter_id).identity
        self.lora.manager.bind(adapter_id)
        return True

    def _unbind(self, request: RequestState) -> None:
        """Lets go of the version that the request has begun with, if it has."""
        if request.adapter_identity and request.adapter_id is not None and self.lora is not None:
            request.adapter_identity = ""
            self.lora.unbind(request.adapter_id)

    def _has_slot(self, adapter_id: int | None) -> bool:
        if adapter_id is None or self.lora is None:
            return False
        return self.lora.manager.slot_of(adapter_id) is not None

    def _is_written(self, adapter_id: int | None) -> bool:
        """Whether nothing has to be written before a sequence starts with an adapter in a slot."""
        if adapter_id is None or self.lora is None:
            return True
        return self.lora.manager.is_written(adapter_id)

    def _note_start(self, sequence: Sequence) -> None:
        metrics, lora_request = sequence.request.metrics, sequence.lora_request
        if lora_request is not None and self.lora is not None:
            self.lora.counters.started(sequence.found_slot)
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = time.time()
            if lora_request is not None and self.lora is not None:
                waited = metrics.first_scheduled_time - metrics.arrival_time
                self.lora.counters.waited(lora_request.lora_name, waited)

    def _acquire_slot(self, sequence: Sequence) -> bool:
        request, adapter_id = sequence.lora_request, sequence.adapter_id
        if request is None or adapter_id is None or self.lora is None:
            return True
        try:
            slot = self.lora.acquire(request, adapter_id)
        except Exception as error:  # of any kind: the others must go on
            self._fail(sequence, str(error), error)
            return False
        if slot is None:
            return False
        sequence.slot = slot
        return True

    def _is_as_checked(self, sequence: Sequence) -> bool:
        """Whether its adapter takes the request, which has been checked for an earlier version.

        Not asked earlier: files may change while a request waits. It fails when it does not.
        """
        checked, adapter_id = sequence.request.adapter_version, sequence.adapter_id
        if checked is None or adapter_id is None or self.lora is None:
            return True
        if self.lora.version(adapter_id).takes_requests_for(checked):
            return True
        self._release_slot(sequence)
        reason = "its adapter has become one with other tokens while it waited"
        self._fail(sequence, reason, AdapterError(reason))
        return False

    def _release_slot(self, sequence: Sequence) -> None:
        if sequence.slot >= 0 and sequence.adapter_id is not None and self.lora is not None:
            self.lora.manager.release(sequence.adapter_id)
        sequence.slot = -1

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Gives a waiting sequence pages and a row; returns its first tokens, 0 for no room."""
        size, total = self.pages.page_size, len(sequence.tokens)
        limit = 0 if sequence.request.params.prompt_logprobs is not None else total - 1
        known, hashes = self.pages.find(sequence.prefix, sequence.tokens, limit)
        count = min(total - len(known) * size, budget)
        need = -(-(len(known) * size + count) // size) - len(known)
        if need > self.pages.num_free_without(known):
            return 0
        self.pages.take(known)
        sequence.pages = known + self.pages.allocate(need)
        sequence.hashes, sequence.num_computed = hashes, len(known) * size
        sequence.row, sequence.status = self._free_rows.pop(), Status.RUNNING
        request = sequence.request
        if request.num_cached_tokens is None:
            request.num_cached_tokens = sequence.num_computed
        return count

    def register_pages(self, sequence: Sequence) -> None:
        """Makes the sequence's full pages of known tokens findable."""
        if not self.pages.caching:
            return
        size = self.pages.page_size
        full = min(sequence.num_computed, len(sequence.tokens)) // size
        for index in range(len(sequence.hashes), min(full, len(sequence.pages))):
            parent, start = sequence.hashes[-1] if sequence.hashes else None, index * size
            name = sequence.prefix.page_hash(parent, start, sequence.tokens[start : start + size])
            sequence.hashes.append(name)
            acts_here = sequence.acts_from is not None and start + size > sequence.acts_from
            adapter = sequence.prefix.adapter if acts_here else ""
            self.pages.register(sequence.pages[index], name, adapter)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status, sequence.num_computed, sequence.hashes = Status.WAITING, 0, []
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        self._free_rows.append(sequence.row)
        self._release_slot(sequence)
        sequence.pages, sequence.row = [], -1

    def _fail(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """error: why it could not begin, when it could not."""
        sequence.finish("abort", reason)
        sequence.request.error = error or sequence.request.error
        if sequence.request.finished:
            self._unbind(sequence.request)
        self.failed.append(sequence)
        logger.error("request %s failed: %s", sequence.request.request_id, reason)

    def abandon(self, plan: Plan, reason: str) -> None:
        """A plan could not be run: ends its sequences, and forgets what its pages should hold.

        And those whose adapters were to be written before they begin.
        """
        unwritten = [
            sequence
            for sequence in self._next
            if self._has_slot(sequence.adapter_id) and not self._is_written(sequence.adapter_id)
        ]
        for sequence in [*(entry.sequence for entry in plan.entries), *unwritten]:
            if not sequence.finished:
                self.remove(sequence)  # first: who fails lets go of its adapter's version
                self._fail(sequence, reason)
        self.pages.reset()

    def remove(self, sequence: Sequence) -> None:
        """Frees everything of a sequence that has finished."""
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.request.finished:
            self._unbind(sequence.request)
