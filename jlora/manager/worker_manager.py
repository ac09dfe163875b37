"""From a LoRARequest to an adapter in a slot: reading, checking, registering, activating."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
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

    name: of the request that loaded it. request: itself; None when that would keep alive the
    arrays of an adapter that is not on the host any more. source: what it named, whatever the
    spelling. folder: of its files, if it has any. identity: a hash of what it holds. fingerprint:
    tells without reading whether its files have changed since. nbytes: of its tensors. needs: what
    it takes on the device. added_tokens, invocation_tokens: see LoRAModel.
    """

    name: str
    request: LoRARequest | None
    source: str
    folder: Path | None
    identity: str
    fingerprint: str
    nbytes: int
    needs: Needs
    added_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()

    def takes_requests_for(self, other: AdapterVersion) -> bool:
        """Whether what was found out about a request for the other one holds for this one."""
        mine, others = self.added_tokens, other.added_tokens
        return mine == others and self.invocation_tokens == other.invocation_tokens


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
        # Told the id, and the id under which its last version lives on for its requests.
        self.on_superseded: Callable[[int, int], object] = lambda old, new: None

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
                    f"{source(other)} in the same step, not {source(request)}; use another id"
                )
            wanted[request.lora_int_id] = other if other.load_inplace else request
        return wanted

    def _forget_others(self, wanted: set[int]) -> None:
        for adapter_id in self.list_adapters() - wanted - self.manager.held:
            self.manager.remove_adapter(adapter_id)

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
            if place.projection.experts:  # reserved on request, and by far larger
                continue
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
        if known is None or request.load_inplace:
            return known
        if known.request is not None and same_words(request, known.request):
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
        short = manager.short_of({request.lora_int_id: needs or {}}, manager.pinned)
        if short is not None:
            raise AdapterInUseError(
                f"{name}: {'pinned adapters leave' if manager.pinned else 'there are'} too few "
                f"rank blocks of {short} for it; raise {self._pool_option(short)} or remove one"
            )

    def _pool_option(self, name: str) -> str:
        """The option that sets how many blocks a pool has, and its value."""
        row, config = self.manager.rows.get(name), self.lora_config
        if row is None:
            return f"max_lora_full_weights (now {config.max_lora_full_weights})"
        if row.experts:
            return f"lora_expert_blocks (now {config.lora_expert_blocks})"
        return f"lora_pool_blocks (now {config.pool_blocks})"

    def _needs(self, adapter_id: int, loaded: _Loaded | None) -> Needs:
        version = self._versions[adapter_id] if loaded is None else loaded[1]
        return version.needs

    def _folder(self, request: LoRARequest, known: AdapterVersion | None) -> Path | None:
        """Where its files are known to be; a Hub repository is not asked for what is there."""
        there = known.folder if known is not None and not request.load_inplace else None
        return there if there is not None and there.is_dir() else None

    def _read(self, request: LoRARequest) -> _Loaded | None:
        """What is to be put on the host, None when what is there will do. Changes nothing."""
        self._known(request)
        current = self.manager.get_adapter(request.lora_int_id)
        if current is not None and not request.load_inplace:
            return None
        if current is not None and self._loader.fingerprint(request) == current.fingerprint:
            return None
        return self._load(request)

    def _put(self, request: LoRARequest, loaded: _Loaded | None) -> bool:
        """Registers what `_read` gave; only now may another adapter be evicted.

        A version that requests have begun with lives on under another id.
        """
        if loaded is None:
            self.manager.touch(request.lora_int_id)
            return False
        (lora, version), manager = loaded, self.manager
        current = manager.get_adapter(lora.id)
        if current is None:
            manager.add_adapter(lora)
        elif current.identity == lora.identity:
            manager.touch(lora.id)  # the files were written again, with the same in them
            if isinstance(current, LoRAModel):
                current.fingerprint = lora.fingerprint
        elif manager.in_use(lora.id):
            self._supersede(lora)
        else:
            manager.replace_adapter(lora)
        self._versions[lora.id] = version
        self._let_arrays_go()
        return True

    def _supersede(self, lora: Adapter) -> None:
        """Puts a new version beside one that is in use."""
        manager = self.manager
        pinned = manager.is_pinned(lora.id)
        beside = {lora.id: manager.needs(manager.list_adapters()[lora.id]), 0: manager.needs(lora)}
        if pinned and not manager.fits(beside, beside=manager.held):
            raise AdapterInUseError(
                f"the new version of pinned adapter {lora.id} has no slot or rank blocks beside "
                "the one that requests still use; raise max_loras or lora_pool_blocks"
            )
        manager.require_host_room(lora.nbytes, f"the new version of adapter {lora.id}")
        old = manager.supersede(lora.id)
        self._versions[old] = self._versions[lora.id]
        manager.add_adapter(lora)
        self.on_superseded(lora.id, old)
        if pinned:
            manager.pin_adapter(lora.id)

    def _let_arrays_go(self) -> None:
        """Keeps no arrays of requests whose adapters are not on the host."""
        for adapter_id, version in self._versions.items():
            in_memory = version.folder is None and version.request is not None
            if in_memory and self.manager.get_adapter(adapter_id) is None:
                self._versions[adapter_id] = dataclasses.replace(version, request=None)

    def _load(self, request: LoRARequest) -> _Loaded:
        known = self._known(request)
        adapter, folder = self._loader.load(
            request, self._folder(request, known), self._on_host, known
        )
        plain = adapter if isinstance(adapter, LoRAModel) else None
        return adapter, AdapterVersion(
            request.lora_name,
            request,
            source(request),
            folder,
            adapter.identity,
            adapter.fingerprint,
            adapter.nbytes,
            self.manager.needs(adapter),
            plain.added_tokens if plain is not None else 0,
            plain.invocation_tokens if plain is not None else (),
        )

    def version(self, adapter_id: int) -> AdapterVersion:
        """The version on the host, or else the one that was read last."""
        return self._versions[adapter_id]

    def _on_host(self, request: LoRARequest) -> Adapter | None:
        """What the request names, if it is on the host already."""
        return self.manager.get_adapter(request.lora_int_id) if self._known(request) else None


class LRUCacheWorkerLoRAManager(WorkerLoRAManager):
    """Keeps adapters that a step does not name, until the least recently used must make room."""

    def _forget_others(self, wanted: set[int]) -> None:
        pass
