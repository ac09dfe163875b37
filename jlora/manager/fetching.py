"""Adapters read in the background, for an engine that never waits for a disk.

Threads read (`loads.py`); everything else is done by the one thread that drives the engine, between
steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager.copies import as_exception
from jlora.manager.loader import same_source, source
from jlora.manager.loads import BackgroundLoads, LoadTimeout
from jlora.manager.stats import Counters
from jlora.manager.worker_manager import AdapterVersion, LRUCacheWorkerLoRAManager
from jlora.request import LoRARequest

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


class FetchingLoRAManager(LRUCacheWorkerLoRAManager):
    """The worker manager that reads adapters in threads, and remembers what could not be read."""

    def __init__(
        self,
        *arguments: Any,
        prepare: Callable[[AdapterVersion], Any] = lambda _: None,
        **options: Any,
    ) -> None:
        """As WorkerLoRAManager.

        prepare: does, in the background, what requests for a version will need besides (its
        tokeniser).
        """
        super().__init__(*arguments, **options)
        config = self.lora_config
        self._prepare = prepare
        self._loads = BackgroundLoads(config.max_lora_loads, config.lora_load_timeout)
        self._loading: dict[tuple[int, bool], Load] = {}  # by id and load_inplace
        self._failures: dict[tuple[int, bool], _Failure] = {}  # likewise
        self.leaving: set[int] = set()  # refuse new requests, and go with their last one
        self.counters = Counters()

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

    def pin_adapter(self, adapter_id: int) -> bool:
        """As WorkerLoRAManager's; raises AdapterInUseError for one that is being removed."""
        version = self._versions.get(adapter_id)
        self._require_staying(adapter_id, version.name if version is not None else "")
        return super().pin_adapter(adapter_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter, what its id stood for and a load that is under way."""
        removed = super().remove_adapter(adapter_id)
        self.leaving.discard(adapter_id)
        for key in [key for key in self._loading if key[0] == adapter_id]:
            load, removed = self._loading.pop(key), True
            for one in (load, load.next) if load.next is not None else (load,):
                one.error = AdapterError(f"adapter {one.request.lora_name!r} has been removed")
                one.done = True
        for reload in (False, True):
            self._failures.pop((adapter_id, reload), None)
        return removed

    def known_identity(self, adapter_id: int) -> str | None:
        """Of the version that was read last."""
        version = self._versions.get(adapter_id)
        return None if version is None else version.identity
