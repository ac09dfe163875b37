"""What an engine does with adapters: loading, unloading, and the requests that wait for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jlora.config import EngineArgs
from jlora.engine.arrivals import Arrival, Arrivals, failed_request
from jlora.engine.kv_pages import PageAllocator
from jlora.engine.runner import ModelRunner
from jlora.engine.sequence import RequestState
from jlora.errors import AdapterInUseError
from jlora.manager import (
    AdapterStatus,
    AdapterVersion,
    Load,
    LoRAModel,
    LoRAResolver,
    LoRAStats,
    TieredLoRAManager,
    resolve,
)
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)
IDLE_SECONDS = 0.01  # that is waited for an adapter when there is nothing else to do


class AdapterMethods:
    """The part of LLMEngine that is about adapters."""

    args: EngineArgs
    lora: TieredLoRAManager | None
    runner: ModelRunner
    pages: PageAllocator
    _requests: dict[str, RequestState]
    _arrivals: Arrivals
    _resolved: dict[str, LoRARequest]

    if TYPE_CHECKING:  # LLMEngine's

        def abort_request(self, request_id: str | Iterable[str]) -> None: ...

        def _queue(self, arrival: Arrival, version: AdapterVersion | None) -> None: ...

    def _manager(self) -> TieredLoRAManager:
        if self.lora is None:
            raise ValueError("the engine was made without enable_lora=True")
        return self.lora

    def add_lora(self, lora_request: LoRARequest, *, place: bool = True) -> bool:
        """Loads an adapter before it is asked for; False when it was there already.

        With load_inplace it replaces the version that is there: requests that have begun end with
        that one, those that wait take the new one.
        """
        if not isinstance(lora_request, LoRARequest):
            raise ValueError(
                f"lora_request must be a LoRARequest, not {type(lora_request).__name__}"
            )
        added = self._manager().add_adapter(lora_request, place=False)
        if place:
            self._place_now(lora_request.lora_int_id)
        return added

    def place_lora(self, lora_id: int) -> bool:
        """Gives a loaded adapter a slot if one can be had; False when its copy is on its way."""
        placed = self._manager().place(lora_id)
        self._write_adapters()
        return placed

    def stop_placing(self, lora_id: int) -> None:
        """Nobody goes on to call `place_lora` for the adapter."""
        self._manager().stop_placing([lora_id])

    def _place_now(self, lora_id: int) -> None:
        try:
            while not self.place_lora(lora_id):
                self._manager().wait(IDLE_SECONDS)
        finally:
            self.stop_placing(lora_id)

    def _write_adapters(self) -> None:
        """Has the device write what the manager has placed since the last time."""
        if self.lora is not None and self.runner.pool is not None:
            self.runner.pool.apply(self.lora.manager, self.lora.staged)

    def remove_lora(self, lora_id: int, when_in_use: str = "refuse") -> bool:
        """Forgets an adapter: slot, blocks, host memory, cached prefixes; False when unknown.

        when_in_use: what is to become of requests that use it. "refuse": AdapterInUseError, and
        nothing changes. "drain": they end as they would have, new ones are refused, and it goes
        with the last. "abort": they are aborted.
        """
        if when_in_use not in ("refuse", "drain", "abort"):
            raise ValueError(f"when_in_use={when_in_use!r} must be refuse, drain or abort")
        manager, requests = self._manager(), self.requests_of(lora_id)
        if requests and when_in_use == "drain":
            manager.leaving.add(lora_id)
            return True
        if when_in_use == "abort":  # those with an older version, too
            manager.leaving.discard(lora_id)  # it goes here, and not with the last of them
            self.abort_request(self.requests_naming(lora_id))
        elif requests:
            running = manager.manager.users(lora_id)
            waiting = f"wanted by {len(requests)} waiting"
            use = f"in use by {running} running" if running else waiting
            raise AdapterInUseError(
                f"adapter {lora_id} is {use} sequences; remove it when they have finished, abort "
                'them, or say when_in_use="drain" or "abort"'
            )
        return self._forget(lora_id)

    def requests_of(self, lora_id: int) -> list[str]:
        """Ids of the requests that wait for an adapter or use it."""
        there = [one.request_id for one in self._requests.values() if one.adapter_id == lora_id]
        return [*there, *self._arrivals.ids_of(lora_id)]

    def requests_naming(self, lora_id: int) -> list[str]:
        """Ids of the requests that came with an adapter's id, whichever version they have."""
        requests = ((name, one.lora_request) for name, one in self._requests.items())
        there = [name for name, lora in requests if lora and lora.lora_int_id == lora_id]
        return [*there, *self._arrivals.ids_of(lora_id)]

    def _forget(self, lora_id: int) -> bool:
        manager = self._manager()
        identity = manager.known_identity(lora_id)
        removed = manager.remove_adapter(lora_id)
        if identity is not None:
            self.pages.forget(identity)
        self._resolved = {n: one for n, one in self._resolved.items() if one.lora_int_id != lora_id}
        return removed

    def resolve_lora(self, lora_name: str) -> LoRARequest:
        """The request for an adapter that a client knows by name only: see `lora_resolvers`.

        May ask the Hub, and waits for it. The same name is the same request until its adapter is
        removed. Raises AdapterError for a name that no resolver knows, or that one refuses.
        """
        known = self._resolved.get(lora_name)
        return known or self.name_lora(lora_name, resolve(self.resolvers, lora_name))

    @property
    def resolvers(self) -> Sequence[LoRAResolver]:
        """Who is asked for adapters by name."""
        return self.args.lora_resolvers or ()

    def name_lora(self, lora_name: str, lora_path: str) -> LoRARequest:
        """A request, under an id that nobody uses, for what a resolver has found."""
        if lora_name not in self._resolved:
            used = {*self._manager().statuses(), *(o.lora_int_id for o in self._resolved.values())}
            request = LoRARequest(lora_name, max(used | {0}) + 1, lora_path)
            self._resolved[lora_name] = request
        return self._resolved[lora_name]

    def lora_statuses(self) -> dict[int, AdapterStatus]:
        """Where every adapter is that the engine has heard of, by id.

        A version that requests still use after it was replaced has an id below 0.
        """
        self.collect_loads()  # perhaps nobody steps
        return self._manager().statuses()

    def lora_stats(self) -> LoRAStats:
        """Hits, loads, evictions, waits, and what is where now."""
        self.collect_loads()
        return self._manager().stats()

    def pin_lora(self, lora_id: int) -> bool:
        """Keeps a loaded adapter in its slot until it is removed.

        Raises AdapterInUseError for one that is being removed.
        """
        self._place_now(lora_id)
        return self._manager().pin_adapter(lora_id)

    def list_loras(self) -> set[int]:
        """Ids of the adapters in host memory."""
        return self._manager().list_adapters()

    def lora_identity(self, lora_id: int) -> str | None:
        """A hash of what the adapter on the host holds; None when there is none of that id."""
        adapter = self._manager().manager.get_adapter(lora_id)
        return None if adapter is None else adapter.identity

    def lora_tensor_counts(self, lora_id: int) -> dict[str, int]:
        """How many of an adapter's tensors went to each row of the projection table, or to "bias".

        Raises KeyError when the adapter is not on the host. A mixture has none of its own.
        """
        adapter = self._manager().manager.list_adapters()[lora_id]
        return dict(adapter.tensor_counts) if isinstance(adapter, LoRAModel) else {}

    # -- requests that need adapters ------------------------------------------------------

    def _lora_of(self, lora_request: LoRARequest) -> TieredLoRAManager:
        if self.lora is None:
            raise ValueError(
                f"the request names adapter {lora_request.lora_name!r}, but the engine was made "
                "without enable_lora=True"
            )
        return self.lora

    def _read_adapter(self, lora_request: LoRARequest) -> AdapterVersion:
        """The version that would act now; reads it, and waits for that, if it is not there."""
        lora = self._lora_of(lora_request)
        lora.known(lora_request)
        lora.load_now([lora_request], onto_host=True)
        return lora.version(lora_request.lora_int_id)

    def start_loading(self, lora_request: LoRARequest) -> Load | None:
        """Reads an adapter in the background, if need be."""
        lora = self._lora_of(lora_request)
        lora.check(lora_request)
        return lora.fetch(lora_request) if lora.must_read(lora_request) else None

    def collect_loads(self) -> None:
        """Takes over what has been read in the background; a step does so, too."""
        self._manager().collect()

    def load_loras(self, requests: Iterable[LoRARequest]) -> None:
        """Reads the adapters of requests that are to come, several at a time, and waits for them.

        While nobody runs they are given slots, too, as far as there are any: if all have one, which
        requests share a step does not depend on how long a copy takes. Raises what is wrong with
        the first that cannot be served.
        """
        first: dict[int, LoRARequest] = {}
        for one in requests:
            first.setdefault(one.lora_int_id, one)
        for one in first.values():
            self._lora_of(one).check(one)
        if not first:
            return
        manager = self._manager()
        manager.load_now(first.values())
        together = manager.lora_config.max_staged_loras
        missing = [] if self._requests else manager.placeable(first)
        try:
            while missing:
                ahead = missing[:together]
                waiting = [one for one in ahead if not self.place_lora(one)]
                missing = waiting + missing[len(ahead) :]
                if waiting:
                    manager.wait(IDLE_SECONDS)
        finally:
            manager.stop_placing(first)

    def _take_arrivals(self, changed: dict[str, RequestState]) -> None:
        """Queues the requests whose adapters have been read; ends those whose could not be."""
        if self.lora is None:
            return
        self.lora.collect()
        for arrival, error in self._arrivals.take():
            try:
                if error is not None:
                    raise error
                self._queue(arrival, self.lora.version(arrival.adapter_id))
            except Exception as why:  # of any kind: the others must go on
                request = failed_request(arrival, why)
                changed[request.request_id] = self._requests[request.request_id] = request
                logger.error("request %s failed: %s", request.request_id, why)

    def _follow_version(self, old: int, new: int) -> None:
        """Requests that have begun with a version go on with it under its new id."""
        for request in self._requests.values():
            if request.adapter_id == old and request.adapter_identity:
                request.adapter_id = new

    def _remove_leaving(self) -> None:
        """Removes the adapters that were to go with their last request."""
        for adapter_id in list(self.lora.leaving) if self.lora is not None else ():
            if not self.requests_of(adapter_id):
                self._forget(adapter_id)
