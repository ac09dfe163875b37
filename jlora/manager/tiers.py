"""What waiting and running requests need, brought from disk to host to device ahead of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jlora.manager.blocks import Needs
from jlora.manager.copies import Copies
from jlora.manager.fetching import FetchingLoRAManager
from jlora.manager.lora_model import LoRAModel
from jlora.manager.stats import AdapterState, AdapterStatus, LoRAStats
from jlora.request import LoRARequest


class TieredLoRAManager(FetchingLoRAManager):
    """The worker manager of an engine: has in the right place what requests will need."""

    def __init__(
        self,
        *arguments: Any,
        stage: Callable[[LoRAModel], Any] | None = None,
        **options: Any,
    ) -> None:
        """As FetchingLoRAManager.

        stage: makes, in the background, what the device needs to write an adapter's blocks; it is
        handed to whoever writes them (`staged`). None: adapters need no such thing.
        """
        super().__init__(*arguments, **options)
        config = self.lora_config
        self._copies = Copies(
            self.manager, stage, config.max_staged_loras, config.lora_load_timeout
        )
        self._placing: set[int] = set()

    @property
    def staged(self) -> dict[str, Any]:
        """What `stage` has made and nobody has written yet, by LoRAModel.key."""
        return self._copies.staged

    def collect(self) -> None:
        """Takes over what threads have done."""
        super().collect()
        self._copies.take_over()

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

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter, what its id stood for, and a load or copy that is under way."""
        removed = super().remove_adapter(adapter_id)
        self._placing.discard(adapter_id)
        self._copies.forget(adapter_id)
        return removed

    def list_adapters(self) -> set[int]:
        """Ids of the adapters on the host, but for versions that have been superseded."""
        return {adapter_id for adapter_id in super().list_adapters() if adapter_id > 0}

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
