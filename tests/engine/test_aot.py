"""Whole steps compiled for TPUs that are not there: what is in them, and what must not be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
import transformers

from jlora.config import LoRAConfig
from jlora.engine import aot
from jlora.engine.programs import RunnerConfig
from jlora.model import model_config

pytest.importorskip("libtpu")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
LAYERS, TOKENS = 2, 32
PAGES = 4096  # more than would fit into VMEM, as any KV cache
SHAPE = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS = {
    "dense": lambda: transformers.LlamaConfig(hidden_size=1024, intermediate_size=2048, **SHAPE),
    "moe": lambda: mixture(16, 256),
    "narrow": lambda: mixture(128, 192),
    "whole": lambda: mixture(16, 256),  # experts, of which each device has some
}
ROWS = {"dense": 4, "moe": 5, "whole": 5}  # of the projection table


def mixture(experts: int, width: int) -> transformers.Qwen3MoeConfig:
    sizes = {"num_experts": experts, "moe_intermediate_size": width, "num_experts_per_tok": 4}
    return transformers.Qwen3MoeConfig(hidden_size=512, head_dim=128, **sizes, **SHAPE)


# What may have an array as its result without being a copy of it; kernels write in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "bitcast", "tpu_custom_call"}


def step(model: str, chip: str, devices: int, fully_sharded: bool = False):
    """The functions of a step with 8 adapters, and what they work on."""
    sizes = RunnerConfig(TOKENS, 512, 2048, 32, PAGES, 20, "tpu", fully_sharded)
    mixed = model in ("moe", "whole")
    experts = {"lora_expert_blocks": 8 * mixed, "fully_sharded_loras": fully_sharded}
    lora = LoRAConfig(max_loras=8, max_lora_rank=16, **experts)
    mesh = aot.tpu_mesh(TOPOLOGIES[chip], devices)
    config = dataclasses.replace(model_config(MODELS[model]()), expert_parallel=model == "whole")
    return aot.describe_step(config, sizes, lora, mesh)


def local(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)


@pytest.mark.parametrize(
    ("chip", "model", "devices"),
    [
        *(("v5e", "dense", 1), ("v6e", "dense", 2), ("v6e", "moe", 1), ("v5e", "moe", 2)),
        ("v6e", "whole", 4),
        pytest.param("v5e", "whole", 2, marks=pytest.mark.slow),
    ],
)
def test_step_has_the_kernels_that_were_meant_and_copies_nothing(chip, model, devices):
    programs, arrays = step(model, chip, devices)
    executable = aot.compile_step(programs, arrays, ("forward", TOKENS, True))
    program = aot.instructions(executable)
    expected = {"lora_shrink": LAYERS * ROWS[model], "lora_expand": LAYERS * ROWS[model]}
    expected |= {"write_kv": LAYERS, "ragged_paged_attention_kernel": LAYERS}
    found = aot.kernels_of(program)
    unnamed = found.total() - sum(expected.values())  # jax's gmm, by whatever name it has
    assert {name: found[name] for name in expected} == expected
    assert unnamed == (0 if model == "dense" else 2 * LAYERS)
    for pool in arrays.pool.rows.values():
        assert aot.makers(program, local(pool.a)) | aot.makers(program, local(pool.b)) <= IN_PLACE
    assert aot.makers(program, local(arrays.kv)) <= IN_PLACE
    assert executable.memory_analysis().alias_size_in_bytes >= aot.local_bytes(arrays.kv)
    assert executable.memory_analysis().temp_size_in_bytes < aot.local_bytes(arrays.kv) / 16
    assert aot.kernel_blocks(program) == 0  # what kernels hand on stays in VMEM
    if devices > 1:
        base = aot.compile_step(programs, arrays, ("forward", TOKENS, False))
        assert aot.kernels_of(aot.instructions(base))["lora_shrink"] == 0
        assert aot.collectives_of(aot.instructions(base)) == aot.collectives_of(program) != {}


def test_narrow_experts_are_not_copied():
    """Of 96 columns on each of two devices, as Qwen3-30B-A3B has on eight."""
    programs, arrays = step("narrow", "v6e", 2)
    program = aot.instructions(aot.compile_step(programs, arrays, ("forward", TOKENS, True)))
    experts = {leaf.shape: local(leaf) for leaf in arrays.params if len(leaf.shape) == 3}
    assert sorted(leaf.shape for leaf in experts.values()) == [(128, 96, 512), (128, 192, 512)]
    for leaf in experts.values():
        assert aot.makers(program, leaf) <= IN_PLACE


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_fully_sharded_adapters_compile(model):
    """Here the compiler has aborted the process; shrink's sums are further collectives."""
    programs, arrays = step(model, "v6e", 2, fully_sharded=True)
    with_, without = (
        aot.collectives_of(
            aot.instructions(aot.compile_step(programs, arrays, ("forward", TOKENS, lora)))
        )
        for lora in (True, False)
    )
    assert with_["all-reduce"][0] > without["all-reduce"][0]


def test_adapters_add_no_collective_to_four_devices():
    programs, arrays = step("dense", "v6e", 4)
    with_, without = (
        aot.instructions(aot.compile_step(programs, arrays, ("forward", TOKENS, lora)))
        for lora in (True, False)
    )
    # One all-reduce for the embedding and two a layer.
    hidden = TOKENS * 1024 * 2
    assert aot.collectives_of(with_) == aot.collectives_of(without)
    assert aot.collectives_of(with_) == {"all-reduce": (5, 5 * hidden)}


def test_what_does_not_fit_is_said():
    assert aot.hbm_limit(aot.tpu_mesh("v5e:2x2", 1)) == int(15.75 * 2**30)
    message = "XLA:TPU compile permanent error. Used 18.20G of 15.75G hbm. Exceeded by 2.45G."
    assert aot.exhausted_bytes(ValueError(message)) == (int(18.2 * 2**30), int(15.75 * 2**30))
    assert aot.exhausted_bytes(ValueError("something else")) is None


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import aot_tpu

    return aot_tpu


def test_bytes_of_adapters(script):
    """An 8B without its KV: 8 adapters of rank 16 cost a twentieth at most, 32 a fifth."""
    model = script.describe_config(script.MODELS["llama-3.1-8b"])
    described = script.describe_model(model, aot.tpu_mesh("v6e:2x2", 1))
    base, few, many = (
        script.step_traffic(model, described, 1, 32, script.Workload(32, 1, 2048, adapters))
        for adapters in (0, 8, 32)
    )
    assert base.adapters == 0 and 15.0e9 < base.weights < 15.1e9
    assert (few.weights + few.adapters) <= 1.05 * base.weights
    assert (many.weights + many.adapters) <= 1.20 * base.weights


def compiled_records(script, model: str, where: str):
    jobs = [script.Job(model, where, count, False, 32, 2048, None) for count in (0, 8)]
    return [script.compile_job(job) for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "where", "layers"), [("llama-3.1-8b", "v6e-1", 32), ("llama-3.3-70b", "v6e-8", 80)]
)
def test_served_models_fit(model, where, layers, script):
    """40 s to minutes of compiling each."""
    base, adapted = compiled_records(script, model, where)
    assert base["fits"] and adapted["fits"]
    assert adapted["kernels"]["lora_shrink"] == adapted["kernels"]["lora_expand"] == 4 * layers
    assert adapted["collectives"] == base["collectives"]
    assert adapted["activations"] in (0, 8 * 4)  # nothing, or the scales of the eight slots
    if where == "v6e-1":
        without_kv = [one["bytes"] - one["moved"]["kv"] for one in (base, adapted)]
        assert without_kv[1] <= 1.05 * without_kv[0]
