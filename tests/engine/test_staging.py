"""Host buffers of writes: filled again only when what was sent has arrived."""

import contextlib
import gc
import itertools
import types
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora import LoRARequest, SamplingParams
from jlora.engine import adapter_pool
from jlora.engine import staging as staging_module
from jlora.engine.pool_layout import staged_bytes
from jlora.engine.staging import Landings, StagedAdapter, StagingBuffers, pinned_memory
from jlora.manager import LRUCacheWorkerLoRAManager
from jlora.projections import HEAD
from tests.engine.tools import make_adapters, make_text_model, small_llm
from tests.reference import make_adapter, make_model

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


PINNED = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


@pytest.mark.parametrize("pinned", [None, PINNED])
def test_sent_arrays_keep_their_values_when_the_buffers_are_filled_again(pinned):
    staging, sent = StagingBuffers(pinned), []
    for value in range(8):
        array = staging.empty((100, 1000), np.float32)
        array[:] = value
        sent.append(staging.send(array, SHARDING))
    for value, array in enumerate(sent):
        assert np.asarray(array).min() == np.asarray(array).max() == value


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_in_pinned_memory_are_as_others(dtype):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = StagingBuffers(PINNED).empty((2, 3, 5), dtype)
    array[:] = np.arange(30).reshape(2, 3, 5)
    part = array[1]
    sent = StagingBuffers(PINNED).send(array, sharding)
    assert sent.sharding == sharding and sent.dtype == dtype
    del array  # its memory lives as long as a part of it
    gc.collect()
    np.testing.assert_array_equal(np.asarray(sent, np.float32).ravel(), np.arange(30))
    np.testing.assert_array_equal(np.asarray(part, np.float32).ravel(), np.arange(15, 30))


@pytest.mark.parametrize("pinned", [None, PINNED])
def test_reserved_arrays_are_those_that_are_filled(pinned, monkeypatch):
    staging, made = StagingBuffers(pinned), []
    new = StagingBuffers._new
    monkeypatch.setattr(StagingBuffers, "_new", lambda *kind: made.append(new(*kind)) or made[-1])
    staging.reserve((4, 4), np.float16)
    assert len(made) == (0 if pinned is None else 2)
    asked = [staging.empty((4, 4), np.float16) for _ in range(2)]
    assert len(made) == 2 and {id(one) for one in asked} == {id(one) for one in made}


def test_blocks_arrive_where_blocks_were_that_have_been_written():
    landings, kind = Landings(jax.devices()[0]), ((4, 8), np.dtype(np.float32))
    staging = StagingBuffers(PINNED, landings)

    def send() -> jax.Array:
        sent = staging.send(staging.empty(*kind), SHARDING)
        staging.wait()
        return sent

    landings.reserve({(4, 8): 2}, np.float32)
    landings.reserve({(4, 8): 2}, np.float32)  # has them already
    first, second = landings._kept[kind]
    sent = [send() for _ in range(3)]
    assert first.is_deleted() and second.is_deleted()
    assert not any(array.is_deleted() for array in sent)
    adapter = StagedAdapter()
    landings.keep_after(adapter)
    adapter.blocks["q_proj", None, 0] = sent[0], sent[1], np.ones(1)
    send()
    assert not any(array.is_deleted() for array in sent)
    del adapter
    send()
    assert [array.is_deleted() for array in sent] == [False, True, False]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_more_memory_is_kept_than_was_set_aside(dtype):
    """Also of adapters in another dtype than the pool's, and of more than are staged at a time."""
    landings = Landings(jax.devices()[0])
    staging = StagingBuffers(PINNED, landings)
    places = {(4, 8): 2, (16, 8): 2}
    landings.reserve(places, np.float32)

    def kept() -> int:
        return sum(array.nbytes for arrays in landings._kept.values() for array in arrays)

    most = kept()
    for count in (1, 2, 5, 1):
        adapter = StagedAdapter()
        landings.keep_after(adapter)
        for block in range(count):
            a, b = (staging.send(staging.empty(shape, dtype), SHARDING) for shape in places)
            staging.wait()
            adapter.blocks["q_proj", None, block] = a, b, np.ones(1)
        there = sum(a.nbytes + b.nbytes for a, b, _ in adapter.blocks.values())
        assert kept() + there <= max(most, there)
        del adapter
        assert kept() <= most
    assert kept() >= most / 2


def test_a_copy_that_fails_hurts_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_pool, "pinned_memory", lambda mesh: PINNED)
    make_text_model(tmp_path / "model")
    make_adapters(tmp_path / "model", tmp_path, (8,))
    engine = small_llm(tmp_path / "model").llm_engine
    engine.add_lora(LoRARequest("a", 1, str(tmp_path / "adapter-8")))
    pool, adapter = engine.runner.pool, engine.lora.manager.get_adapter(1)
    pool.compile()
    sends, real = itertools.count(1), staging_module._to_its_device

    def send(*arguments):
        if next(sends) == 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return real(*arguments)

    monkeypatch.setattr(staging_module, "_to_its_device", send)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        pool.stage(adapter)
    for _ in range(6):
        pool.stage(adapter)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama3", {"r": 64, "target_modules": "all-linear"}),
        (
            "qwen3-moe",
            {"r": 32, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        ),
    ],
    ids=["dense", "experts"],
)
def test_there_is_a_place_for_each_block_on_its_way(family, options, tmp_path, monkeypatch):
    """For as many adapters as are staged at a time, in the memory that is set aside for them."""
    monkeypatch.setattr(adapter_pool, "pinned_memory", lambda mesh: PINNED)
    make_model(family, tmp_path / "model")
    make_adapter(tmp_path / "model", tmp_path / "a", **options)
    experts = {"lora_expert_blocks": 4} if family == "qwen3-moe" else {}
    limits = {"max_lora_rank": 64, "max_staged_loras": 3, **experts}
    engine = small_llm(tmp_path / "model", skip_tokenizer_init=True, **limits).llm_engine
    engine.add_lora(LoRARequest("a", 1, str(tmp_path / "a")))
    pool, adapter = engine.runner.pool, engine.lora.manager.get_adapter(1)
    pool.compile()
    kept = pool._landings._kept
    total = sum(array.nbytes for arrays in kept.values() for array in arrays)
    assert total <= staged_bytes(engine.modules, engine.lora_config, pool._dtype, 1)
    blocks = pool.stage(adapter).blocks.values()
    used = {(array.shape, array.dtype) for a, b, _ in blocks for array in (a, b)}
    pool.compile()  # what has been used up is there again
    staged = []
    for _ in range(3):
        assert all(kept[kind] for kind in used)
        staged.append(pool.stage(adapter))
    if family == "llama3":  # of the largest rank in every row: nothing is left
        assert not any(kept.values())
    left = {kind: len(kept[kind]) for kind in used}
    del staged[1]
    assert all(len(kept[kind]) > count for kind, count in left.items())
    staged.append(pool.stage(adapter))
    assert {kind: len(kept[kind]) for kind in used} == left


def test_only_a_single_gpu_has_memory_pinned_for_it():
    assert pinned_memory(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])) is None


class FakeArray:
    """On a device with memory of its own, where it arrives when it is waited for."""

    def __init__(self, array):
        self.array, self.value = array, None

    def block_until_ready(self):
        self.value = self.array.copy() if self.value is None else self.value

    def devices(self):
        return [types.SimpleNamespace(platform="gpu")]


def test_buffers_are_filled_again_once_they_have_arrived(monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging, sent, seen = StagingBuffers(), [], set()
    for value in range(6):
        array = staging.empty((4, 4), np.float16)
        array[:] = value
        seen.add(array.ctypes.data)
        sent.append(staging.send(array, SHARDING))
    assert len(seen) == 4
    staging.wait()
    assert [float(one.value.max()) for one in sent] == list(range(6))
    assert staging.empty((4, 4), np.float16).ctypes.data in seen


def test_a_transfer_that_fails_is_told_once(monkeypatch):
    """And its buffer, which may still be read, is not used again."""
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging = StagingBuffers()
    lost = staging.empty((4, 4), np.float16)
    sent = staging.send(lost, SHARDING)

    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(sent, "block_until_ready", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        staging.wait()
    staging.wait()
    assert staging.empty((4, 4), np.float16).ctypes.data != lost.ctypes.data


def test_shapes_and_dtypes_are_kept_apart(monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda array, _: FakeArray(array))
    staging = StagingBuffers()
    staging.send(staging.empty((4, 4), np.float16), SHARDING)
    staging.wait()
    for shape, dtype in (((2, 8), np.float16), ((4, 4), np.float32)):
        array = staging.empty(shape, dtype)
        assert array.shape == shape and array.dtype == dtype


def test_a_write_that_nobody_has_staged_waits_for_earlier_ones(tmp_path, monkeypatch):
    """All its arrays come from buffers of which few are on their way: else memory runs out."""
    make_text_model(tmp_path / "model")
    adapters = make_adapters(tmp_path / "model", tmp_path, (20, 20, 20))
    llm = small_llm(tmp_path / "model", max_lora_rank=32, max_loras=3, max_cpu_loras=3)
    manager, pool = llm.llm_engine.lora, llm.llm_engine.runner.pool
    for index, path in enumerate(adapters, 1):
        LRUCacheWorkerLoRAManager.add_adapter(manager, LoRARequest(str(index), index, str(path)))
    real, asked = StagingBuffers.empty, []
    monkeypatch.setattr(
        StagingBuffers, "empty", lambda self, *kind: asked.append(kind) or real(self, *kind)
    )
    writes = manager.manager.take_writes()
    manager.manager.put_back(writes)
    assert len(writes) >= 6
    pool.apply(manager.manager)
    assert len(asked) == 2 * len(writes)


class FakeLeader:
    """Of hosts that are not there: notes which adapters they would have dropped, and when."""

    def __init__(self):
        self.numbers, self.dropped, self.told = itertools.count(), [], []

    def number(self, staged):
        staged.number = next(self.numbers)
        weakref.finalize(staged, self.dropped.append, staged.number).atexit = False

    def stage(self, op, arguments, arrays):
        pass

    def confirm(self, number):
        pass

    def working(self):
        return contextlib.nullcontext()

    def agreed(self, op, arguments=(), arrays=()):
        if op == "blocks":
            numbers = {number for number, *_ in arguments}
            self.told.append((numbers, numbers & set(self.dropped)))
        return contextlib.nullcontext()


def test_other_hosts_keep_an_adapter_until_they_have_written_it(tmp_path):
    make_text_model(tmp_path / "model")
    adapters = make_adapters(tmp_path / "model", tmp_path, (20,))
    llm = small_llm(tmp_path / "model", max_lora_rank=32, max_loras=1, max_cpu_loras=1)
    manager, pool = llm.llm_engine.lora, llm.llm_engine.runner.pool
    request = LoRARequest("1", 1, str(adapters[0]))
    LRUCacheWorkerLoRAManager.add_adapter(manager, request)
    pool._hosts = leader = FakeLeader()
    pool.apply(manager.manager)
    assert len(leader.told) == 2  # two blocks of all rows
    assert all(len(numbers) > 1 and not dropped for numbers, dropped in leader.told)


def test_pinned_memory_serves_rows_that_are_padded(tmp_path, monkeypatch):
    """lm_head, whose 101 columns are 128 on the device; only reserved shapes are asked for."""
    make_model("llama3", tmp_path / "model")
    make_adapter(tmp_path / "model", tmp_path / "a", target_modules=["q_proj", "lm_head"])
    request, prompt = LoRARequest("a", 1, str(tmp_path / "a")), {"prompt_token_ids": [3, 4, 5]}
    answers, pools = [], []
    for pinned in (None, PINNED):
        monkeypatch.setattr(adapter_pool, "pinned_memory", lambda mesh, pinned=pinned: pinned)
        llm = small_llm(tmp_path / "model", enable_lora_embeddings=True, skip_tokenizer_init=True)
        pools.append(llm.llm_engine.runner.pool)
        outputs = llm.generate(
            [prompt], SamplingParams(temperature=0, max_tokens=5), lora_request=request
        )
        answers.append(outputs[0].outputs[0].token_ids)
    assert answers[0] == answers[1]
    pool = pools[1]
    shapes = {shape for row in pool._modules.projections for shape in pool.block_shapes(row)}
    head = next(row for row in pool._modules.vocab_projections if row.name == HEAD)
    assert pool.block_shapes(head)[1][2] == 128
    asked = []
    real = StagingBuffers.empty
    monkeypatch.setattr(
        StagingBuffers, "empty", lambda self, *kind: asked.append(kind[0]) or real(self, *kind)
    )
    pool.stage(llm.llm_engine.lora.manager.get_adapter(1))
    assert set(asked) <= shapes | set(pool.block_shapes(head))
