"""Random histories of the manager against a simple model of what it must do."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jlora.errors import AdapterInUseError
from tests.manager.adapters import (
    ATTENTION,
    MODULES,
    WaitingLoRAManager,
    lora_config,
    request,
    write_adapter,
)

SLOTS, HOST, BLOCKS = 3, 4, 4
# id -> (rank, parts): one block everywhere, two, three, or only for attention.
KINDS = [
    {"r": 4},
    {"r": 20},
    {"r": 40},
    {"r": 16, "target_modules": list(ATTENTION)},
]
IDS = st.integers(1, 8)


def needs(adapter_id: int) -> dict[str, int]:
    """Blocks of each projection, by the definition."""
    kind = KINDS[adapter_id % len(KINDS)]
    count = -(-kind["r"] // 16)
    only = "target_modules" in kind
    return {"qkv": count, "o": count, "gate_up": 0 if only else count, "down": 0 if only else count}


class Manager(RuleBasedStateMachine):
    """The model: the host and the slots as lists, least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        config = lora_config(
            max_loras=SLOTS, max_cpu_loras=HOST, max_lora_rank=48, lora_pool_blocks=BLOCKS
        )
        self.worker = WaitingLoRAManager(MODULES, config)
        self.manager = self.worker.manager
        self.host: list[int] = []
        self.active: list[int] = []
        self.pinned: set[int] = set()
        self.users: dict[int, int] = {}
        self.device: dict[tuple[str, int], tuple[int, int]] = {}  # (row, block) -> (id, first rank)

    @initialize()
    def write_folders(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        for index, kind in enumerate(KINDS):
            write_adapter(self.root / str(index), **kind)

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    # -- the model -------------------------------------------------------------------------

    def request(self, adapter_id: int):
        return request(adapter_id, self.root / str(adapter_id % len(KINDS)))

    def held(self) -> set[int]:
        return self.pinned | set(self.users)

    def used(self, adapter_id: int) -> None:
        for order in (self.host, self.active):
            if adapter_id in order:
                order.append(order.pop(order.index(adapter_id)))

    def fit(self, ids: set[int]) -> bool:
        """Whether these alone have room on the device."""
        return len(ids) <= SLOTS and all(
            sum(needs(adapter_id)[row] for adapter_id in ids) <= BLOCKS for row in needs(1)
        )

    def host_has_room(self) -> bool:
        return len(self.host) < HOST or bool(set(self.host) - self.held())

    def put_on_host(self, adapter_id: int) -> None:
        if adapter_id not in self.host:
            if len(self.host) == HOST:
                victim = next(one for one in self.host if one not in self.held())
                self.host.remove(victim)
                self.active = [one for one in self.active if one != victim]
            self.host.append(adapter_id)
        self.used(adapter_id)

    def place(self, adapter_id: int) -> bool:
        """Makes it active when it can be, by evicting the least recently used."""
        if adapter_id not in self.active:
            if not self.fit(self.held() | {adapter_id}):
                return False
            while not self.fit({*self.active, adapter_id}):
                self.active.remove(next(one for one in self.active if one not in self.held()))
            self.active.append(adapter_id)
        self.used(adapter_id)
        return True

    # -- what can happen -------------------------------------------------------------------

    @rule(adapter_id=IDS)
    def add(self, adapter_id: int) -> None:
        blocked = not self.fit(self.pinned | {adapter_id})
        full = adapter_id not in self.host and not self.host_has_room()
        if blocked or full:
            with pytest.raises(AdapterInUseError):
                self.worker.add_adapter(self.request(adapter_id))
            return
        assert self.worker.add_adapter(self.request(adapter_id)) == (adapter_id not in self.host)
        self.put_on_host(adapter_id)
        self.place(adapter_id)

    @rule(adapter_id=IDS)
    def check(self, adapter_id: int) -> None:
        if not self.fit(self.pinned | {adapter_id}):
            with pytest.raises(AdapterInUseError):
                self.worker.read(self.request(adapter_id))
            return
        version = self.worker.read(self.request(adapter_id))
        assert version.identity == self.worker.version(adapter_id).identity
        if adapter_id not in self.host and self.host_has_room():
            self.put_on_host(adapter_id)

    @precondition(lambda self: self.host)
    @rule(data=st.data())
    def activate(self, data) -> None:
        adapter_id = data.draw(st.sampled_from(sorted(self.host)))
        was = adapter_id in self.active
        assert self.manager.can_activate(adapter_id) == (
            was or self.fit(self.held() | {adapter_id})
        )
        if self.place(adapter_id):
            assert self.manager.activate_adapter(adapter_id) != was
        else:
            with pytest.raises(AdapterInUseError):
                self.manager.activate_adapter(adapter_id)

    @rule(adapter_id=IDS)
    def deactivate(self, adapter_id: int) -> None:
        if adapter_id in self.users:
            with pytest.raises(AdapterInUseError):
                self.manager.deactivate_adapter(adapter_id)
            return
        assert self.manager.deactivate_adapter(adapter_id) == (adapter_id in self.active)
        self.active = [one for one in self.active if one != adapter_id]
        self.pinned.discard(adapter_id)

    @rule(adapter_id=IDS)
    def acquire(self, adapter_id: int) -> None:
        try:
            slot = self.worker.start(self.request(adapter_id))
        except AdapterInUseError:  # for good: adapters are pinned in its place
            assert adapter_id not in self.active
            assert not self.fit(self.pinned | {adapter_id})
            return
        room = adapter_id in self.active or self.fit(self.held() | {adapter_id})
        if slot is None:
            assert not room
            if adapter_id in self.manager.list_adapters():  # read while it waits, and kept
                self.put_on_host(adapter_id)
            return
        assert room
        self.put_on_host(adapter_id)
        assert self.place(adapter_id)
        self.users[adapter_id] = self.users.get(adapter_id, 0) + 1
        assert self.manager.lora_index_to_id[slot] == adapter_id

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data) -> None:
        adapter_id = data.draw(st.sampled_from(sorted(self.users)))
        self.manager.release(adapter_id)
        self.users[adapter_id] -= 1
        if not self.users[adapter_id]:
            del self.users[adapter_id]

    @rule(adapter_id=IDS)
    def pin(self, adapter_id: int) -> None:
        if adapter_id not in self.host:
            with pytest.raises(ValueError, match="not registered"):
                self.worker.pin_adapter(adapter_id)
        elif self.place(adapter_id):
            assert self.worker.pin_adapter(adapter_id)
            self.pinned.add(adapter_id)
        else:
            with pytest.raises(AdapterInUseError):
                self.worker.pin_adapter(adapter_id)

    @rule(adapter_id=IDS)
    def remove(self, adapter_id: int) -> None:
        if adapter_id in self.users:
            with pytest.raises(AdapterInUseError):
                self.worker.remove_adapter(adapter_id)
            return
        assert self.worker.remove_adapter(adapter_id) == (adapter_id in self.host)
        self.host = [one for one in self.host if one != adapter_id]
        self.active = [one for one in self.active if one != adapter_id]
        self.pinned.discard(adapter_id)

    @rule(ids=st.lists(IDS, max_size=4))
    def set_active(self, ids: list[int]) -> None:
        requests = [self.request(adapter_id) for adapter_id in ids]
        if len(set(ids)) > SLOTS or not self.fit(set(ids) | self.held()):
            with pytest.raises(AdapterInUseError):
                self.worker.set_active_adapters(requests)
            return
        self.worker.set_active_adapters([*requests, None])
        wanted = list(dict.fromkeys(ids))
        for adapter_id in wanted:
            self.used(adapter_id)
        for adapter_id in wanted:
            self.put_on_host(adapter_id)
            assert self.place(adapter_id)
        assert set(ids) <= set(self.active)

    @rule()
    def write(self) -> None:
        for one in self.manager.take_writes():
            self.device[one.projection.name, one.block] = one.lora.id, one.first_rank

    # -- what must always hold -------------------------------------------------------------

    @invariant()
    def lists_are_the_models(self) -> None:
        assert list(self.manager.list_adapters()) == self.host
        assert self.worker.list_adapters() == set(self.host)
        slots = self.manager.lora_index_to_id
        assert sorted(filter(None, slots)) == sorted(self.active)
        assert all(slots[self.manager.slot_of(one)] == one for one in self.active)
        assert all(self.manager.slot_of(one) is None for one in set(range(1, 9)) - set(self.active))
        assert self.manager.held == self.held() <= set(self.active) <= set(self.host)
        assert all(self.manager.in_use(one) == (one in self.users) for one in range(1, 9))

    @invariant()
    def blocks_add_up(self) -> None:
        for name, pool in self.manager.pools.items():
            slot_map = self.manager.slot_maps[name]
            blocks = [slot_map.get(slot) for slot in range(SLOTS)]
            for adapter_id, own in zip(self.manager.lora_index_to_id, blocks, strict=True):
                assert len(own) == (0 if adapter_id is None else needs(adapter_id)[name])
            taken = list(itertools.chain(*blocks))
            assert len(taken) == len(set(taken)) == BLOCKS - pool.num_free
            assert set(taken) <= set(range(BLOCKS))

    @invariant()
    def what_is_written_and_to_be_written_is_what_the_slots_say(self) -> None:
        device = dict(self.device)
        pending = self.manager._writes
        for one in pending:
            device[one.projection.name, one.block] = one.lora.id, one.first_rank
        assert {one.lora.id for one in pending} <= set(self.active)
        for adapter_id in self.active:
            slot = self.manager.slot_of(adapter_id)
            for name, slot_map in self.manager.slot_maps.items():
                for index, block in enumerate(slot_map.get(slot)):
                    assert device[name, block] == (adapter_id, 16 * index)


Manager.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestManager = Manager.TestCase
