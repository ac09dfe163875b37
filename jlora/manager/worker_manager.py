"""From a LoRARequest to an adapter in a slot: reading, checking, registering, activating."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager.blocks import Needs
from jlora.manager.loader import AdapterLoader, same_words, source
from jlora.manager.lora_model import BaseWeight, LoRAModel
from jlora.manager.manager import LoRAModelManager
from jlora.manager.mixture import Adapter
from jlora.manager.weights import LoRALayerWeights
from jlora.projections import ModuleMap
from jlora.request import LoRARequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterVersion:
    """What an adapter id stands for, from the last time it was loaded.

    request: that loaded it. source: what it named, whatever the spelling. folder: of its files,
    if it has any. needs: what it takes on the device. added_tokens, invocation_tokens: see
    LoRAModel.
    """

    request: LoRARequest
    source: str
    folder: Path | None
    identity: str
    needs: Needs
    added_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()


_Loaded = tuple[Adapter, AdapterVersion]


class WorkerLoRAManager:
    """Serves the adapters that a step names; those that the step does not name are forgotten."""

    def __init__(
        self,
        modules: ModuleMap,
        lora_config: LoRAConfig,
        base_weight: BaseWeight | None = None,
        model_name: str | None = None,
    ) -> None:
        """Starts without adapters. Raises ValueError for a target module the model has not.

        base_weight: reads a tensor of the base's checkpoint, for adapters that bring one along.
        model_name: of the base; adapters that name another one are warned of.
        """
        rows = (*modules.projections, *modules.vocab_projections)
        known = {part.name for row in rows for part in row.parts}
        unknown = sorted(set(lora_config.target_modules or ()) - known)
        if unknown:
            raise ValueError(
                f"target_modules: the model has no {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}"
            )
        self.modules, self.lora_config = modules, lora_config
        self.manager = LoRAModelManager(modules, lora_config)
        self._loader = AdapterLoader(modules, lora_config, base_weight, model_name)
        self._versions: dict[int, AdapterVersion] = {}

    # -- vLLM's interface ------------------------------------------------------------------

    def list_adapters(self) -> set[int]:
        """Ids of the adapters on the host."""
        return set(self.manager.list_adapters())

    def add_adapter(self, request: LoRARequest) -> bool:
        """Loads an adapter, and activates it when a slot can be had; False if it was there.

        Raises AdapterError for an adapter that cannot be served, AdapterInUseError when every
        slot is pinned; nothing is changed then.
        """
        self._require_room(request)
        loaded = self._read(request)
        self._require_room(request, self._needs(request.lora_int_id, loaded))
        added = self._put(request, loaded)
        if self.manager.can_activate(request.lora_int_id):
            self.manager.activate_adapter(request.lora_int_id)
        return added

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter and which path its id stood for; False when it is not there."""
        removed = self.manager.remove_adapter(adapter_id)
        self._versions.pop(adapter_id, None)
        if removed:
            logger.info("removed adapter %d", adapter_id)
        return removed

    def pin_adapter(self, adapter_id: int) -> bool:
        """See LoRAModelManager.pin_adapter."""
        pinned = self.manager.pin_adapter(adapter_id)
        logger.info("pinned adapter %d", adapter_id)
        return pinned

    def set_active_adapters(self, requests: Iterable[LoRARequest | None]) -> None:
        """Makes the adapters of a step active; with an error nothing is changed."""
        wanted = self._one_each(requests)
        if len(wanted) > self.manager.lora_slots:
            raise AdapterInUseError(
                f"{len(wanted)} adapters in one step, but max_loras={self.manager.lora_slots}"
            )
        loaded = {adapter_id: self._read(request) for adapter_id, request in wanted.items()}
        needs = {adapter_id: self._needs(adapter_id, one) for adapter_id, one in loaded.items()}
        if not self.manager.fits(needs, beside=self.manager.held):
            raise AdapterInUseError(
                f"no slots or rank blocks for the adapters {', '.join(map(str, wanted))} at once "
                "beside those pinned or in use; raise max_loras or lora_pool_blocks"
            )
        self._forget_others(set(wanted))
        # First to the end of the LRU order, so that none of them makes room for another.
        for adapter_id in wanted:
            self.manager.touch(adapter_id)
        for adapter_id, request in wanted.items():
            self._put(request, loaded[adapter_id])
            self.manager.activate_adapter(adapter_id)

    def _one_each(self, requests: Iterable[LoRARequest | None]) -> dict[int, LoRARequest]:
        wanted: dict[int, LoRARequest] = {}
        for request in requests:
            if request is None:
                continue
            other = wanted.get(request.lora_int_id, request)
            if source(other) != source(request):
                raise AdapterError(
                    f"adapter {request.lora_name!r}: id {request.lora_int_id} stands for "
                    f"{other.lora_path} in the same step, not {request.lora_path}; use another id"
                )
            wanted[request.lora_int_id] = other if other.load_inplace else request
        return wanted

    def _forget_others(self, wanted: set[int]) -> None:
        for adapter_id in self.list_adapters() - wanted - self.manager.held:
            self.manager.remove_adapter(adapter_id)

    # -- the engine's interface ------------------------------------------------------------

    def check(self, request: LoRARequest) -> AdapterVersion:
        """Makes sure, before a request is admitted, that its adapter can be served.

        Reads it (keeping it on the host when there is room). Returns the version that there is.
        """
        adapter_id = request.lora_int_id
        known = self._known(request)
        self._require_room(request)
        if self.manager.get_adapter(adapter_id) is not None or self.manager.has_host_room():
            loaded = self._read(request)
            self._require_room(request, self._needs(adapter_id, loaded))
            self._put(request, loaded)
        else:
            if known is None or known.identity != self._identity_now(request, known):
                self._versions[adapter_id] = self._load(request)[1]
            self._require_room(request, self._versions[adapter_id].needs)
        return self._versions[adapter_id]

    def acquire(self, request: LoRARequest) -> int | None:
        """A slot for a request that starts to run, or None when it must wait for others to end.

        Raises AdapterError when the adapter must be read again and cannot, AdapterInUseError when
        adapters pinned since leave it no place.
        """
        adapter_id, manager = request.lora_int_id, self.manager
        known = self._known(request)
        if manager.slot_of(adapter_id) is None:
            self._require_room(request, known.needs if known is not None else None)
            if not manager.has_slot_room():
                return None
            if manager.get_adapter(adapter_id) is None:
                # Not read before it has a place, or those that wait would evict each other.
                if not manager.has_host_room() or (known and not manager.can_place(known.needs)):
                    return None
                self._put(request, self._read(request))
            if not manager.can_activate(adapter_id):
                return None
        return manager.acquire(adapter_id)

    def version(self, adapter_id: int) -> AdapterVersion:
        """The version on the host, or else the one that was read last."""
        return self._versions[adapter_id]

    def identity(self, adapter_id: int) -> str:
        """Of that version."""
        return self._versions[adapter_id].identity

    # -- warm-up ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def maybe_select_dummy_loras(self, lora_config: LoRAConfig | None) -> Iterator[list[int]]:
        """Fills every slot with an adapter of the largest rank; yields their ids.

        Fewer slots when the pool has not blocks for so many. For warm-up and memory profiling, on
        a manager that holds no adapters yet; they are gone afterwards. Without a lora_config
        nothing happens.
        """
        slots = 0
        if lora_config is not None:
            if self.manager.list_adapters():
                raise RuntimeError("dummy adapters are for a manager that holds none yet")
            slots = min(lora_config.max_loras, lora_config.pool_blocks // lora_config.rank_blocks)
        ids = list(range(1, slots + 1))
        try:
            for adapter_id in ids:
                self.manager.add_adapter(self._dummy(adapter_id))
                self.manager.activate_adapter(adapter_id)
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

    def _known(self, request: LoRARequest) -> AdapterVersion | None:
        """What the request's id stands for; raises AdapterError when that is something else."""
        known = self._versions.get(request.lora_int_id)
        if known is None or request.load_inplace or same_words(request, known.request):
            return known
        named = source(request)
        if named != known.source:
            raise AdapterError(
                f"adapter {request.lora_name!r}: id {request.lora_int_id} stands for "
                f"{known.source}, not {named}; use another id, or remove_lora first"
            )
        return known

    def _require_room(self, request: LoRARequest, needs: Needs | None = None) -> None:
        """Raises when pinned adapters leave no slot, or not the blocks, for the adapter."""
        manager, name = self.manager, f"adapter {request.lora_name!r}"
        if not manager.fits({request.lora_int_id: {}}, beside=manager.pinned):
            raise AdapterInUseError(
                f"{name}: all {manager.lora_slots} slots hold pinned adapters; raise max_loras or "
                "remove one"
            )
        if needs is not None and not manager.fits({request.lora_int_id: needs}, manager.pinned):
            options = {
                "lora_pool_blocks": self.lora_config.pool_blocks,
                "lora_expert_blocks": self.lora_config.lora_expert_blocks,
                "max_lora_full_weights": self.lora_config.max_lora_full_weights,
            }
            short = manager.short_of({request.lora_int_id: needs}, manager.pinned)
            raised = " and ".join(f"{one} (now {options[one]})" for one in short)
            raise AdapterInUseError(
                f"{name}: pinned adapters leave too few rank blocks for it; raise {raised} or "
                "remove one"
            )

    def _needs(self, adapter_id: int, loaded: _Loaded | None) -> Needs:
        version = self._versions[adapter_id] if loaded is None else loaded[1]
        return version.needs

    def _folder(self, request: LoRARequest, known: AdapterVersion | None) -> Path | None:
        """Where its files are known to be; a Hub repository is not asked for what is there."""
        there = known.folder if known is not None and not request.load_inplace else None
        return there if there is not None and there.is_dir() else None

    def _identity_now(self, request: LoRARequest, known: AdapterVersion | None) -> str:
        return self._loader.identity(request, self._folder(request, known))

    def _read(self, request: LoRARequest) -> _Loaded | None:
        """What is to be put on the host, None when what is there will do. Changes nothing."""
        self._known(request)
        current = self.manager.get_adapter(request.lora_int_id)
        if current is None:
            return self._load(request)
        if not request.load_inplace:
            return None
        if self._identity_now(request, None) == current.identity:
            return None
        if self.manager.in_use(current.id):
            raise AdapterInUseError(
                f"adapter {request.lora_name!r} is in use by running requests; reload it when "
                "they have finished"
            )
        return self._load(request)

    def _put(self, request: LoRARequest, loaded: _Loaded | None) -> bool:
        """Registers what `_read` gave; only now may another adapter be evicted."""
        if loaded is None:
            self.manager.touch(request.lora_int_id)
            return False
        lora, version = loaded
        if self.manager.get_adapter(lora.id) is None:
            self.manager.add_adapter(lora)
        else:
            self.manager.replace_adapter(lora)
        self._versions[lora.id] = version
        return True

    def _load(self, request: LoRARequest) -> _Loaded:
        known = self._known(request)
        adapter, folder = self._loader.load(request, self._folder(request, known), self._on_host)
        plain = adapter if isinstance(adapter, LoRAModel) else None
        return adapter, AdapterVersion(
            request,
            source(request),
            folder,
            adapter.identity,
            self.manager.needs(adapter),
            plain.added_tokens if plain is not None else 0,
            plain.invocation_tokens if plain is not None else (),
        )

    def _on_host(self, request: LoRARequest) -> Adapter | None:
        """What the request names, if it is on the host already."""
        return self.manager.get_adapter(request.lora_int_id) if self._known(request) else None


class LRUCacheWorkerLoRAManager(WorkerLoRAManager):
    """Keeps adapters that a step does not name, until the least recently used must make room."""

    def _forget_others(self, wanted: set[int]) -> None:
        pass
