"""The registry of adapters: who is on the host and in the slots, and who leaves for whom.

Pure bookkeeping: it answers which slot and which rank blocks an adapter holds, and what must be
written before the next step; the engine's runner does the writing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jlora.config import LoRAConfig
from jlora.errors import AdapterInUseError
from jlora.manager.blocks import Needs
from jlora.manager.device import DeviceTier, total
from jlora.manager.host import HostTier
from jlora.manager.mixture import Adapter
from jlora.projections import ModuleMap

logger = logging.getLogger(__name__)
_SLOTS, _PLACES, _BYTES = "slots", "places on the host", "bytes on the host"  # beside the pools


class LoRAModelManager(DeviceTier):
    """Adapters in host memory (least recently used first) and in the slots of the device.

    Every adapter in a slot is on the host too. An adapter that is held, that is, pinned or
    acquired by a running request, is in a slot and is evicted from neither. One that is bound to
    requests that have begun stays on the host until they have ended.
    """

    def __init__(self, modules: ModuleMap, lora_config: LoRAConfig) -> None:
        """Starts empty: no adapter, all slots and blocks free."""
        super().__init__(modules, lora_config)
        self._host = HostTier(lora_config.host_capacity, lora_config.max_cpu_lora_bytes)
        self._adapters = self._host.adapters
        self._pinned: set[int] = set()
        self._users: dict[int, int] = {}  # running sequences
        self._bound: dict[int, int] = {}  # requests that have begun and not ended
        self._superseded = 0  # versions that live on under ids below 0, ever
        self.slot_evictions = self.host_evictions = 0

    # -- what is there --------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Adapters the host keeps."""
        return self.lora_config.host_capacity

    def list_adapters(self) -> dict[int, Adapter]:
        """The adapters on the host, least recently used first."""
        return dict(self._adapters)

    def get_adapter(self, adapter_id: int) -> Adapter | None:
        """The adapter, if it is on the host; its turn in the LRU order is unchanged."""
        return self._adapters.get(adapter_id)

    def in_use(self, adapter_id: int) -> bool:
        """Whether a request that has begun uses the adapter."""
        return adapter_id in self._users or adapter_id in self._bound

    def users(self, adapter_id: int) -> int:
        """Running sequences that have acquired the adapter."""
        return self._users.get(adapter_id, 0)

    def is_pinned(self, adapter_id: int) -> bool:
        """Whether the adapter is pinned."""
        return adapter_id in self._pinned

    @property
    def pinned(self) -> set[int]:
        """The pinned adapters."""
        return set(self._pinned)

    @property
    def held(self) -> set[int]:
        """The adapters that are pinned or in use; each has a slot."""
        return self._pinned | self._users.keys()

    def _evictable(self, adapter_id: int) -> bool:
        """From its slot."""
        return adapter_id not in self._users and adapter_id not in self._pinned

    def touch(self, adapter_id: int) -> None:
        """Makes the adapter the most recently used one."""
        if adapter_id in self._adapters:
            self._adapters.move_to_end(adapter_id)
        if adapter_id in self._slots:
            self._slots.move_to_end(adapter_id)

    # -- host -----------------------------------------------------------------------------

    @property
    def host_bytes(self) -> int:
        """Of all tensors on the host."""
        return self._host.nbytes

    def has_host_room(self, nbytes: int = 0) -> bool:
        """Whether one more adapter of so many bytes can be added, by eviction if need be."""
        return self._host.victims(nbytes, self.kept) is not None

    @property
    def room_beside_pins(self) -> tuple[int, int]:
        """Adapters and bytes that the host could take if only what is pinned stayed."""
        return self.capacity - len(self._pinned), self._host.room(self._pinned)

    def require_host_room(
        self, nbytes: int = 0, what: str = "an adapter", beside_pins: bool = False
    ) -> None:
        """Raises AdapterInUseError when one more adapter of so many bytes could not be added.

        beside_pins: not even when nothing else is in use any more.
        """
        self._host.require_room(nbytes, self._pinned if beside_pins else self.kept, what=what)

    def _make_host_room(self, lora: Adapter, instead: int | None = None) -> None:
        """Evicts for an adapter; raises AdapterInUseError, and evicts none, when it cannot be."""
        for victim in self._host.require_room(lora.nbytes, self.kept, instead):
            self.remove_adapter(victim)
            self.host_evictions += 1
            logger.debug("evicted adapter %d from the host", victim)

    @property
    def kept(self) -> set[int]:
        """The adapters that do not leave the host: held, or bound to requests that have begun."""
        return self.held | self._bound.keys()

    def add_adapter(self, lora: Adapter) -> bool:
        """Registers an adapter; False when its id is there already.

        Evicts least recently used adapters when the host is full; raises AdapterInUseError when
        all are pinned or in use.
        """
        if lora.id in self._adapters:
            self.touch(lora.id)
            return False
        self._make_host_room(lora)
        self._adapters[lora.id] = lora
        return True

    def supersede(self, adapter_id: int) -> int:
        """Gives a registered adapter an id of its own, below 0, with slot and users, but no pin.

        So its requests end with it while its old id stands for something else. It is forgotten
        when the last of them is unbound.
        """
        self._superseded += 1
        new = -self._superseded
        self._pinned.discard(adapter_id)
        tables: tuple[dict[int, Any], ...] = (
            self._adapters,
            self._slots,
            self._users,
            self._bound,
        )
        for table in tables:
            if adapter_id in table:
                table[new] = table.pop(adapter_id)
        return new

    def bind(self, adapter_id: int) -> None:
        """A request has begun with the adapter: it stays on the host until `unbind`."""
        self._bound[adapter_id] = self._bound.get(adapter_id, 0) + 1

    def unbind(self, adapter_id: int) -> None:
        """A request that had begun has ended. A superseded adapter goes with the last one."""
        self._bound[adapter_id] -= 1
        if self._bound[adapter_id] == 0:
            del self._bound[adapter_id]
            if adapter_id < 0:
                self.remove_adapter(adapter_id)

    def replace_adapter(self, lora: Adapter) -> None:
        """Puts another version in the place of a registered adapter; it keeps its pin.

        Raises AdapterInUseError, and changes nothing, while running requests use the old version
        or when a pinned one would no longer fit.
        """
        pinned = lora.id in self._pinned
        needs = {lora.id: self.needs(lora)}
        if pinned and lora.id not in self._users and not self.fits(needs, beside=self.held):
            raise AdapterInUseError(
                f"the new version of pinned adapter {lora.id} takes more rank blocks than adapters "
                "pinned or in use leave; raise lora_pool_blocks or remove one"
            )
        if not self.in_use(lora.id):  # else the next line says so
            self._make_host_room(lora, instead=lora.id)
        self.remove_adapter(lora.id)
        self.add_adapter(lora)
        if pinned:
            self.pin_adapter(lora.id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter, pinned or not; False when it is not there.

        Raises AdapterInUseError while running requests use it.
        """
        if adapter_id not in self._adapters:
            return False
        if adapter_id in self._bound and adapter_id not in self._users:
            raise AdapterInUseError(
                f"adapter {adapter_id} is in use by {self._bound[adapter_id]} requests that have "
                "begun; remove it when they have finished"
            )
        self.deactivate_adapter(adapter_id)
        del self._adapters[adapter_id]
        return True

    def remove_all_adapters(self) -> None:
        """Forgets every adapter that no running request uses."""
        for adapter_id in list(self._adapters):
            if not self.in_use(adapter_id):
                self.remove_adapter(adapter_id)

    # -- device ---------------------------------------------------------------------------

    def to_drain(
        self, needs: Mapping[int, Needs], nbytes: Mapping[int, int] | None = None
    ) -> set[int]:
        """Adapters that may start nobody so that others can be placed: those with the fewest users.

        And those without users that leave the host for one that must be read, which takes time.

        needs: of the others, in the order in which they come; those that pins leave no room for
        count for nothing. nbytes: of those of them that are not on the host. Blocks that adapters
        share are taken to go with the first of them.
        """
        if not needs:
            return set()
        held, kept, drained = self.held, self.kept, set[int]()
        busy = sorted(self._users.keys() - self._pinned, key=lambda one: (self._users[one], one))
        room = self._blocks_beside(held)
        room[_SLOTS] = self.lora_slots - len(held)
        room[_PLACES] = self.capacity - len(kept)
        room[_BYTES] = self._host.room(kept)

        def gain(victim: int) -> Counter[str]:
            on_host = {_SLOTS: 1, _PLACES: 1, _BYTES: self._adapters[victim].nbytes}
            return total([*self._taken_by(victim).values(), on_host])

        for adapter_id, one in needs.items():
            wanted = total([*one.values(), {_SLOTS: 1}])
            if nbytes is not None and adapter_id in nbytes:
                wanted.update({_PLACES: 1, _BYTES: nbytes[adapter_id]})
            more: list[int] = []
            after = room.copy()
            while any(count > after[name] for name, count in wanted.items()):
                if len(more) == len(busy):
                    break
                more.append(busy[len(more)])
                after.update(gain(more[-1]))
            else:
                drained.update(more)
                del busy[: len(more)]
                after.subtract(wanted)
                room = after
                if nbytes is not None and adapter_id in nbytes:
                    leaving = self._host.victims(nbytes[adapter_id], kept - drained)
                    drained.update(leaving or ())
        return drained

    def can_activate(self, adapter_id: int) -> bool:
        """Whether `activate_adapter` would succeed now."""
        if adapter_id in self._slots:
            return True
        adapter = self._adapters.get(adapter_id)
        return adapter is not None and self._victims_of(adapter) is not None

    def _victims_of(self, adapter: Adapter) -> list[int] | None:
        return self._victims(self.needs(adapter), self._evictable)

    def activate_adapter(self, adapter_id: int) -> bool:
        """Gives a registered adapter a slot and blocks; False when it has them already.

        Evicts least recently used adapters from their slots; raises AdapterInUseError when those
        that are left are pinned or in use, KeyError when the adapter is not on the host.
        """
        if adapter_id in self._slots:
            self.touch(adapter_id)
            return False
        adapter = self._adapters[adapter_id]
        victims = self._victims_of(adapter)
        if victims is None:
            raise AdapterInUseError(
                f"no slot or rank blocks for adapter {adapter_id}: the adapters in the "
                f"{self.lora_slots} slots are pinned or in use; raise max_loras or remove one"
            )
        slot = self._occupy(adapter_id, adapter, victims)
        self.slot_evictions += len(victims)
        for victim in victims:
            logger.debug("evicted adapter %d from its slot for adapter %d", victim, adapter_id)
        self.touch(adapter_id)
        logger.debug("activated adapter %d in slot %d (rank %d)", adapter_id, slot, adapter.rank)
        return True

    def deactivate_adapter(self, adapter_id: int) -> bool:
        """Frees the adapter's slot and blocks, pinned or not; False when it has none.

        Raises AdapterInUseError while running requests use it.
        """
        if adapter_id in self._users:
            raise AdapterInUseError(
                f"adapter {adapter_id} is in use by {self._users[adapter_id]} running requests; "
                "remove it when they have finished"
            )
        if adapter_id not in self._slots:
            return False
        self._pinned.discard(adapter_id)
        self._vacate(adapter_id)
        return True

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keeps an adapter on the host and in a slot until it is removed.

        Raises ValueError when it is not registered, AdapterInUseError when no slot can be had.
        """
        if adapter_id not in self._adapters:
            raise ValueError(f"Pinning failed. LoRA {adapter_id} is not registered.")
        self.activate_adapter(adapter_id)
        self._pinned.add(adapter_id)
        return True

    # -- running requests -----------------------------------------------------------------

    def acquire(self, adapter_id: int) -> int:
        """Activates the adapter for one running request; returns its slot."""
        self.activate_adapter(adapter_id)
        self._users[adapter_id] = self._users.get(adapter_id, 0) + 1
        return self._slots[adapter_id]

    def release(self, adapter_id: int) -> None:
        """One running request has ended."""
        self._users[adapter_id] -= 1
        if self._users[adapter_id] == 0:
            del self._users[adapter_id]

    def vacate_unwritten(self) -> None:
        """Takes the adapters that wait to be written out of their slots, but for held ones.

        So one that cannot be written fails only the steps that want it.
        """
        for adapter_id in self._waiting_to_be_written():
            if self._evictable(adapter_id):
                self.deactivate_adapter(adapter_id)
