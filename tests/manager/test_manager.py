"""The registry and the slots: LRU in both tiers, pins, users, rank blocks, pending writes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jlora.errors import AdapterInUseError
from jlora.manager import LoRAModelManager, SlotMap
from jlora.manager.host import HostTier
from jlora.manager.mixture import LoRAMixture, mix
from tests.manager.adapters import (
    ATTENTION,
    MLP,
    MODULES,
    device_state,
    lora_config,
    zeros_model,
)


def manager(*ids: int, active: tuple[int, ...] = (), **options) -> LoRAModelManager:
    """A manager with these adapters of rank 4, some of them active."""
    one = LoRAModelManager(MODULES, lora_config(**options))
    for adapter_id in ids:
        assert one.add_adapter(zeros_model(adapter_id))
    for adapter_id in active:
        assert one.activate_adapter(adapter_id)
    return one


def hosted(one: LoRAModelManager) -> list[int]:
    return list(one.list_adapters())


def free(one: LoRAModelManager) -> set[int]:
    return {pool.num_free for pool in one.pools.values()}


# -- the host --------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_the_host():
    one = manager(1, 2, 3, max_cpu_loras=3)
    one.touch(1)
    assert one.add_adapter(zeros_model(4))
    assert hosted(one) == [3, 1, 4]


def test_adding_again_only_renews():
    one = manager(1, 2, max_cpu_loras=2)
    first = one.get_adapter(1)
    assert not one.add_adapter(zeros_model(1))
    assert one.get_adapter(1) is first
    assert hosted(one) == [2, 1]


def test_activation_and_acquisition_are_uses_but_looking_is_not():
    one = manager(1, 2, 3, 4)
    one.activate_adapter(1)
    one.acquire(2)
    one.get_adapter(3)
    assert hosted(one) == [3, 4, 1, 2]


def test_eviction_from_the_host_frees_the_slot_too():
    one = manager(1, 2, active=(1, 2), max_cpu_loras=2)
    one.touch(1)
    one.add_adapter(zeros_model(3))
    assert hosted(one) == [1, 3]
    assert one.lora_index_to_id == [1, None]
    assert free(one) == {3}


@pytest.mark.parametrize("hold", ["pin_adapter", "acquire"])
def test_a_held_adapter_stays_on_the_host(hold):
    one = manager(1, 2, max_cpu_loras=2)
    getattr(one, hold)(1)
    one.touch(2)
    one.add_adapter(zeros_model(3))
    assert hosted(one) == [1, 3]


def test_a_host_of_held_adapters_has_no_room():
    one = manager(1, 2, max_cpu_loras=2)
    one.pin_adapter(1)
    one.acquire(2)
    assert not one.has_host_room()
    before = device_state(one)
    with pytest.raises(AdapterInUseError, match="all 2 adapters on the host are pinned or in use"):
        one.add_adapter(zeros_model(3))
    assert (hosted(one), device_state(one)) == ([1, 2], before)
    one.release(2)
    assert one.has_host_room()


def test_what_the_host_has_no_room_for_says_which_limit_it_hit():
    host = HostTier(2, 10)
    host.adapters.update({1: SimpleNamespace(nbytes=4), 2: SimpleNamespace(nbytes=4)})
    with pytest.raises(AdapterInUseError, match="raise max_cpu_loras or"):
        host.require_room(1, {1, 2})
    with pytest.raises(AdapterInUseError, match="raise max_cpu_lora_bytes or"):
        host.require_room(7, {1})
    assert host.require_room(6, {1}) == [2]


# -- slots -----------------------------------------------------------------------------------


def test_slots_are_given_from_the_lowest():
    one = manager(1, 2, 3, active=(1, 2, 3), max_loras=3)
    assert one.lora_index_to_id == [1, 2, 3]
    one.deactivate_adapter(1)
    one.deactivate_adapter(2)
    one.add_adapter(zeros_model(4))
    one.activate_adapter(4)
    assert one.lora_index_to_id == [4, None, 3]


def test_the_least_recently_used_leaves_its_slot():
    one = manager(1, 2, 3, active=(1, 2))
    assert not one.activate_adapter(1)  # active already, but used again
    one.activate_adapter(3)
    assert one.lora_index_to_id == [1, 3]
    assert hosted(one) == [2, 1, 3]  # still on the host


def test_activation_needs_the_host():
    with pytest.raises(KeyError):
        manager(1).activate_adapter(2)


@pytest.mark.parametrize("hold", ["pin_adapter", "acquire"])
def test_a_held_adapter_keeps_its_slot(hold):
    one = manager(1, 2, 3, active=(1, 2))
    getattr(one, hold)(1)
    one.touch(2)
    one.activate_adapter(3)
    assert one.lora_index_to_id == [1, 3]


def test_all_slots_pinned_is_a_clear_error():
    one = manager(1, 2, 3)
    one.pin_adapter(1)
    one.pin_adapter(2)
    before = device_state(one)
    assert not one.can_activate(3)
    for way in (one.activate_adapter, one.pin_adapter, one.acquire):
        with pytest.raises(AdapterInUseError, match=r"adapter 3.*2 slots are pinned.*max_loras"):
            way(3)
    assert device_state(one) == before
    assert not one.is_pinned(3)
    assert not one.in_use(3)
    with pytest.raises(RuntimeError):  # what vLLM raises
        one.pin_adapter(3)
    one.remove_adapter(1)
    assert one.activate_adapter(3)


def test_pinning_activates_and_needs_a_registered_adapter():
    one = manager(1)
    assert one.pin_adapter(1)
    assert one.slot_of(1) == 0
    assert one.pinned == one.held == {1}
    with pytest.raises(ValueError, match="LoRA 9 is not registered"):
        one.pin_adapter(9)


@pytest.mark.parametrize("way", ["remove_adapter", "deactivate_adapter"])
def test_a_pinned_adapter_can_be_removed_by_hand(way):
    one = manager(1, 2)
    one.pin_adapter(1)
    assert getattr(one, way)(1)
    assert one.pinned == set()
    assert one.lora_index_to_id == [None, None]
    assert hosted(one) == ([2] if way == "remove_adapter" else [2, 1])


def test_the_number_of_users_counts():
    one = manager(1)
    assert one.acquire(1) == one.acquire(1) == 0
    one.release(1)
    assert one.in_use(1)
    one.release(1)
    assert not one.in_use(1)


@pytest.mark.parametrize("way", ["remove_adapter", "deactivate_adapter"])
def test_an_adapter_in_use_cannot_be_taken_away(way):
    one = manager(1)
    one.acquire(1)
    one.acquire(1)
    before = device_state(one)
    with pytest.raises(AdapterInUseError, match="adapter 1 is in use by 2 running requests"):
        getattr(one, way)(1)
    assert (hosted(one), device_state(one)) == ([1], before)


def test_removing_what_is_not_there():
    one = manager(1)
    assert not one.remove_adapter(2)
    assert not one.deactivate_adapter(1)
    assert one.remove_adapter(1)
    assert not one.remove_adapter(1)


def test_removing_all_leaves_those_in_use():
    one = manager(1, 2, 3, active=(1, 2))
    one.acquire(2)
    one.remove_all_adapters()
    assert hosted(one) == [2]
    assert one.lora_index_to_id == [None, 2]


# -- rank blocks -----------------------------------------------------------------------------


def test_an_adapter_takes_blocks_by_rank_and_only_where_it_has_weights():
    one = manager()
    one.add_adapter(zeros_model(1, rank=20, parts=ATTENTION))
    one.activate_adapter(1)
    assert {name: pool.num_free for name, pool in one.pools.items()} == {
        "qkv": 2,
        "o": 2,
        "gate_up": 4,
        "down": 4,
    }
    assert one.slot_maps["qkv"].counts.tolist() == [2, 0]
    assert one.slot_maps["down"].counts.tolist() == [0, 0]


def test_slot_maps_list_the_blocks_and_their_version_grows():
    one = manager(1, 2, active=(1,))
    version = one.version
    one.activate_adapter(2)
    assert one.version > version
    first, second = one.slot_maps["qkv"].get(0), one.slot_maps["qkv"].get(1)
    assert len(first) == len(second) == 1
    assert first != second
    version = one.version
    one.deactivate_adapter(1)
    assert one.version > version
    assert one.slot_maps["qkv"].get(0) == []
    assert one.slot_maps["qkv"].scales.tolist() == [[1, 1], [1, 1]]


def test_a_small_pool_holds_many_small_adapters():
    one = manager(1, 2, 3, active=(1, 2, 3), max_loras=3, lora_pool_blocks=3)
    assert one.lora_index_to_id == [1, 2, 3]
    assert free(one) == {0}


def test_a_big_adapter_evicts_several_small_ones_but_no_more():
    one = manager(1, 2, 3, active=(1, 2, 3), max_loras=4, lora_pool_blocks=3)
    one.add_adapter(zeros_model(4, rank=32))
    one.activate_adapter(4)
    assert one.lora_index_to_id == [4, None, 3, None]


@pytest.mark.parametrize("hold", ["pin_adapter", "acquire"])
def test_a_big_adapter_evicts_none_that_is_held(hold):
    one = manager(1, 2, 3, active=(1, 2, 3), max_loras=4, lora_pool_blocks=3)
    getattr(one, hold)(1)
    one.add_adapter(zeros_model(4, rank=32))
    one.activate_adapter(4)
    assert one.lora_index_to_id == [1, 4, None, None]


def test_too_few_blocks_are_an_error_and_evict_nothing():
    one = manager(1, 2, 3, active=(1, 2, 3), max_loras=4, lora_pool_blocks=3)
    one.acquire(1)
    one.pin_adapter(3)
    one.add_adapter(zeros_model(4, rank=32))
    before = device_state(one)
    assert not one.can_activate(4)
    with pytest.raises(AdapterInUseError, match="adapter 4"):
        one.activate_adapter(4)
    assert device_state(one) == before
    one.release(1)
    assert one.can_activate(4)


def test_fits_counts_slots_and_blocks():
    one = manager(1, 2, active=(1, 2), lora_pool_blocks=3, max_loras=3)
    small, big = ({"new": dict.fromkeys(one.pools, count)} for count in (1, 2))
    other = {"other": small["new"]}
    assert one.fits({7: small}, beside={1, 2})
    assert not one.fits({7: big}, beside={1, 2})
    assert one.fits({7: big}, beside={1})
    assert not one.fits({7: small, 8: other}, beside={1, 2})
    assert one.fits({7: small, 8: small}, beside={1})  # two that share their blocks
    assert one.fits({1: big}, beside={1, 2})  # itself in another version
    assert not one.fits({7: {"new": {"down": 4}}}, beside=set())


# -- another version -------------------------------------------------------------------------


def test_replacing_gives_up_the_slot_unless_pinned():
    one = manager(1, 2, active=(1,))
    one.pin_adapter(2)
    for adapter_id in (1, 2):
        new = zeros_model(adapter_id, rank=20)
        one.replace_adapter(new)
        assert one.get_adapter(adapter_id) is new
    assert one.slot_of(1) is None
    assert one.slot_of(2) is not None
    assert one.pinned == {2}
    assert {write.lora.rank for write in one.take_writes()} == {20}


def test_a_pinned_adapter_that_would_outgrow_the_pool_is_not_replaced():
    one = manager(1, 2, max_loras=3, lora_pool_blocks=2)
    one.pin_adapter(1)
    one.acquire(2)
    old, before = one.get_adapter(1), device_state(one)
    with pytest.raises(AdapterInUseError, match="pinned adapter 1"):
        one.replace_adapter(zeros_model(1, rank=20))
    assert one.get_adapter(1) is old
    assert device_state(one) == before
    assert one.pinned == {1}


# -- pending writes --------------------------------------------------------------------------


def written(one: LoRAModelManager) -> list[tuple[int, str, int, int]]:
    return [(w.lora.id, w.projection.name, w.block, w.first_rank) for w in one.take_writes()]


def test_writes_cover_exactly_the_blocks_of_the_active():
    one = manager()
    one.add_adapter(zeros_model(1, rank=20))
    one.add_adapter(zeros_model(2, rank=16, parts=MLP))
    one.activate_adapter(1)
    one.activate_adapter(2)
    expected = [
        (adapter_id, name, block, 16 * index)
        for slot, adapter_id in enumerate(one.lora_index_to_id)
        for name, slot_map in one.slot_maps.items()
        for index, block in enumerate(slot_map.get(slot))
    ]
    assert sorted(written(one)) == sorted(expected)
    assert written(one) == []  # once


@pytest.mark.parametrize("way", ["deactivate_adapter", "remove_adapter"])
def test_writes_of_an_adapter_that_has_left_are_dropped(way):
    one = manager(1, 2, active=(1, 2))
    getattr(one, way)(1)
    assert {write[0] for write in written(one)} == {2}


def test_a_slot_is_written_once_its_writes_are_taken():
    one = manager(1, 2, 3, active=(1, 2))
    assert not one.is_written(1) and not one.is_written(2)
    writes = one.take_writes()
    assert one.is_written(1) and one.is_written(2)
    new = one.supersede(1)
    assert one.is_written(new)
    one.put_back(writes)
    assert not one.is_written(new) and not one.is_written(2)
    one.take_writes()
    one.deactivate_adapter(2)
    one.activate_adapter(3)
    assert one.is_written(new) and not one.is_written(3)
    again = one.supersede(3)
    assert not one.is_written(again)


def test_coming_back_is_written_again():
    one = manager(1, 2, active=(1, 2))
    one.take_writes()
    assert not one.activate_adapter(1)
    assert written(one) == []
    one.deactivate_adapter(1)
    one.activate_adapter(1)
    assert {write[0] for write in written(one)} == {1}


# -- the parts -------------------------------------------------------------------------------


def mixture(adapter_id, *components) -> LoRAMixture:
    return mix(
        adapter_id,
        [(lora, 0.5 + index) for index, lora in enumerate(components)],
        "cat",
        "m",
        lora_config(),
    )


def test_a_mixture_lists_the_blocks_of_its_components_and_copies_none():
    one = manager(1, active=(1,), max_lora_blocks=3, max_lora_rank=32)
    second = zeros_model(2, rank=20)
    one.add_adapter(mixture(3, one.get_adapter(1), second))
    one.take_writes()
    one.activate_adapter(3)
    first, mixed = one.slot_maps["qkv"].get(0), one.slot_maps["qkv"].get(1)
    assert len(mixed) == 3
    assert mixed[0] == first[0]
    assert one.slot_maps["qkv"].scales[1].tolist() == [0.5, 1.5, 1.5]
    assert {write.lora for write in one.take_writes()} == {second}


def test_blocks_that_are_shared_are_free_after_the_last_slot_lists_them():
    one = manager(1, active=(1,), max_lora_blocks=3, max_lora_rank=16, lora_pool_blocks=3)
    one.add_adapter(mixture(3, one.get_adapter(1), zeros_model(2)))
    one.activate_adapter(3)
    assert free(one) == {1}
    one.remove_adapter(1)
    assert free(one) == {1}
    one.remove_adapter(3)
    assert free(one) == {3}


def test_a_mixture_that_evicts_its_component_keeps_the_blocks():
    one = manager(1, active=(1,), max_loras=1, max_lora_blocks=2, lora_pool_blocks=2)
    one.take_writes()
    one.add_adapter(mixture(3, one.get_adapter(1), zeros_model(2)))
    one.activate_adapter(3)
    assert one.lora_index_to_id == [3]
    assert {write.lora.id for write in one.take_writes()} == {2}
    assert free(one) == {0}


def test_writes_of_a_shared_adapter_outlive_its_slot():
    one = manager(1, active=(1,), max_lora_blocks=2, lora_pool_blocks=2, max_lora_rank=16)
    one.add_adapter(mixture(3, one.get_adapter(1)))
    one.activate_adapter(3)
    one.deactivate_adapter(1)
    assert {write.lora.id for write in one.take_writes()} == {1}


def test_a_slot_map_forgets_what_a_slot_held():
    one = SlotMap(2, 3)
    one.set(1, [5, 6, 7])
    one.set(1, [4])
    assert one.get(1) == [4]
    assert one.blocks.tolist() == [[0, 0, 0], [4, 0, 0]]


# -- making room for those that have waited ----------------------------------------------------


def needs_of(one, *adapter_ids):
    return {adapter_id: one.needs(zeros_model(adapter_id, rank=20)) for adapter_id in adapter_ids}


def test_adapters_with_the_fewest_sequences_are_emptied_first():
    one = manager(max_loras=3, max_cpu_loras=6)
    for adapter_id, users in ((1, 3), (2, 1), (3, 2)):
        one.add_adapter(zeros_model(adapter_id, rank=20))
        for _ in range(users):
            one.acquire(adapter_id)
    assert one.to_drain({}) == set()
    assert one.to_drain(needs_of(one, 4)) == {2}
    assert one.to_drain(needs_of(one, 4, 5)) == {2, 3}
    assert one.to_drain(needs_of(one, 4, 5, 6, 7)) == {1, 2, 3}
    one.release(2)  # its slot can be had now
    assert one.to_drain(needs_of(one, 4)) == set()


def test_adapters_are_emptied_for_bytes_of_the_host_too():
    size = zeros_model(1).nbytes
    one = manager(1, 2, 3, max_loras=4, max_cpu_lora_bytes=3 * size + 1)
    for adapter_id, users in ((1, 1), (2, 2), (3, 2)):
        for _ in range(users):
            one.acquire(adapter_id)
    needs = {4: one.needs(zeros_model(4))}
    assert one.to_drain(needs) == set()  # a slot is free
    assert one.to_drain(needs, {4: size}) == {1}
    one.release(1)  # nobody uses it now; it starts nobody while the other is read
    assert one.to_drain(needs, {4: size}) == {1}
    for adapter_id in (1, 2, 3):
        one.pin_adapter(adapter_id)
    assert one.to_drain(needs, {4: size}) == set()


def test_as_many_are_emptied_as_the_blocks_take_and_no_pinned_ones():
    one = manager(max_loras=4, max_cpu_loras=6, lora_pool_blocks=4)
    for adapter_id in (1, 2, 3):
        one.add_adapter(zeros_model(adapter_id, rank=4))
        one.acquire(adapter_id)
    assert one.to_drain(needs_of(one, 5)) == {1}  # a slot and a block are free, two are needed
    one.pin_adapter(1)
    assert one.to_drain(needs_of(one, 5)) == {2}
    one.pin_adapter(2)
    one.pin_adapter(3)
    assert one.to_drain(needs_of(one, 5)) == set()
