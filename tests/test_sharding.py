"""Several devices answer as one does: every family, with more devices than KV heads, too."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import jax
import pytest

from jlora.manager import pool_rows
from tests.reference import FAMILIES, Reference, adapter_kinds, special_kinds
from tests.test_against_peft import (
    LENGTH_DEPENDENT,
    answer_batch,
    build,
    engine,
    every_kind,
    run_and_compare,
)

# Eight heads, so that eight devices can share them, and fewer KV heads than devices.
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
WIDE_OF = {
    # The head size of this one is hidden_size / num_attention_heads.
    "olmoe": {**WIDE, "head_dim": None, "hidden_size": 64},
    # These have factors for each turned pair of a head's numbers.
    "llama-longrope": {**WIDE, "head_dim": 16},
    "phi3-longrope": {**WIDE, "hidden_size": 64},
}
QUICK = {
    *(("llama-bias", 4), ("qwen3", 8), ("gemma3", 2), ("phi3", 4), ("olmo2", 8), ("mixtral", 8)),
    ("qwen3-moe", 4),
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def cases(quick, *counts):
    return [
        pytest.param(family, devices, marks=() if (family, devices) in quick else pytest.mark.slow)
        for family in FAMILIES
        if family not in LENGTH_DEPENDENT
        for devices in counts
    ]


@pytest.mark.parametrize(("family", "devices"), cases(QUICK, 2, 4, 8))
def test_every_family(family, devices, tmp_path):
    model, adapters = build(tmp_path, family, **WIDE_OF.get(family, WIDE))
    llm = engine(model, tensor_parallel_size=devices)
    run_and_compare(llm, Reference(model, adapters), adapters)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
def test_families_whose_rotation_depends_on_the_length(family, devices, tmp_path):
    """The one-device answers: what those must be is tested elsewhere."""
    model, adapters = build(tmp_path, family, **WIDE_OF.get(family, WIDE))
    one, several = (
        answer_batch(engine(model, tensor_parallel_size=count), adapters, limit=170)
        for count in (1, devices)
    )
    for (name, prompt, expected), (_, _, found) in zip(one, several, strict=True):
        assert found.token_ids == expected.token_ids, (name, prompt)


FULLY = {("llama3", 4), ("qwen3-moe", 2)}


@pytest.mark.parametrize(("family", "devices"), cases(FULLY, 2, 8))
def test_fully_sharded_adapters(family, devices, tmp_path):
    model, adapters = build(tmp_path, family, **WIDE_OF.get(family, WIDE))
    llm = engine(model, tensor_parallel_size=devices, fully_sharded_loras=True)
    run_and_compare(llm, Reference(model, adapters), adapters)
    pool = llm.llm_engine.runner.pool.state
    for row in pool_rows(llm.llm_engine.modules, llm.llm_engine.lora_config):
        for array in (pool.rows[row.name].a, pool.rows[row.name].b):
            share = array.addressable_shards[0].data.nbytes
            assert share * (devices if row.shard != "none" else 1) == array.nbytes


# How a family calls the number of its experts, and their width, which eight devices do not divide.
MIXTURES = {"mixtral": "num_local_experts", "qwen3-moe": "num_experts", "olmoe": "num_experts"}
ODD = {"mixtral": "intermediate_size", "qwen3-moe": "moe_intermediate_size"}
WHOLE_EXPERTS = {("qwen3-moe", 4, False)}


@pytest.mark.parametrize(
    ("family", "devices", "fully"),
    [
        pytest.param(*case, marks=() if case in WHOLE_EXPERTS else pytest.mark.slow)
        for case in itertools.product(MIXTURES, (2, 4, 8), (False, True))
    ],
)
def test_whole_experts_on_each_device(family, devices, fully, tmp_path):
    changes = {**WIDE_OF.get(family, WIDE), MIXTURES[family]: 8}
    if family in ODD:
        changes[ODD[family]] = 20
    of_experts = {k: v for k, v in special_kinds(family).items() if "target_parameters" in v}
    assert of_experts
    kinds = adapter_kinds(16, family) | of_experts
    model, adapters = build(tmp_path, family, kinds, **changes)
    options = {"tensor_parallel_size": devices, "fully_sharded_loras": fully}
    llm = every_kind(model, adapters, enable_expert_parallel=True, **options)
    run_and_compare(llm, Reference(model, adapters), adapters)
    core = llm.llm_engine
    weights = [array for array in core.runner.params if array.ndim == 3]
    assert {array.addressable_shards[0].data.shape[0] for array in weights} == {8 // devices}
    for row in pool_rows(core.modules, core.lora_config):
        if row.experts:
            pool = core.runner.pool.state.rows[row.name]
            for array in (pool.a, pool.b):
                assert array.addressable_shards[0].data.shape[2] == 8 // devices
    writers = core.runner.pool._executables  # each device writes its own experts
    written = [collectives(one) for key, one in writers.items() if key[0] == "blocks"]
    assert written and not any(written)


@pytest.mark.parametrize(
    ("family", "devices"),
    [
        ("llama-bias", 2),
        pytest.param("llama-bias", 8, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", 4, marks=pytest.mark.slow),
        pytest.param("gemma3", 8, marks=pytest.mark.slow),
    ],
)
def test_every_kind(family, devices, tmp_path):
    wide = {**WIDE, "moe_intermediate_size": 24} if family == "qwen3-moe" else WIDE
    model, adapters = build(tmp_path, family, special_kinds(family), **wide)
    llm = every_kind(model, adapters, tensor_parallel_size=devices)
    run_and_compare(llm, Reference(model, adapters), adapters)


def collectives(executable: jax.stages.Compiled) -> Counter:
    """How often each kind of collective moves which arrays."""
    pattern = rf"= (\S.*?) ({COLLECTIVES})(?:-start)?\("
    return Counter((kind, shape) for shape, kind in re.findall(pattern, executable.as_text()))


@pytest.mark.parametrize(
    ("family", "whole"),
    [("llama3", False), ("olmo2", False), ("qwen3-moe", False), ("qwen3-moe", True)],
)
@pytest.mark.parametrize("fully", [False, True])
def test_collectives_of_adapters(family, whole, fully, tmp_path):
    """None by default; fully sharded, a sum of h for each projection that devices share."""
    model, _ = build(tmp_path, family, {}, **WIDE)
    llm = engine(
        model,
        tensor_parallel_size=4,
        enable_expert_parallel=whole,
        fully_sharded_loras=fully,
        max_lora_rank=16,
        lora_expert_blocks=2 * whole,
    )
    runner = llm.llm_engine.runner
    base, lora = (collectives(runner.compiled("forward", 16, on)) for on in (False, True))
    assert sum(base.values()) >= 2 * llm.llm_engine.model_config.num_layers
    added = lora - base
    assert not base - lora
    apart = ("router", *(("experts_gate_up", "experts_down") if whole else ()))
    shared = [row for row in runner.pool.specs.rows if row not in apart]
    if not fully:
        assert not added
    else:
        layers = llm.llm_engine.model_config.num_layers
        assert sum(added.values()) == layers * len(shared)
        assert {kind for kind, _ in added} == {"all-reduce"}
