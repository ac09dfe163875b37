"""From a LoRARequest to an adapter in a slot: reading, checking, registering, activating."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager.lora_model import LoRALayerWeights, LoRAModel
from jlora.manager.manager import LoRAModelManager
from jlora.manager.peft import file_identity, resolve_adapter_path
from jlora.projections import ModuleMap
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)


class WorkerLoRAManager:
    """Serves the adapters that a step names; those that the step does not name are forgotten."""

    def __init__(self, modules: ModuleMap, lora_config: LoRAConfig) -> None:
        """Starts without adapters."""
        self.modules, self.lora_config = modules, lora_config
        self.manager = LoRAModelManager(modules, lora_config)
        self._sources: dict[int, str] = {}  # adapter id -> the path it was first loaded from
        self._checked: dict[int, str] = {}  # adapter id -> identity of the version found good

    # -- vLLM's interface ------------------------------------------------------------------

    def list_adapters(self) -> set[int]:
        """Ids of the adapters on the host."""
        return set(self.manager.list_adapters())

    def add_adapter(self, request: LoRARequest) -> bool:
        """Loads an adapter, and activates it when a slot can be had; False if it was there.

        Raises AdapterError for an adapter that cannot be served, AdapterInUseError when every
        slot is pinned; nothing is changed then.
        """
        if not self.manager.can_ever_activate(request.lora_int_id):
            raise AdapterInUseError(
                f"adapter {request.lora_name!r}: all {self.manager.lora_slots} slots hold pinned "
                "adapters; raise max_loras or remove one"
            )
        added = self._register(request)
        if self.manager.can_activate(request.lora_int_id):
            self.manager.activate_adapter(request.lora_int_id)
        return added

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter and which path its id stood for; False when it is not there."""
        removed = self.manager.remove_adapter(adapter_id)
        self._sources.pop(adapter_id, None)
        self._checked.pop(adapter_id, None)
        if removed:
            logger.info("removed adapter %d", adapter_id)
        return removed

    def pin_adapter(self, adapter_id: int) -> bool:
        """See LoRAModelManager.pin_adapter."""
        pinned = self.manager.pin_adapter(adapter_id)
        logger.info("pinned adapter %d", adapter_id)
        return pinned

    def set_active_adapters(self, requests: Iterable[LoRARequest | None]) -> None:
        """Makes the adapters of a step active, all of them or (on an error) none newly."""
        wanted = {request.lora_int_id: request for request in requests if request is not None}
        if len(wanted) > self.manager.lora_slots:
            raise AdapterInUseError(
                f"{len(wanted)} adapters in one step, but max_loras={self.manager.lora_slots}"
            )
        self._forget_others(set(wanted))
        for request in wanted.values():
            self._register(request)
        for adapter_id in wanted:
            self.manager.activate_adapter(adapter_id)

    def _forget_others(self, wanted: set[int]) -> None:
        for adapter_id in self.list_adapters() - wanted:
            if not self.manager.in_use(adapter_id):
                self.manager.remove_adapter(adapter_id)

    # -- the engine's interface ------------------------------------------------------------

    def check(self, request: LoRARequest) -> str:
        """Makes sure, before a request is admitted, that its adapter can be served.

        Reads it (keeping it on the host when there is room). Returns the version's identity.
        """
        adapter_id = request.lora_int_id
        self._check_source(request)
        if not self.manager.can_ever_activate(adapter_id):
            raise AdapterInUseError(
                f"adapter {request.lora_name!r}: all {self.manager.lora_slots} slots hold pinned "
                "adapters; raise max_loras or remove one"
            )
        lora = self.manager.get_adapter(adapter_id)
        if lora is not None and not request.load_inplace:
            return lora.identity
        if self.manager.has_host_room() or lora is not None:
            self._register(request)
            return self._checked[adapter_id]
        folder = resolve_adapter_path(request.lora_path, f"adapter {request.lora_name!r}")
        identity = file_identity(folder)
        if self._checked.get(adapter_id) != identity:
            identity = self._load(request).identity
        self._remember(request, identity)
        return identity

    def acquire(self, request: LoRARequest) -> int | None:
        """A slot for a request that starts to run, or None when it must wait for others to end.

        Raises AdapterError when the adapter must be read again and cannot.
        """
        adapter_id, manager = request.lora_int_id, self.manager
        if manager.slot_of(adapter_id) is None:
            if not manager.has_slot_room():
                return None
            if manager.get_adapter(adapter_id) is None:
                if not manager.has_host_room():
                    return None
                self._register(request)
            if not manager.can_activate(adapter_id):
                return None
        return manager.acquire(adapter_id)

    def identity(self, adapter_id: int) -> str:
        """The identity of the version on the host."""
        lora = self.manager.get_adapter(adapter_id)
        if lora is None:
            raise KeyError(adapter_id)
        return lora.identity

    # -- warm-up ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def maybe_select_dummy_loras(self, lora_config: LoRAConfig | None) -> Iterator[list[int]]:
        """Fills every slot with an adapter of the largest rank; yields their ids.

        For warm-up and memory profiling, on a manager that holds no adapters yet; they are gone
        afterwards. Without a lora_config nothing happens.
        """
        ids = [] if lora_config is None else list(range(1, lora_config.max_loras + 1))
        for adapter_id in ids:
            self.manager.add_adapter(self._dummy(adapter_id))
            self.manager.activate_adapter(adapter_id)
        try:
            yield ids
        finally:
            for adapter_id in ids:
                self.manager.remove_adapter(adapter_id)

    def _dummy(self, adapter_id: int) -> LoRAModel:
        rank, zero = self.lora_config.max_lora_rank, np.zeros((), ml_dtypes.bfloat16)
        loras = {}
        for name in self.modules.names():
            place = self.modules.place(name)
            assert place is not None  # names() are the places
            width = place.projection.parts[place.part].width
            a = np.broadcast_to(zero, (rank, place.projection.d_in))
            loras[name] = LoRALayerWeights(
                name, rank, rank, a, np.broadcast_to(zero, (width, rank)), 1.0
            )
        return LoRAModel(adapter_id, rank, loras, f"dummy:{adapter_id}")

    # -- loading ---------------------------------------------------------------------------

    def _check_source(self, request: LoRARequest) -> None:
        known = self._sources.get(request.lora_int_id)
        if known is not None and known != _source(request) and not request.load_inplace:
            raise AdapterError(
                f"adapter {request.lora_name!r}: id {request.lora_int_id} stands for {known}, not "
                f"{request.lora_path}; use another id, or remove_lora first"
            )

    def _remember(self, request: LoRARequest, identity: str) -> None:
        self._sources[request.lora_int_id] = _source(request)
        self._checked[request.lora_int_id] = identity

    def _register(self, request: LoRARequest) -> bool:
        """Puts the adapter on the host; loads before anything is evicted."""
        self._check_source(request)
        adapter_id = request.lora_int_id
        current = self.manager.get_adapter(adapter_id)
        if current is not None:
            if not request.load_inplace or not self._changed(request, current):
                self.manager.touch(adapter_id)
                return False
            if self.manager.in_use(adapter_id):
                raise AdapterInUseError(
                    f"adapter {request.lora_name!r} is in use by running requests; reload it when "
                    "they have finished"
                )
        lora = self._load(request)
        if current is not None:
            self._replace(current, lora)
        else:
            self.manager.add_adapter(lora)
        self._remember(request, lora.identity)
        return True

    def _replace(self, current: LoRAModel, lora: LoRAModel) -> None:
        pinned = self.manager.is_pinned(current.id)
        self.manager.remove_adapter(current.id)
        self.manager.add_adapter(lora)
        if pinned:
            self.manager.pin_adapter(lora.id)

    def _changed(self, request: LoRARequest, current: LoRAModel) -> bool:
        folder = resolve_adapter_path(request.lora_path, f"adapter {request.lora_name!r}")
        return file_identity(folder) != current.identity

    def _load(self, request: LoRARequest) -> LoRAModel:
        name, start = f"adapter {request.lora_name!r}", time.perf_counter()
        try:
            lora = LoRAModel.from_local_checkpoint(
                resolve_adapter_path(request.lora_path, name),
                request.lora_int_id,
                self.modules,
                self.lora_config,
                name,
            )
        except AdapterError as error:
            logger.warning("refused %s", error)
            raise
        logger.info(
            "loaded %s (id %d, rank %d, %.1f MB) in %.0f ms",
            name,
            lora.id,
            lora.rank,
            lora.nbytes / 1e6,
            (time.perf_counter() - start) * 1e3,
        )
        return lora


class LRUCacheWorkerLoRAManager(WorkerLoRAManager):
    """Keeps adapters that a step does not name, until the least recently used must make room."""

    def _forget_others(self, wanted: set[int]) -> None:
        for adapter_id in wanted:
            self.manager.touch(adapter_id)


def _source(request: LoRARequest) -> str:
    path = os.path.expanduser(request.lora_path)
    return os.path.realpath(path) if os.path.isdir(path) else request.lora_path
