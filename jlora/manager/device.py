"""The adapters on the device: which slot and rank blocks each has, and what must be written."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jlora.config import LoRAConfig
from jlora.manager.blocks import (
    BlockPool,
    BlockWrite,
    Needs,
    SlotMap,
    blocks_needed,
    pool_rows,
    row_blocks,
)
from jlora.manager.features import FeatureWrite, feature_writes, full_row, is_full, no_features
from jlora.manager.lora_model import LoRAModel
from jlora.manager.mixture import Adapter
from jlora.projections import ModuleMap

Write = BlockWrite | FeatureWrite


@dataclass
class _Resident:
    """An adapter whose blocks are on the device, by row; `slots` slots list them."""

    blocks: dict[str, list[int]]
    slots: int = 0


class DeviceTier:
    """Slots and the blocks that they list. Who may leave its slot is decided elsewhere."""

    def __init__(self, modules: ModuleMap, lora_config: LoRAConfig) -> None:
        """Starts empty: all slots and blocks are free."""
        self.modules, self.lora_config = modules, lora_config
        self._slots: OrderedDict[int, int] = OrderedDict()  # adapter -> slot, by last use
        self._listed: dict[int, Adapter] = {}  # slot -> the adapter in it
        self._resident: dict[str, _Resident] = {}  # by LoRAModel.key
        self._free_slots = set(range(self.lora_slots))
        self.rows = {row.name: row for row in pool_rows(modules, lora_config)}
        self.pools = {
            name: BlockPool(row_blocks(row, lora_config)) for name, row in self.rows.items()
        }
        if lora_config.max_lora_full_weights:
            for row in modules.vocab_projections:
                self.pools[full_row(row.name)] = BlockPool(lora_config.max_lora_full_weights)
        self.slot_maps = {
            name: SlotMap(self.lora_slots, lora_config.max_blocks) for name in self.rows
        }
        self.features = no_features(self.lora_slots)
        self._writes: list[Write] = []
        self._unwritten_slots: set[int] = set()
        self.version = 0  # changes whenever slot_maps or features do

    # -- what is there --------------------------------------------------------------------

    @property
    def lora_slots(self) -> int:
        """Slots on the device."""
        return self.lora_config.max_loras

    @property
    def lora_index_to_id(self) -> list[int | None]:
        """The adapter in each slot."""
        ids: list[int | None] = [None] * self.lora_slots
        for adapter_id, slot in self._slots.items():
            ids[slot] = adapter_id
        return ids

    def slot_of(self, adapter_id: int) -> int | None:
        """The slot that holds the adapter."""
        return self._slots.get(adapter_id)

    @property
    def free_slots(self) -> set[int]:
        """The slots that hold no adapter."""
        return set(self._free_slots)

    @property
    def unwritten(self) -> set[str]:
        """Keys of the adapters whose blocks are still to be written."""
        return {write.lora.key for write in self._writes}

    def is_resident(self, key: str) -> bool:
        """Whether an adapter (LoRAModel.key) has blocks on the device."""
        return key in self._resident

    # -- what has room --------------------------------------------------------------------

    def needs(self, adapter: Adapter) -> Needs:
        """What an adapter takes on the device."""
        return {lora.key: self._needs_of(lora) for lora, _ in adapter.components}

    def _needs_of(self, lora: LoRAModel) -> dict[str, int]:
        full = {
            full_row(which): 1
            for which, rows in lora.vocab_rows.items()
            if is_full(rows, self.lora_config)
        }
        return blocks_needed(lora, self.modules) | full

    def _taken_by(self, adapter_id: int) -> Needs:
        """What an adapter in a slot has."""
        return {
            lora.key: {
                name: len(blocks) for name, blocks in self._resident[lora.key].blocks.items()
            }
            for lora, _ in self._listed[self._slots[adapter_id]].components
        }

    def fits(self, needs: Mapping[int, Needs], beside: set[int]) -> bool:
        """Whether adapters can be active at once when, of the others, only `beside` stay.

        needs: of each of them. beside: adapters that are active now; those that are in needs too
        count as needs says.
        """
        if len(beside | needs.keys()) > self.lora_slots:
            return False
        return self.short_of(needs, beside) is None

    def short_of(self, needs: Mapping[int, Needs], beside: set[int]) -> str | None:
        """The first pool that has too few blocks for what `fits` asks, None when none has."""
        together: dict[str, Mapping[str, int]] = {}
        for one in (*map(self._taken_by, beside - needs.keys()), *needs.values()):
            together |= one
        taken = total(together.values())
        return next((name for name, count in taken.items() if count > self._size(name)), None)

    def _size(self, name: str) -> int:
        return self.pools[name].num_blocks if name in self.pools else 0

    def _free(self, name: str) -> int:
        return self.pools[name].num_free if name in self.pools else 0

    def _blocks_beside(self, held: Iterable[int]) -> Counter[str]:
        """Blocks of each pool that nobody has when only these adapters stay."""
        together: dict[str, Mapping[str, int]] = {}
        for adapter_id in held:
            together |= self._taken_by(adapter_id)
        room = Counter({name: pool.num_blocks for name, pool in self.pools.items()})
        room.subtract(total(together.values()))
        return room

    def _victims(self, needs: Needs, evictable: Callable[[int], bool]) -> list[int] | None:
        """The least recently used adapters that must leave their slots; None if it cannot be."""
        missing = total(one for key, one in needs.items() if key not in self._resident)
        missing.subtract({name: self._free(name) for name in list(missing)})
        slots = {key: one.slots for key, one in self._resident.items()}
        need_slot, victims = not self._free_slots, []
        for adapter_id in filter(evictable, self._slots):
            if not need_slot and max(missing.values(), default=0) <= 0:
                break
            victims.append(adapter_id)
            need_slot = False
            for lora, _ in self._listed[self._slots[adapter_id]].components:
                slots[lora.key] -= 1
                if slots[lora.key] == 0 and lora.key not in needs:
                    blocks = self._resident[lora.key].blocks
                    missing.subtract({name: len(one) for name, one in blocks.items()})
        return None if need_slot or max(missing.values(), default=0) > 0 else victims

    # -- placing --------------------------------------------------------------------------

    def _occupy(self, adapter_id: int, adapter: Adapter, victims: Iterable[int]) -> int:
        """Gives an adapter a slot and blocks when `_victims` have left theirs; returns the slot."""
        keys = [lora.key for lora, _ in adapter.components]
        there = [key for key in keys if key in self._resident]
        for key in there:  # so that no victim takes them along
            self._resident[key].slots += 1
        for victim in victims:
            self._vacate(victim)
        slot = min(self._free_slots)  # as vLLM
        self._free_slots.remove(slot)
        for lora, _ in adapter.components:
            if lora.key not in there:
                self._place(lora)
        self._fill(slot, adapter)
        self._slots[adapter_id] = slot
        return slot

    def _place(self, lora: LoRAModel) -> None:
        """Gives an adapter blocks, to be written."""
        needs = {name: count for name, count in self._needs_of(lora).items() if count}
        blocks = {name: self.pools[name].allocate(count) for name, count in needs.items()}
        self._resident[lora.key] = _Resident(blocks, slots=1)
        for name, row in self.rows.items():
            self._writes += BlockWrite.all(lora, self.modules, row, blocks.get(name, []))

    def _fill(self, slot: int, adapter: Adapter) -> None:
        """Lists the adapter's blocks in the slot, and its features."""
        self._listed[slot] = adapter
        for name, slot_map in self.slot_maps.items():
            blocks: list[int] = []
            scales: list[float] = []
            for lora, weight in adapter.components:
                own = self._resident[lora.key].blocks.get(name, [])
                blocks += own
                scales += [weight] * len(own)
            slot_map.set(slot, blocks, scales)
        self._unwritten_slots.add(slot)
        self.features[slot] = self.features[-1]
        if isinstance(adapter, LoRAModel):
            mine = self._resident[adapter.key].blocks
            full = {
                row.name: mine[full_row(row.name)][0]
                for row in self.modules.vocab_projections
                if full_row(row.name) in mine
            }
            self.features[slot], writes = feature_writes(
                adapter, self.modules, self.lora_config, slot, full
            )
            self._writes += writes
        self.version += 1

    def _vacate(self, adapter_id: int) -> None:
        """Frees an adapter's slot, and the blocks that no other lists."""
        slot = self._slots.pop(adapter_id)
        gone = [lora for lora, _ in self._listed.pop(slot).components if self._drop(lora)]
        for slot_map in self.slot_maps.values():
            slot_map.set(slot, [])
        self.features[slot] = self.features[-1]
        self._free_slots.add(slot)
        self._unwritten_slots.discard(slot)
        self._writes = [write for write in self._writes if write.lora not in gone]
        self.version += 1

    def _drop(self, lora: LoRAModel) -> bool:
        """One slot less lists the adapter's blocks; True when they are free now."""
        resident = self._resident[lora.key]
        resident.slots -= 1
        if resident.slots:
            return False
        for name, blocks in resident.blocks.items():
            self.pools[name].release(blocks)
        del self._resident[lora.key]
        return True

    # -- writing --------------------------------------------------------------------------

    def take_writes(self) -> list[Write]:
        """What to write before the next step, in this order, once."""
        writes, self._writes = self._writes, []
        self._unwritten_slots.clear()
        return writes

    def put_back(self, writes: list[Write]) -> None:
        """They were taken, and not all could be written: they are due again."""
        self._writes = writes + self._writes
        self._unwritten_slots.update(self._listed)  # which of them could be is not known

    def is_written(self, adapter_id: int) -> bool:
        """Whether the writes have been taken of an adapter that has a slot."""
        return self._slots[adapter_id] not in self._unwritten_slots

    def _waiting_to_be_written(self) -> list[int]:
        """The adapters in slots of which something is still to be written."""
        unwritten = [write.lora for write in self._writes]
        return [
            adapter_id
            for adapter_id, slot in self._slots.items()
            if any(lora in unwritten for lora, _ in self._listed[slot].components)
        ]


def total(needs: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of several counts."""
    counts: Counter[str] = Counter()
    for one in needs:  # Counter.update takes ten times as long
        for name, count in one.items():
            counts[name] += count
    return counts
