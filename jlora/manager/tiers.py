"""Adapters between disk, host and device, for an engine that never waits for them.

Threads read and copy (`loads.py`); everything else is done by the one thread that drives the
engine, between steps.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager.blocks import Needs
from jlora.manager.copies import Copies, as_exception
from jlora.manager.loader import same_source, source
from jlora.manager.loads import BackgroundLoads, LoadTimeout
from jlora.manager.lora_model import LoRAModel
from jlora.manager.stats import AdapterState, AdapterStatus, Counters, LoRAStats
from jlora.manager.worker_manager import AdapterVersion, LRUCacheWorkerLoRAManager
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)
_WAIT = 0.05  # seconds between looks at the clock while somebody waits


@dataclass(eq=False)
class Load:
    """An adapter that is being read. done: whether that has ended, and with what error, if any.

    began: its thread has. next: reads it again afterwards, for those who have asked since this one
    began, as what this one finds may be older than that.
    """

    request: LoRARequest
    done: bool = False
    error: Exception | None = None
    began: bool = False
    next: Load | None = None

    @property
    def adapter_id(self) -> int:
        """Of the adapter."""
        return self.request.lora_int_id


@dataclass(frozen=True)
class _Failure:
    """request: that was read for; None when that would keep arrays alive."""

    name: str
    request: LoRARequest | None
    error: Exception
    retry_at: float

    def refuses(self, request: LoRARequest) -> bool:
        """Whether another request asks for the same, too soon."""
        same = self.request is not None and same_source(request, self.request)
        return same and time.monotonic() < self.retry_at


class TieredLoRAManager(LRUCacheWorkerLoRAManager):
    """The worker manager of an engine: fetches in the background what requests will need."""

    def __init__(
        self,
        *arguments: Any,
        stage: Callable[[LoRAModel], Any] | None = None,
        prepare: Callable[[AdapterVersion], Any] = lambda _: None,
        **options: Any,
    ) -> None:
        """As WorkerLoRAManager.

        stage: makes, in the background, what the device needs to write an adapter's blocks; it is
        handed to whoever writes them (`staged`). None: adapters need no such thing. prepare: does,
        in the background, what requests for a version will need besides (its tokeniser).
        """
        super().__init__(*arguments, **options)
        config = self.lora_config
        self._prepare = prepare
        self._loads = BackgroundLoads(config.max_lora_loads, config.lora_load_timeout)
        self._copies = Copies(
            self.manager, stage, config.max_staged_loras, config.lora_load_timeout
        )
        self._loading: dict[tuple[int, bool], Load] = {}  # by id and load_inplace
        self._failures: dict[tuple[int, bool], _Failure] = {}  # likewise
        self.leaving: set[int] = set()  # refuse new requests, and go with their last one
        self._placing: set[int] = set()
        self.counters = Counters()

    @property
    def staged(self) -> dict[str, Any]:
        """What `stage` has made and nobody has written yet, by LoRAModel.key."""
        return self._copies.staged

    # -- loading ---------------------------------------------------------------------------

    def known(self, request: LoRARequest) -> AdapterVersion | None:
        """The version that would act, None when the files must be looked at first.

        Raises as `check`, and AdapterError for an adapter that could not be loaded shortly before.
        """
        known = self.check(request)
        key = (request.lora_int_id, request.load_inplace)
        failure = self._failures.get(key)
        serves = self.manager.get_adapter(request.lora_int_id) is not None
        if failure is not None and (request.load_inplace or not serves):
            if failure.refuses(request):
                raise failure.error
            del self._failures[key]
        return None if request.load_inplace else known

    def check(self, request: LoRARequest) -> AdapterVersion | None:
        """What is known of a request's adapter without looking at a disk.

        Raises AdapterError for an id that stands for something else, AdapterInUseError when pinned
        adapters leave no room, or when it is being removed.
        """
        adapter_id = request.lora_int_id
        self._require_staying(adapter_id, request.lora_name)
        known = self._known(request)
        load = self._loading.get((adapter_id, request.load_inplace))
        if load is not None and not same_source(request, load.request):
            raise AdapterError(
                f"adapter {request.lora_name!r}: id {adapter_id} stands for "
                f"{source(load.request)}, which is being loaded, not {source(request)}; use "
                "another id"
            )
        self._require_room(request, None if known is None else known.needs)
        if self.manager.get_adapter(adapter_id) is None:
            self._require_host_room(request, adapter_id)
        return known

    def _require_staying(self, adapter_id: int, name: str) -> None:
        if adapter_id in self.leaving:
            raise AdapterInUseError(
                f"adapter {name!r} is being removed, and requests still use it; wait, or use "
                "another id"
            )

    def fetch(self, request: LoRARequest) -> Load:
        """Reads an adapter in the background, unless that is under way.

        With load_inplace it is read only if its files have changed, and what is under way will do
        only if it has not begun; otherwise one more read follows it.
        """
        load = self._loading.get((request.lora_int_id, request.load_inplace))
        if load is None:
            return self._start(Load(request))
        if request.load_inplace and load.began:
            load.next = load.next or Load(request)
            return load.next
        return load

    def _start(self, load: Load) -> Load:
        key = (load.adapter_id, load.request.load_inplace)
        self._failures.pop(key, None)
        self._loads.start(load, functools.partial(self._fetched, load))
        self._loading[key] = load
        return load

    def _fetched(self, load: Load) -> Any:
        """In a thread: changes nothing but `began`."""
        load.began = True
        loaded = self._read(load.request)
        if loaded is not None:
            self._prepare(loaded[1])
        return loaded

    def collect(self) -> None:
        """Takes over what threads have done."""
        for load, future, seconds in self._loads.collect():
            assert isinstance(load, Load)  # what `fetch` starts
            if not load.done:  # else it was removed meanwhile
                del self._loading[load.adapter_id, load.request.load_inplace]
                load.error = self._take(load.request, future, seconds)
                load.done = True
                if load.next is not None:
                    self._start(load.next)
        self._copies.take_over()

    def _take(self, request: LoRARequest, future: Future, seconds: float) -> Exception | None:
        adapter_id = request.lora_int_id
        try:
            loaded = future.result()
            if loaded is not None:
                lora, version = loaded
                self.counters.loads.add(seconds)
                self._require_room(request, version.needs)
                self._require_bytes(request, lora.nbytes)
                there = self.manager.get_adapter(adapter_id) is not None
                if there and not request.load_inplace:
                    self.manager.touch(adapter_id)  # it came meanwhile, and is the newer one
                elif there or self.manager.has_host_room(lora.nbytes):
                    self._put(request, loaded)
                else:  # it is read again when its turn comes
                    self._versions[adapter_id] = version
                    self._let_arrays_go()
        except LoadTimeout as error:
            return self._fail(
                request,
                AdapterError(
                    f"adapter {request.lora_name!r}: loading {error}; raise lora_load_timeout, or "
                    "see to the disk or network that it comes from"
                ),
            )
        except BaseException as error:  # of any kind: only its requests are hurt
            return self._fail(request, as_exception(error))
        self._failures.pop((adapter_id, False), None)
        return None

    def _fail(self, request: LoRARequest, error: Exception) -> Exception:
        """What the load's own requests end with. Those of a version that acts do not."""
        self.counters.failures += 1
        adapter_id = request.lora_int_id
        if not request.load_inplace and self.manager.get_adapter(adapter_id) is not None:
            return error  # it came meanwhile, perhaps from elsewhere
        retry_at = time.monotonic()
        if not isinstance(error, AdapterInUseError):  # which may be over at any time
            retry_at += self.lora_config.lora_retry_seconds
        kept = request if request.lora_tensors is None else None
        self._failures[adapter_id, request.load_inplace] = _Failure(
            request.lora_name, kept, error, retry_at
        )
        return error

    def _nbytes(self, adapter_id: int) -> int:
        """Of an adapter on the host, 0 when it has never been there."""
        version = self._versions.get(adapter_id)
        return 0 if version is None else version.nbytes

    def _require_host_room(self, request: LoRARequest, adapter_id: int) -> None:
        """Raises when pinned adapters leave no place on the host for the adapter."""
        nbytes, name = self._nbytes(adapter_id), f"adapter {request.lora_name!r}"
        self.manager.require_host_room(nbytes, name, beside_pins=True)

    def _failure(self, adapter_id: int) -> _Failure | None:
        """An adapter's own. A failed reload says nothing of a version that is known."""
        reload = None if adapter_id in self._versions else self._failures.get((adapter_id, True))
        return self._failures.get((adapter_id, False)) or reload

    def _require_bytes(self, request: LoRARequest, nbytes: int) -> None:
        budget = self.lora_config.max_cpu_lora_bytes
        if budget is not None and nbytes > budget:
            raise AdapterError(
                f"adapter {request.lora_name!r}: takes {nbytes} bytes of host memory, above "
                f"max_cpu_lora_bytes={budget}; {nbytes} or more would take it"
            )

    def must_read(self, request: LoRARequest) -> bool:
        """Whether an adapter's files must be read before requests for it can be taken.

        Looks at the files' times and sizes, so it may wait for a disk.
        """
        if request.load_inplace:
            return True
        version = self._versions.get(request.lora_int_id)
        if self.manager.get_adapter(request.lora_int_id) is not None:
            return False
        if version is None or version.folder is None:
            return True
        return self._loader.fingerprint(request, self._folder(request, version)) != (
            version.fingerprint
        )

    def load_now(self, requests: Iterable[LoRARequest], onto_host: bool = False) -> None:
        """Reads adapters, several at a time, and waits for them; raises what the first raises.

        For those who have nothing else to do. What has been read before and has not changed stays
        where it is, or is brought onto the host if it has room.
        """
        manager = self.manager
        self._fetch_and_wait(
            one
            for one in requests
            if self.must_read(one)
            or (
                onto_host
                and manager.get_adapter(one.lora_int_id) is None
                and manager.has_host_room()
            )
        )

    def _fetch_and_wait(self, requests: Iterable[LoRARequest]) -> None:
        loads = [self.fetch(one) for one in requests]
        while not all(load.done for load in loads):
            self._loads.wait(_WAIT)
            self.collect()
        for load in loads:
            if load.error is not None:
                raise load.error

    def wait(self, seconds: float) -> None:
        """Until a load or a copy has ended, for at most so long."""
        (self._loads if len(self._loads) else self._copies).wait(seconds)

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return len(self._loads) + len(self._copies) > 0

    # -- what waiting and running requests need ----------------------------------------------

    def want(self, requests: Mapping[int, LoRARequest]) -> set[int]:
        """Prepares the adapters of waiting requests, in the order in which they come.

        Returns those for which `acquire` would have no slot now, as they are on their way.

        requests: by the id of the version that they are bound to, or else their own. As many as the
        host can keep are read, and the next few are copied to the device. Those that come first are
        the last to be evicted.
        """
        manager, wanted = self.manager, self._next_on_host(requests)
        for adapter_id in reversed(wanted):
            manager.touch(adapter_id)
        self._copies.drop_all_but(wanted.keys() | self._placing)
        reads = sum((adapter_id, False) in self._loading for adapter_id in wanted)
        full = self._copies.full  # a mixture may still copy the rest of its components
        for adapter_id, request in wanted.items():
            adapter = manager.get_adapter(adapter_id)
            if adapter is None:
                new = (adapter_id, False) not in self._loading and self._failure(adapter_id) is None
                if adapter_id > 0 and new and reads < 2 * self._loads.limit:
                    reads += 1  # more at a time would outlive those who want them
                    self.fetch(self._as_last_read(request))
            elif full and isinstance(adapter, LoRAModel):
                continue
            elif manager.slot_of(adapter_id) is None:
                self._copies.copy(adapter_id, adapter)
                full = self._copies.full
        return self._on_their_way(requests)

    def _on_their_way(self, adapter_ids: Iterable[int]) -> set[int]:
        """Asked once a step, of all: most of a long queue waits for adapters that are not there."""
        manager, copies, found = self.manager, self._copies, set[int]()
        places, nbytes = manager.room_beside_pins
        for adapter_id in adapter_ids:
            adapter = manager.get_adapter(adapter_id)
            if adapter is None:
                can_come = places > 0 and self._nbytes(adapter_id) <= nbytes
                if can_come and self._failure(adapter_id) is None:
                    found.add(adapter_id)
            elif manager.slot_of(adapter_id) is None and copies.on_their_way(adapter):
                found.add(adapter_id)
        return found

    def _next_on_host(self, requests: Mapping[int, LoRARequest]) -> dict[int, LoRARequest]:
        """The adapters of the first waiting requests, for half of what the host can still keep.

        And for the free slots. The other half is left to those that nobody waits for now, but soon
        will: to make room for the last of a long queue, the host would let go of the most popular
        ones.
        """
        manager, wanted = self.manager, dict[int, LoRARequest]()
        held, kept, budget = manager.held, manager.kept, self.lora_config.max_cpu_lora_bytes
        count, nbytes = manager.capacity - len(kept), 0
        if budget is not None:
            there = manager.list_adapters().items()
            nbytes = budget - sum(one.nbytes for key, one in there if key in kept)
        least_count = min(count // 2, max(count - len(manager.free_slots), 0))
        least_nbytes = nbytes // 2
        for adapter_id, request in requests.items():
            if adapter_id in held:
                continue
            if manager.get_adapter(adapter_id) is None and self._failure(adapter_id) is not None:
                continue
            if adapter_id not in kept:
                count -= 1
                nbytes -= self._versions[adapter_id].nbytes if budget is not None else 0
                first = not wanted and count >= 0 and nbytes >= 0
                if not first and (count < least_count or nbytes < least_nbytes):
                    break
            wanted[adapter_id] = request
        return wanted

    def _as_last_read(self, request: LoRARequest) -> LoRARequest:
        """What the request's id stands for: a reload may have changed that while it waited."""
        version = self._versions.get(request.lora_int_id)
        current = request if version is None or version.request is None else version.request
        return dataclasses.replace(current, load_inplace=False) if current.load_inplace else current

    def acquire(self, request: LoRARequest, adapter_id: int) -> int | None:
        """A slot for a sequence that starts to run, or None when it must wait.

        adapter_id: of the version that it is bound to, or else its own. Raises AdapterError when
        the adapter could not be read again or copied, AdapterInUseError when adapters pinned since
        leave it no place.
        """
        manager = self.manager
        if manager.slot_of(adapter_id) is None:
            adapter = manager.get_adapter(adapter_id)
            if adapter is None:
                failure = self._failure(adapter_id)
                if failure is not None:
                    raise failure.error
                self._require_host_room(request, adapter_id)
                return None
            if not self._copies.are_there(adapter):  # first, as it is quick
                return None
            if adapter_id > 0:
                self._require_room(request, self._versions[adapter_id].needs)
            if not manager.can_activate(adapter_id):
                return None
        return manager.acquire(adapter_id)

    def unbind(self, adapter_id: int) -> None:
        """A request that had begun has ended; a superseded version goes with the last."""
        self.manager.unbind(adapter_id)
        if adapter_id < 0 and self.manager.get_adapter(adapter_id) is None:
            del self._versions[adapter_id]

    def place(self, adapter_id: int) -> bool:
        """Gives an adapter that is on the host a slot, if one can be had.

        False when its copy is on its way to the device, and the call is to be made again.
        """
        manager = self.manager
        self.collect()
        adapter = manager.get_adapter(adapter_id)
        self._placing.discard(adapter_id)
        if adapter is None or not manager.can_activate(adapter_id):
            return True
        if manager.slot_of(adapter_id) is None and not self._copies.are_there(adapter):
            self._placing.add(adapter_id)
            self._copies.copy(adapter_id, adapter, at_once=True)
            return False
        manager.activate_adapter(adapter_id)
        return True

    def stop_placing(self, adapter_ids: Iterable[int]) -> None:
        """Lets go of what `place` has begun for adapters that nobody waits for any more."""
        self._placing -= set(adapter_ids)

    def placeable(self, adapter_ids: Iterable[int]) -> list[int]:
        """Those of the adapters on the host, from the first on, that have slots at once."""
        manager = self.manager
        needs: dict[int, Needs] = {}
        for adapter_id in adapter_ids:
            adapter = manager.get_adapter(adapter_id)
            if adapter is None:
                continue
            more = {**needs, adapter_id: manager.needs(adapter)}
            if not manager.fits(more, beside=manager.held):
                break
            needs = more
        return list(needs)

    # -- unloading ---------------------------------------------------------------------------

    def add_adapter(self, request: LoRARequest, place: bool = True) -> bool:
        """As WorkerLoRAManager's; waits for the disk. place: also gives it a slot (see `place`)."""
        self.check(request)
        manager, adapter_id = self.manager, request.lora_int_id
        before = manager.get_adapter(adapter_id)
        if before is None:
            manager.require_host_room()
        manager.touch(adapter_id)
        if before is None or request.load_inplace:
            self._fetch_and_wait([request])
        if place:
            self.place(adapter_id)
        return manager.get_adapter(adapter_id) is not before

    def pin_adapter(self, adapter_id: int) -> bool:
        """As WorkerLoRAManager's; raises AdapterInUseError for one that is being removed."""
        version = self._versions.get(adapter_id)
        self._require_staying(adapter_id, version.name if version is not None else "")
        return super().pin_adapter(adapter_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter, what its id stood for and a load that is under way."""
        removed = super().remove_adapter(adapter_id)
        self.leaving.discard(adapter_id)
        self._placing.discard(adapter_id)
        self._copies.forget(adapter_id)
        for key in [key for key in self._loading if key[0] == adapter_id]:
            load, removed = self._loading.pop(key), True
            for one in (load, load.next) if load.next is not None else (load,):
                one.error = AdapterError(f"adapter {one.request.lora_name!r} has been removed")
                one.done = True
        for reload in (False, True):
            self._failures.pop((adapter_id, reload), None)
        return removed

    def list_adapters(self) -> set[int]:
        """Ids of the adapters on the host, but for versions that have been superseded."""
        return {adapter_id for adapter_id in super().list_adapters() if adapter_id > 0}

    def known_identity(self, adapter_id: int) -> str | None:
        """Of the version that was read last."""
        version = self._versions.get(adapter_id)
        return None if version is None else version.identity

    # -- what there is -----------------------------------------------------------------------

    def statuses(self) -> dict[int, AdapterStatus]:
        """Every adapter that the engine has heard of, by id; superseded ones by theirs, below 0."""
        superseded = {one for one in self.manager.list_adapters() if one < 0}
        ids = {one for one in self._versions if one > 0} | superseded
        ids |= {adapter_id for adapter_id, _ in [*self._failures, *self._loading]}
        return {adapter_id: self._status(adapter_id) for adapter_id in sorted(ids)}

    def _status(self, adapter_id: int) -> AdapterStatus:
        manager, version = self.manager, self._versions.get(adapter_id)
        adapter, slot = manager.get_adapter(adapter_id), manager.slot_of(adapter_id)
        failure = self._failure(adapter_id)
        loading = next((one for key, one in self._loading.items() if key[0] == adapter_id), None)
        name = version.name if version else failure.name if failure else ""
        reason, retry_in = None, None
        if manager.is_pinned(adapter_id):
            state = AdapterState.PINNED
        elif manager.users(adapter_id):
            state = AdapterState.IN_USE
        elif slot is not None:
            state = AdapterState.ON_DEVICE
        elif adapter is not None:
            state = AdapterState.ON_HOST
        elif loading is not None:
            state, name = AdapterState.LOADING, name or loading.request.lora_name
        elif failure is not None:
            state, reason = AdapterState.FAILED, str(failure.error)
            retry_in = max(failure.retry_at - time.monotonic(), 0.0)
        else:
            state = AdapterState.ON_DISK
        return AdapterStatus(
            name,
            state,
            version.identity if version else "",
            slot,
            adapter.rank if adapter is not None else 0,
            adapter.nbytes if adapter is not None else 0,
            manager.users(adapter_id),
            reason,
            retry_in,
        )

    def stats(self) -> LoRAStats:
        """Counts since the start, and what is where now."""
        manager = self.manager
        return self.counters.snapshot(
            loading=len(self._loads),
            copies=self._copies.durations,
            staged=len(self.staged) + len(self._copies),
            on_host=len(manager.list_adapters()),
            on_device=manager.lora_slots - len(manager.free_slots),
            host_bytes=manager.host_bytes,
            slot_evictions=manager.slot_evictions,
            host_evictions=manager.host_evictions,
            free_slots=len(manager.free_slots),
            free_blocks={name: pool.num_free for name, pool in manager.pools.items()},
        )
