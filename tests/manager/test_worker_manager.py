"""From requests to slots: loading before evicting, steps, versions of files, warm-up."""

from __future__ import annotations

import os
import shutil

import pytest

from jlora.errors import AdapterError, AdapterInUseError
from jlora.manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from jlora.manager import worker_manager as module
from tests.manager.adapters import (
    MODULES,
    WaitingLoRAManager,
    device_state,
    lora_config,
    make_tensors,
    request,
    write_adapter,
)

BOTH = pytest.mark.parametrize("kind", [WorkerLoRAManager, LRUCacheWorkerLoRAManager])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Good adapters: "small" of rank 4, "big" of rank 32, and "bad"."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "small")
    write_adapter(root / "big", r=32)
    write_adapter(root / "bad", {})
    return root


@pytest.fixture
def loads(monkeypatch):
    """Counts the adapters that are read."""
    names = []
    read = module.LoRAModel.from_local_checkpoint

    def counted(folder, *arguments, **options):
        names.append(folder.name)
        return read(folder, *arguments, **options)

    monkeypatch.setattr(module.LoRAModel, "from_local_checkpoint", counted)
    return names


def worker(kind=WaitingLoRAManager, **options):
    return kind(MODULES, lora_config(**options))


def everything(one) -> tuple:
    return one.list_adapters(), one.manager.held, device_state(one.manager)


# -- steps, as vLLM's tests have them --------------------------------------------------------


def steps(one, folders, *requests):
    one.set_active_adapters([request(adapter_id, folders / "small") for adapter_id in requests])
    return one.list_adapters(), one.manager.lora_index_to_id


def test_the_lru_manager_keeps_what_a_step_does_not_name(folders):
    one = worker(max_loras=4)
    assert steps(one, folders, 1, 2) == ({1, 2}, [1, 2, None, None])
    assert steps(one, folders, 1, 3, 4) == ({1, 2, 3, 4}, [1, 2, 3, 4])
    assert steps(one, folders, 1, 2, 5) == ({1, 2, 4, 5}, [1, 2, 5, 4])
    assert steps(one, folders, 1, 1, 1) == ({1, 2, 4, 5}, [1, 2, 5, 4])
    assert steps(one, folders, 6, 7, 8) == ({1, 6, 7, 8}, [1, 7, 8, 6])
    with pytest.raises(RuntimeError, match="5 adapters in one step, but max_loras=4"):
        steps(one, folders, 10, 11, 12, 13, 14)


def test_the_plain_manager_forgets_what_a_step_does_not_name(folders):
    one = worker(WorkerLoRAManager, max_loras=4)
    assert steps(one, folders, 1, 2) == ({1, 2}, [1, 2, None, None])
    assert steps(one, folders, 1, 3, 4) == ({1, 3, 4}, [1, 3, 4, None])
    assert steps(one, folders, 1, 2, 5) == ({1, 2, 5}, [1, 2, 5, None])
    assert steps(one, folders, 1, 1, 1) == ({1}, [1, None, None, None])
    assert steps(one, folders, 6, 7, 8) == ({6, 7, 8}, [6, 7, 8, None])
    with pytest.raises(RuntimeError, match="5 adapters in one step, but max_loras=4"):
        steps(one, folders, 10, 11, 12, 13, 14)


def test_the_plain_manager_keeps_what_is_held(folders):
    one = worker(WorkerLoRAManager, max_loras=3)
    steps(one, folders, 1, 2, 3)
    one.pin_adapter(1)
    one.manager.acquire(2)
    assert steps(one, folders, 4) == ({1, 2, 4}, [1, 2, 4])


@BOTH
def test_a_step_without_adapters(kind, folders):
    one = worker(kind)
    one.set_active_adapters([None, None])
    assert one.list_adapters() == set()


@BOTH
def test_a_step_that_fails_to_load_changes_nothing(kind, folders):
    one = worker(kind, max_loras=2, max_cpu_loras=2)
    steps(one, folders, 1, 2)
    before = everything(one)
    with pytest.raises(AdapterError, match="'a4'"):
        one.set_active_adapters([request(3, folders / "small"), request(4, folders / "bad")])
    assert everything(one) == before


@BOTH
def test_adapters_of_a_step_do_not_evict_each_other(kind, folders):
    one = worker(kind, max_loras=2, max_cpu_loras=2)
    steps(one, folders, 1, 2)
    one.pin_adapter(1)
    before = everything(one)
    with pytest.raises(AdapterInUseError, match="3, 4 at once"):
        steps(one, folders, 3, 4)
    assert everything(one) == before


def test_a_new_adapter_of_a_step_does_not_evict_an_old_one_of_it(folders):
    """Though the old one is the least recently used, on the host and in the slots."""
    one = worker(max_loras=2, max_cpu_loras=2)
    steps(one, folders, 1, 2)
    assert steps(one, folders, 3, 1) == ({1, 3}, [1, 3])


@BOTH
def test_adapters_of_a_step_that_need_more_blocks_than_there_are(kind, folders):
    one = worker(kind, lora_pool_blocks=3)
    steps(one, folders, 1, 2)
    before = everything(one)
    with pytest.raises(AdapterInUseError, match="lora_pool_blocks"):
        one.set_active_adapters([request(i, folders / "big") for i in (3, 4)])
    assert everything(one) == before
    one.set_active_adapters([request(3, folders / "big"), request(2, folders / "small")])
    assert one.manager.lora_index_to_id == [3, 2]


# -- adding ----------------------------------------------------------------------------------


def test_adding_loads_and_activates_once(folders, loads):
    one = worker()
    assert one.add_adapter(request(1, folders / "small"))
    assert not one.add_adapter(request(1, folders / "small"))
    assert loads == ["small"]
    assert one.manager.lora_index_to_id == [1, None]


def test_the_same_id_and_path_under_another_name_or_spelling(folders, loads, monkeypatch):
    one = worker()
    one.add_adapter(request(1, folders / "small"))
    monkeypatch.chdir(folders)
    for path in ("small", "./small/", f"{folders}/big/../small"):
        assert not one.add_adapter(request(1, path))
    assert loads == ["small"]


def test_an_adapter_on_the_host_outlives_its_folder(tmp_path):
    os.symlink(write_adapter(tmp_path / "v1"), tmp_path / "current")
    one = worker()
    one.add_adapter(request(1, tmp_path / "current"))
    shutil.rmtree(tmp_path / "v1")
    assert not one.add_adapter(request(1, tmp_path / "current"))
    assert one.start(request(1, tmp_path / "current")) == 0


def test_a_load_that_fails_evicts_nothing(folders):
    one = worker(max_loras=1, max_cpu_loras=1)
    one.add_adapter(request(1, folders / "small"))
    before = everything(one)
    for way in (one.add_adapter, one.read, one.start):
        with pytest.raises(AdapterError, match="'a2'"):
            way(request(2, folders / "bad"))
    assert everything(one) == before


def test_all_slots_pinned_is_said_before_anything_is_read(folders, loads):
    one = worker(max_loras=1)
    one.add_adapter(request(1, folders / "small"))
    one.pin_adapter(1)
    for way in (one.add_adapter, one.read, one.start):
        with pytest.raises(AdapterInUseError, match="'a2': all 1 slots hold pinned adapters"):
            way(request(2, folders / "small"))
    assert loads == ["small"]
    assert one.list_adapters() == {1}


def test_pinned_adapters_that_leave_too_few_blocks(folders):
    """Else the request would be admitted and wait for ever."""
    one = worker(lora_pool_blocks=2)
    one.add_adapter(request(1, folders / "small"))
    one.pin_adapter(1)
    before = everything(one)
    for way in (one.add_adapter, one.read):
        with pytest.raises(AdapterInUseError, match=r"'a2': pinned.*lora_pool_blocks \(now 2\)"):
            way(request(2, folders / "big"))
    assert everything(one) == before


def test_adding_while_all_slots_are_in_use_keeps_it_on_the_host(folders):
    one = worker(max_loras=1)
    one.start(request(1, folders / "small"))
    assert one.add_adapter(request(2, folders / "small"))
    assert one.list_adapters() == {1, 2}
    assert one.manager.lora_index_to_id == [1]


def test_removing_forgets_the_path(folders):
    one = worker()
    one.add_adapter(request(1, folders / "small"))
    assert one.remove_adapter(1)
    assert not one.remove_adapter(1)
    assert one.add_adapter(request(1, folders / "big"))


def test_removing_what_is_in_use_is_refused_and_forgets_nothing(folders):
    one = worker()
    one.start(request(1, folders / "small"))
    with pytest.raises(AdapterInUseError, match="in use by 1 running requests"):
        one.remove_adapter(1)
    with pytest.raises(AdapterError, match="id 1 stands for"):
        one.add_adapter(request(1, folders / "big"))


# -- requests that run -----------------------------------------------------------------------


def test_acquiring_waits_for_a_slot_and_for_blocks(folders):
    one = worker(max_loras=2, lora_pool_blocks=3)
    assert one.start(request(1, folders / "big")) == 0
    assert one.start(request(2, folders / "big")) is None
    assert one.start(request(3, folders / "small")) == 1
    assert one.start(request(3, folders / "small")) == 1
    assert one.start(request(4, folders / "small")) is None
    one.manager.release(1)
    assert one.start(request(2, folders / "big")) == 0


def test_those_that_wait_for_blocks_are_not_read_again_and_again(folders, loads):
    """One place on the host is left for two that wait: they would evict each other each step."""
    one = worker(max_loras=3, max_cpu_loras=3, lora_pool_blocks=3)
    waiting = [request(adapter_id, folders / "big") for adapter_id in (2, 3)]
    for each in waiting:
        one.read(each)
    one.start(request(1, folders / "small"))
    one.start(request(4, folders / "small"))
    loads.clear()
    for _ in range(3):
        one.want({each.lora_int_id: each for each in waiting})
        one.settle()
        assert [one.acquire(each, each.lora_int_id) for each in waiting] == [None, None]
    assert loads == ["big"]  # that of the first
    one.manager.release(1)
    assert one.start(waiting[0]) is not None


@pytest.mark.parametrize("budget", [False, True])
def test_a_long_queue_leaves_half_of_the_host_to_others(folders, loads, budget):
    """What it needs last does not push out what is popular, and nobody waits for just now."""
    options = {"max_loras": 4, "max_cpu_loras": 8}
    if budget:
        one = worker(**options)
        one.read(request(1, folders / "small"))
        options |= {"max_cpu_loras": 20, "max_cpu_lora_bytes": 8 * one.manager.host_bytes}
    one = worker(**options)
    waiting = [request(adapter_id, folders / "small") for adapter_id in range(11, 21)]
    for each in waiting:
        one.read(each)  # the last of them pushes others out, as a queue that builds up
    for adapter_id in (1, 2, 3, 4):  # idle, in slots
        one.read(request(adapter_id, folders / "small"))
        one.start(request(adapter_id, folders / "small"))
        one.manager.release(adapter_id)
    loads.clear()
    for _ in range(3):
        one.want({each.lora_int_id: each for each in waiting})
        one.settle()
    assert {1, 2, 3, 4, 11, 12, 13, 14} == one.list_adapters()
    assert loads == ["small"] * 4


def test_few_reads_are_begun_for_a_long_queue(folders, loads):
    """So that whoever comes when the queue has been aborted does not wait for all of them."""
    one = worker(max_loras=2, max_cpu_loras=40, max_lora_loads=2)
    waiting = [request(adapter_id, folders / "small") for adapter_id in range(1, 16)]
    for each in waiting:
        one.read(each)
        one.manager.remove_adapter(each.lora_int_id)  # from the host: its version is known
    loads.clear()
    for most in (4, 8):
        one.want({each.lora_int_id: each for each in waiting})
        one.settle()
        assert len(loads) == most
    assert one.list_adapters() == set(range(1, 9))


def test_checking_reads_once_even_without_room_on_the_host(folders, loads):
    one = worker(max_loras=1, max_cpu_loras=1)
    one.start(request(1, folders / "small"))
    first = one.read(request(2, folders / "big"))
    assert one.read(request(2, folders / "big")) == first == one.version(2)
    assert loads == ["small", "big"]
    assert one.list_adapters() == {1}
    with pytest.raises(AdapterError, match="'a3'"):
        one.read(request(3, folders / "bad"))


def test_checking_tells_the_version(tmp_path):
    one = worker()
    folder = write_adapter(tmp_path / "a")
    first = one.read(request(1, folder))
    assert one.read(request(1, folder)) == first == one.version(1)
    write_adapter(folder, make_tensors(rank=5), r=5)
    assert one.read(request(1, folder)) == first  # what is on the host is served
    assert one.read(request(1, folder, load_inplace=True)) != first


# -- other versions of the files -------------------------------------------------------------


def test_load_inplace_reads_only_what_has_changed(tmp_path, loads):
    one = worker()
    folder = write_adapter(tmp_path / "a")
    one.add_adapter(request(1, folder))
    assert not one.add_adapter(request(1, folder, load_inplace=True))
    assert loads == ["a"]
    write_adapter(folder, r=6)
    assert one.add_adapter(request(1, folder, load_inplace=True))
    assert loads == ["a", "a"]
    assert one.manager.get_adapter(1).rank == 6
    assert one.manager.lora_index_to_id == [1, None]
    assert {write.lora.rank for write in one.manager.take_writes()} == {6}


def test_load_inplace_from_another_path(folders, loads):
    one = worker()
    one.add_adapter(request(1, folders / "small"))
    one.pin_adapter(1)
    assert one.add_adapter(request(1, folders / "big", load_inplace=True))
    assert one.manager.get_adapter(1).rank == 32
    assert one.manager.is_pinned(1)
    assert not one.add_adapter(request(1, folders / "big"))
    with pytest.raises(AdapterError, match="id 1 stands for"):
        one.add_adapter(request(1, folders / "small"))


def test_load_inplace_while_in_use_puts_the_new_version_beside_the_old(folders):
    one = worker()
    one.start(request(1, folders / "small"))
    one.manager.bind(1)
    old, seen = one.manager.get_adapter(1), []
    one.on_superseded = lambda *ids: seen.append(ids)
    assert not one.add_adapter(request(1, folders / "small", load_inplace=True))
    assert one.add_adapter(request(1, folders / "big", load_inplace=True))
    assert seen == [(1, -1)]
    assert one.manager.get_adapter(-1) is old
    assert one.manager.lora_index_to_id == [-1, 1]
    assert one.manager.get_adapter(1).rank == 32
    assert one.version(-1).identity == old.identity != one.version(1).identity
    one.manager.release(-1)
    one.manager.unbind(-1)  # the last request with it has ended
    assert one.manager.get_adapter(-1) is None
    assert one.manager.lora_index_to_id == [None, 1]


def test_a_pinned_adapter_in_use_is_replaced_only_where_both_fit(folders):
    one = worker(lora_pool_blocks=2)
    one.start(request(1, folders / "small"))
    one.pin_adapter(1)
    before = everything(one)
    with pytest.raises(AdapterInUseError, match="new version of pinned adapter 1"):
        one.add_adapter(request(1, folders / "big", load_inplace=True))
    assert everything(one) == before


def test_load_inplace_that_fails_keeps_the_old_version(folders):
    one = worker()
    one.add_adapter(request(1, folders / "small"))
    before = everything(one)
    with pytest.raises(AdapterError, match=r"'a1'.*no tensors"):
        one.add_adapter(request(1, folders / "bad", load_inplace=True))
    assert everything(one) == before
    assert not one.add_adapter(request(1, folders / "small"))


# -- warm-up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, 3, 2])
def test_dummies_leave_nothing_behind(blocks):
    one = worker(lora_pool_blocks=blocks)
    before = everything(one)
    with one.maybe_select_dummy_loras(one.lora_config) as ids:
        assert one.list_adapters() == set(ids)
        assert [i for i in one.manager.lora_index_to_id if i is not None] == ids
        assert len(ids) == (2 if blocks is None else 1)
        assert {write.lora.rank for write in one.manager.take_writes()} == {32}
    assert everything(one) == before
    assert one.manager.take_writes() == []


def test_dummies_are_gone_after_an_error_too():
    one = worker()
    before = everything(one)
    with pytest.raises(ZeroDivisionError), one.maybe_select_dummy_loras(one.lora_config):
        raise ZeroDivisionError
    assert everything(one) == before


def test_dummies_without_lora():
    with worker().maybe_select_dummy_loras(None) as ids:
        assert ids == []


def test_dummies_never_take_the_place_of_adapters(folders):
    one = worker()
    one.add_adapter(request(1, folders / "small"))
    with pytest.raises(RuntimeError, match="dummy"), one.maybe_select_dummy_loras(one.lora_config):
        pass
    assert one.list_adapters() == {1}
