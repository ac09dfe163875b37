"""After warm-up nothing is compiled, and nothing as large as a layer of pool or KV is copied."""

from __future__ import annotations

import contextlib
import gc
import shutil
import types
import weakref
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoRARequest, SamplingParams
from jlora.engine import collector
from jlora.engine.pool_arrays import STAGING_DTYPES
from jlora.engine.runner import ModelRunner
from tests.engine.tools import make_adapters, make_text_model, small_llm
from tests.reference import INVOCATION, make_adapter, make_model, special_kinds

RANKS = (1, 4, 8, 16, 17, 32)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What jax traces, lowers or compiles meanwhile (also when the cache on disk has it)."""
    events: list[str] = []

    def listen(name: str, seconds: float, **_) -> None:
        if name.startswith("/jax/core/compile/"):
            events.append(name.rsplit("/", 1)[1])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_counter_counts():
    """Also the smallest thing: an operation outside of jit with a new shape."""
    with compilations() as events:
        jax.jit(lambda x: x * 3 + 1).lower(jnp.ones(7)).compile()
    assert "backend_compile_duration" in events
    with compilations() as events:
        jnp.ones(1013) + 1
    assert "backend_compile_duration" in events
    with compilations() as events:
        jax.device_put(np.ones(5), jax.devices()[0])
    assert events == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compilation")
    make_text_model(folder / "model")
    make_adapters(folder / "model", folder, RANKS)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def warm(request, folder):
    """An engine after warm-up, on one and on two devices; pages are few, slots fewer."""
    return small_llm(
        folder / "model",
        enforce_eager=False,
        max_num_batched_tokens=8,
        num_gpu_blocks_override=20,
        tensor_parallel_size=request.param,
    )


def test_serving_compiles_nothing(warm, folder):
    """Adapters of every rank evict each other; every kind of sampling; aborts; reloads; pins."""
    engine, rng = warm.llm_engine, np.random.default_rng(0)
    shutil.copytree(folder / "adapter-8", folder / "reloaded", dirs_exist_ok=True)
    kinds = [
        {"temperature": 0},
        {"seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0, "logprobs": 5, "prompt_logprobs": 5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "n": 2},
        {"logit_bias": {5: 1.0}, "min_tokens": 3, "stop_token_ids": [7], "stop": ["e"]},
    ]
    with compilations() as events:
        for index in range(30):
            rank = RANKS[index % len(RANKS)]
            lora = LoRARequest(str(rank), rank, str(folder / f"adapter-{rank}"))
            if index % 5 == 4:
                lora = None
            elif index == 15:
                shutil.copytree(folder / "adapter-4", folder / "reloaded", dirs_exist_ok=True)
            if index % 7 == 0:
                lora = LoRARequest(
                    "reloaded", 99, str(folder / "reloaded"), load_inplace=index == 21
                )
            params = SamplingParams(
                max_tokens=int(rng.integers(3, 30)), **kinds[index % len(kinds)]
            )
            prompt = {"prompt_token_ids": rng.integers(3, 300, int(rng.integers(1, 50))).tolist()}
            engine.add_request(str(index), prompt, params, lora_request=lora)
            for _ in range(3):
                engine.step()
            if index % 6 == 5:
                engine.abort_request(str(index))
        while engine.has_unfinished_requests():
            engine.step()
        engine.add_lora(LoRARequest("4", 4, str(folder / "adapter-4")))
        engine.pin_lora(4)
        engine.remove_lora(4)
        warm.generate("the dog", SamplingParams(max_tokens=2), use_tqdm=False)
    assert engine.scheduler.num_preemptions > 0
    assert events == []


@pytest.mark.parametrize(
    ("family", "devices"),
    [pytest.param("llama-bias", 1, marks=pytest.mark.slow), ("qwen3-moe", 2)],
)
def test_every_kind_of_adapter_compiles_nothing(family, devices, tmp_path):
    """All features are reserved; adapters of all kinds, and mixtures, evict each other."""
    make_model(family, tmp_path / "model")
    kinds = special_kinds(family) | {
        "plain": {"r": 4, "target_modules": ["q_proj"]},
        "other": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
    }
    for name, kind in kinds.items():
        make_adapter(tmp_path / "model", tmp_path / name, **kind)
    requests = {
        name: LoRARequest(name, index, str(tmp_path / name))
        for index, name in enumerate(kinds, start=1)
    }
    parts = [(requests["plain"], 0.5), (requests["other"], -1.0)]
    for index, combination in enumerate(("cat", "linear"), start=100):
        requests[combination] = LoRARequest(
            combination, index, components=parts, combination_type=combination
        )
    experts = {"lora_expert_blocks": 4} if family == "qwen3-moe" else {}
    llm = small_llm(
        tmp_path / "model",
        enforce_eager=False,
        skip_tokenizer_init=True,
        max_num_batched_tokens=8,
        tensor_parallel_size=devices,
        enable_lora_dora=True,
        enable_lora_bias=True,
        enable_lora_embeddings=True,
        max_lora_token_rows=8,
        max_lora_full_weights=1,
        lora_extra_vocab_size=4,
        **experts,
    )
    engine = llm.llm_engine
    with compilations() as events:
        for _ in range(2):
            for index, request in enumerate(requests.values()):
                params = SamplingParams(
                    max_tokens=3, temperature=index % 2, logprobs=3, prompt_logprobs=index % 3
                )
                prompt = {"prompt_token_ids": [5, *INVOCATION, 9, 10]}
                engine.add_request(str(index), prompt, params, lora_request=request)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    assert output.outputs[0].finish_reason != "abort", output
    assert events == []


def test_executables_are_the_listed_ones(warm):
    """Token buckets x LoRA, sequence buckets x variants, prompt log-probabilities, admission."""
    runner = warm.llm_engine.runner
    assert set(runner._compiled) == set(runner.executables())
    assert len(runner.executables()) == 1 * 2 + 1 * 3 + 1 + 1


# -- memory ------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(1, "float32"), (2, "float32"), (1, "bfloat16")],
    ids=str,
)
def roomy(request, tmp_path_factory):
    """Few weights and tokens, much pool and KV: a copy of a layer of either would show."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    make_text_model(folder, **sizes)
    return small_llm(
        folder,
        num_gpu_blocks_override=2048,
        max_loras=64,
        max_cpu_loras=64,
        max_lora_rank=64,
        load_format="dummy",
        tensor_parallel_size=request.param[0],
        dtype=request.param[1],
    )


def device_bytes(array: jax.Array) -> int:
    return array.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_copies_neither_pool_nor_kv(roomy, lora):
    runner = roomy.llm_engine.runner
    memory = runner.compiled("forward", 16, lora).memory_analysis()
    kv = device_bytes(runner.kv)
    assert memory.alias_size_in_bytes >= kv + device_bytes(runner.hidden)
    layers = roomy.llm_engine.model_config.num_layers
    slices = [kv // layers]
    if lora:
        slices += [
            device_bytes(array) // layers
            for row in runner.pool.state.rows.values()
            for array in (row.a, row.b)
        ]
    assert memory.temp_size_in_bytes < min(slices)


def test_what_stays_on_the_device_stays_where_it_is(warm, folder):
    """While adapters of every rank come and go: XLA records graphs of steps, with addresses."""
    runner = warm.llm_engine.runner

    def addresses() -> list[int]:
        arrays = runner.params, runner.kv, runner.hidden, runner.state, runner.pool.state
        return [
            shard.data.unsafe_buffer_pointer()
            for array in jax.tree.leaves(arrays)
            for shard in array.addressable_shards
        ]

    requests = [
        LoRARequest(f"stay-{rank}", 60 + rank, str(folder / f"adapter-{rank}")) for rank in RANKS
    ]
    prompts = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(len(RANKS))]
    before = addresses()
    for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=2, prompt_logprobs=1)):
        evicted = warm.llm_engine.lora_stats().slot_evictions
        warm.generate(prompts, params, lora_request=requests)
        assert addresses() == before
        assert warm.llm_engine.lora_stats().slot_evictions > evicted


def test_running_with_nobody_changes_nothing(warm, folder):
    """As warm-up does on a GPU; while a sequence of this engine is in the midst of its answer."""
    engine, runner = warm.llm_engine, warm.llm_engine.runner
    request = LoRARequest("nobody", 70, str(folder / "adapter-4"))
    params = SamplingParams(temperature=0, max_tokens=12)
    (expected,) = warm.generate({"prompt_token_ids": [5, 6, 7]}, params, lora_request=request)
    engine.add_request("one", {"prompt_token_ids": [5, 6, 7]}, params, lora_request=request)
    outputs = []
    while engine.has_unfinished_requests():
        outputs = engine.step() or outputs
        if outputs and len(outputs[0].outputs[0].token_ids) == 4:
            before = jax.device_get((runner.kv, runner.state, runner.pool.state))
            with compilations() as events:
                runner.run_all(runner.executables())
            assert events == []
            after = jax.device_get((runner.kv, runner.state, runner.pool.state))
            jax.tree.map(np.testing.assert_array_equal, before, after)
    assert outputs[0].outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(expected.outputs[0].token_ids) == 12


@pytest.mark.parametrize("variant", ["greedy", "random", "full"])
def test_sampling_and_admission_write_in_place(roomy, variant):
    runner = roomy.llm_engine.runner
    state = sum(map(device_bytes, jax.tree.leaves(runner.state)))
    for key in (("sample", 8, variant, False), ("admit",)):
        assert runner.compiled(*key).memory_analysis().alias_size_in_bytes >= state


@pytest.mark.parametrize("dtype", STAGING_DTYPES, ids=str)
def test_a_block_is_written_in_place(roomy, dtype):
    pool = roomy.llm_engine.runner.pool
    pool.compile()
    every = tuple(row.name for row in roomy.llm_engine.modules.projections)
    assert len(every) > 1
    for names in (every, *((name,) for name in every)):
        rows = [pool.state.rows[name] for name in names]
        arrays = [one for row in rows for one in (row.a, row.b)]
        memory = pool._executables["blocks", names, dtype].memory_analysis()
        assert memory.alias_size_in_bytes >= sum(map(device_bytes, arrays))
        blocks = sum(device_bytes(array) // array.shape[1] for array in arrays)
        assert memory.temp_size_in_bytes <= 3 * blocks  # in float32, transposed, cast
        assert 3 * blocks < sum(map(device_bytes, arrays)) / 2


@pytest.mark.parametrize("words", ["RESOURCE_EXHAUSTED: Out of", "NOT_FOUND: All configs failed"])
@pytest.mark.parametrize("again", [False, True])
def test_warm_up_compiles_alone_what_found_no_memory_beside_others(again, words, monkeypatch):
    """Trying out matmuls takes device memory, and several functions are compiled at a time."""
    runner = ModelRunner.__new__(ModelRunner)
    runner.pool, runner._compiled, calls, ran = None, {}, [], []
    device = types.SimpleNamespace(platform="gpu")
    mesh = types.SimpleNamespace(devices=np.array([device]))
    runner.programs = types.SimpleNamespace(mesh=mesh)
    done = jax.jit(lambda x: x).lower(1).compile()

    def compile_one(key):
        calls.append(key)
        if key == ("b",) and (again or calls.count(key) == 1):
            raise jax.errors.JaxRuntimeError(words)
        return done

    monkeypatch.setattr(runner, "executables", lambda: [("a",), ("b",), ("c",)])
    monkeypatch.setattr(runner, "_compile", compile_one)
    monkeypatch.setattr(runner, "run_all", ran.extend)
    if again:
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            runner.warm_up(progress=False)
        return
    runner.warm_up(progress=False)
    assert runner._compiled == {("a",): done, ("b",): done, ("c",): done}
    assert calls.count(("b",)) == 2
    assert ran == [("a",), ("b",), ("c",)]


@pytest.fixture
def no_other_engine(monkeypatch):
    """As if none had spared the collector: other tests' engines may live on."""
    monkeypatch.setattr(collector, "_sparing", 0)
    gc.unfreeze()


@pytest.mark.usefixtures("no_other_engine")
def test_an_engine_is_in_no_cycle_and_the_collector_is_spared_while_it_lives(folder):
    llm = small_llm(folder / "model", enforce_eager=False)
    assert gc.get_freeze_count() > 10_000
    adapter = LoRARequest("a", 1, str(folder / "adapter-4"))
    llm.generate(["the quick"], SamplingParams(max_tokens=2), lora_request=adapter, use_tqdm=False)
    engine = weakref.ref(llm.llm_engine)
    pool = weakref.ref(llm.llm_engine.runner.pool)
    gc.disable()
    try:
        del llm
        assert engine() is None and pool() is None
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("no_other_engine")
def test_the_collector_is_spared_until_the_last_engine_has_ended():
    class Engine:
        pass

    one, other = Engine(), Engine()
    end = collector.spare_collector(one)
    collector.spare_collector(other)
    end()
    end()  # as shutdown, which may be called twice
    assert gc.get_freeze_count() > 10_000
    del one
    assert gc.get_freeze_count() > 10_000
    del other
    assert gc.get_freeze_count() == 0
