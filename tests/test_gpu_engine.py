"""The GPU's part of the main promise: the same mixed batches, compiled for the GPU, in float32."""

from __future__ import annotations

import pytest

from tests.reference import Reference
from tests.test_against_peft import build, engine, run_and_compare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama3.1", "llama-bias", "mistral", "qwen3"])
def test_pefts_tokens_on_a_gpu(family, tmp_path):
    model, adapters = build(tmp_path, family)
    llm = engine(model, kv_cache_memory_bytes=64 << 20)
    run_and_compare(llm, Reference(model, adapters), adapters)


def test_same_bits_twice(tmp_path):
    model, adapters = build(tmp_path, "llama3")
    llm = engine(model, kv_cache_memory_bytes=64 << 20, enable_prefix_caching=False)
    reference = Reference(model, adapters)
    first, second = (run_and_compare(llm, reference, adapters, seed=3) for _ in range(2))
    assert first.logprobs == second.logprobs
