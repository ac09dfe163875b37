"""The GPU's part of the main promise: the same mixed batches, compiled for the GPU, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.engine.memory import keep_gaps
from tests.reference import Reference, special_kinds
from tests.test_against_peft import (
    answer_batch,
    build,
    engine,
    every_kind,
    run_and_compare,
)

pytestmark = pytest.mark.gpu
MEMORY = {"kv_cache_memory_bytes": 64 << 20}
FAMILIES = ["llama3.1", "mistral", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "olmoe"]
# Logprobs of bfloat16 against float32, of the same tokens: the largest error and the mean.
BFLOAT16 = (1.0, 0.06)


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_tokens_on_a_gpu(family, tmp_path):
    model, adapters = build(tmp_path, family)
    run_and_compare(engine(model, **MEMORY), Reference(model, adapters), adapters)


@pytest.mark.parametrize("family", ["llama3.2", "llama-bias", "gemma3", "phi3", "qwen3-moe"])
def test_every_kind_on_a_gpu(family, tmp_path):
    model, adapters = build(tmp_path, family, special_kinds(family))
    llm = every_kind(model, adapters, **MEMORY)
    run_and_compare(llm, Reference(model, adapters), adapters)


@pytest.mark.parametrize("family", ["llama-bias", "gemma3", "qwen3-moe"])
def test_every_kind_in_bfloat16_on_a_gpu(family, tmp_path):
    model, adapters = build(tmp_path, family, special_kinds(family))
    llm = every_kind(model, adapters, dtype="bfloat16", **MEMORY)
    errors = []
    reference = Reference(model, adapters)
    for name, prompt, answer in answer_batch(llm, adapters):
        rows = reference.logprobs([*prompt, *answer.token_ids], name, len(prompt))
        for index, token in enumerate(answer.token_ids):
            expected = rows[len(prompt) - 1 + index, token]
            errors.append(abs(answer.logprobs[index][token].logprob - expected))
    print(f"{family}: largest {max(errors):.2g}, mean {np.mean(errors):.2g}")
    assert max(errors) < BFLOAT16[0]
    assert np.mean(errors) < BFLOAT16[1]


def test_same_bits_twice(tmp_path):
    model, adapters = build(tmp_path, "llama3")
    # A slot each: else which requests share a step depends on when adapters arrive.
    llm = engine(
        model,
        enable_prefix_caching=False,
        max_loras=len(adapters),
        max_cpu_loras=len(adapters),
        **MEMORY,
    )
    reference = Reference(model, adapters)
    first, second = (run_and_compare(llm, reference, adapters, seed=3) for _ in range(2))
    assert first.logprobs == second.logprobs


def test_small_arrays_leave_large_memory_where_it_is():
    device = jax.devices()[0]
    walls = keep_gaps(device)
    addresses, small = set(), []
    for size in (300, 5_000, 70_000, 300):
        large = jnp.zeros(1 << 26, jnp.uint8, device=device).block_until_ready()
        addresses.add(large.unsafe_buffer_pointer())
        large.delete()
        small.append(jax.device_put(np.zeros(size, np.uint8), device))
    assert len(addresses) == 1
    assert all(not wall.is_deleted() for wall in walls)


several = pytest.mark.skipif("len(jax.devices()) < 2", reason="there is one GPU")
EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}


@several
@pytest.mark.parametrize("fully", [False, True])
@pytest.mark.parametrize("family", ["llama3.1", "gemma3", "mixtral"])
def test_two_gpus(family, fully, tmp_path):
    model, adapters = build(tmp_path, family, **EIGHT_HEADS)
    llm = engine(model, tensor_parallel_size=2, fully_sharded_loras=fully, **MEMORY)
    run_and_compare(llm, Reference(model, adapters), adapters)


@several
@pytest.mark.parametrize(
    ("family", "whole"), [("llama-bias", False), ("qwen3-moe", False), ("qwen3-moe", True)]
)
def test_every_kind_on_two_gpus(family, whole, tmp_path):
    model, adapters = build(tmp_path, family, special_kinds(family))
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": whole}
    llm = every_kind(model, adapters, **options, **MEMORY)
    run_and_compare(llm, Reference(model, adapters), adapters)
