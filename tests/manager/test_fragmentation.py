"""A hundred thousand comings and goings of adapters of mixed ranks lose and leak no block."""

from __future__ import annotations

import random

from jlora.manager import LoRAModelManager
from tests.manager.adapters import ALL, ATTENTION, MLP, MODULES, lora_config, zeros_model

SLOTS, HOST, BLOCKS = 8, 16, 16
OPERATIONS, CHECK_EVERY = 100_000, 10_000
RANKS = (8, 12, 16, 17, 20, 24, 32, 33, 40, 48, 56, 64)
PARTS = (ALL, ALL, ATTENTION, MLP, ("q_proj", "down_proj"))
ROWS = {"qkv": "q_proj", "o": "o_proj", "gate_up": "up_proj", "down": "down_proj"}
FULL = (64, 40, 32, 24, 20, 16, 8, 8)  # in blocks of 16: 4 + 3 + 2 + 2 + 2 + 1 + 1 + 1


def new_manager() -> LoRAModelManager:
    """Eight slots that share 16 blocks, so that both run out."""
    return LoRAModelManager(
        MODULES,
        lora_config(max_loras=SLOTS, max_cpu_loras=HOST, max_lora_rank=64, lora_pool_blocks=BLOCKS),
    )


def blocks_of(rank: int) -> int:
    return -(-rank // 16)


def check_blocks(one: LoRAModelManager, kinds: dict[int, tuple[int, tuple[str, ...]]]) -> None:
    """Each block is free or of one slot, and each slot has what its adapter's rank takes."""
    for name, pool in one.pools.items():
        held = {slot: one.slot_maps[name].get(slot) for slot in range(SLOTS)}
        listed = [block for blocks in held.values() for block in blocks]
        assert len(set(listed)) == len(listed)
        assert set(listed) <= set(range(pool.num_blocks))
        assert pool.num_free + len(listed) == pool.num_blocks == BLOCKS
        for slot, adapter_id in enumerate(one.lora_index_to_id):
            rank, parts = kinds.get(adapter_id, (0, ()))
            assert len(held[slot]) == (blocks_of(rank) if ROWS[name] in parts else 0)


def test_blocks_survive_a_long_history():
    rng = random.Random(0)
    kinds = {
        adapter_id: (rng.choice(RANKS), rng.choice(PARTS)) for adapter_id in range(1, 4 * HOST + 1)
    }
    models = {adapter_id: zeros_model(adapter_id, *kind) for adapter_id, kind in kinds.items()}
    ids = list(models)
    one = new_manager()
    activated = deactivated = removed = 0
    for operation in range(1, OPERATIONS + 1):
        adapter_id, chance = rng.choice(ids), rng.random()
        if chance < 0.6:
            one.add_adapter(models[adapter_id])  # evicts from the host
            assert operation % 10 or one.can_activate(adapter_id)
            activated += one.activate_adapter(adapter_id)  # evicts from the slots
        elif chance < 0.85:
            deactivated += one.deactivate_adapter(adapter_id)
        else:
            removed += one.remove_adapter(adapter_id)
        if operation % 10 == 0:
            one.take_writes()
        if operation % CHECK_EVERY == 0:
            check_blocks(one, kinds)
    evicted = activated - deactivated - removed - SLOTS  # or more
    assert min(deactivated, removed, evicted) > OPERATIONS / 100

    for adapter_id in ids:
        one.remove_adapter(adapter_id)
        assert not one.can_activate(adapter_id)
    check_blocks(one, kinds)
    assert {pool.num_free for pool in one.pools.values()} == {BLOCKS}
    assert one.take_writes() == []

    full = {1000 + index: (rank, ALL) for index, rank in enumerate(FULL)}
    for adapter_id, (rank, parts) in full.items():
        one.add_adapter(zeros_model(adapter_id, rank, parts))
        assert one.can_activate(adapter_id)
        assert one.activate_adapter(adapter_id)
    check_blocks(one, full)
    assert sorted(one.lora_index_to_id) == sorted(full)  # none has had to leave
    assert {pool.num_free for pool in one.pools.values()} == {0}
    written = [(write.projection.name, write.block) for write in one.take_writes()]
    assert sorted(written) == sorted((name, block) for name in one.pools for block in range(BLOCKS))
