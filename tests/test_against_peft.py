"""The main promise: in a mixed batch every request gets PEFT's tokens with its own adapter."""

from __future__ import annotations

import numpy as np
import pytest

from jlora import LLM, LoRARequest, SamplingParams
from tests.reference import (
    FAMILIES,
    INVOCATION,
    VOCAB,
    Comparison,
    Reference,
    adapter_kinds,
    compare,
    last_invocation,
    make_adapter,
    make_model,
    special_kinds,
)

LENGTHS = (1, 2, 15, 16, 17, 33, 64, 120, 200)


def build(tmp_path, family, kinds=None, **changes):
    """A model folder and adapter folders of these kinds (of all low-rank ones when None)."""
    model = tmp_path / "model"
    make_model(family, model, **changes)
    adapters = {}
    kinds = adapter_kinds(family=family) if kinds is None else kinds
    for seed, (name, kind) in enumerate(kinds.items()):
        adapters[name] = tmp_path / name
        make_adapter(model, adapters[name], seed=seed, **kind)
    return model, adapters


def engine(model, **options):
    """Small buckets and few slots, so that chunking and waiting for slots happen."""
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": 3,
        "max_lora_rank": 64,
        "max_cpu_loras": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "block_size": 16,
        "use_tqdm": False,
    }
    return LLM(str(model), **{**defaults, **options})


def mixed_batch(adapters, seed, lengths=LENGTHS, limit=511):
    """Shuffled prompts: every adapter and the base, lengths in turn."""
    rng = np.random.default_rng(seed)
    names = [None, *adapters] * 2
    rng.shuffle(names)
    prompts = [
        rng.integers(3, VOCAB, min(lengths[i % len(lengths)], limit)).tolist()
        for i in range(len(names))
    ]
    for index, name in enumerate(names):  # once with the tokens that it acts from, once without
        if name == "activated" and name not in names[:index]:
            prompts[index] = [1, 2, *INVOCATION, 3, *INVOCATION, *prompts[index]][:limit]
    requests = [
        None
        if name is None
        else LoRARequest(name, list(adapters).index(name) + 1, str(adapters[name]))
        for name in names
    ]
    return names, prompts, requests


def answer_batch(llm, adapters, seed=0, tokens=12, lengths=LENGTHS, limit=511):
    """Runs a mixed batch; the adapter, prompt and answer of each request."""
    names, prompts, requests = mixed_batch(adapters, seed, lengths, limit)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        params,
        lora_request=requests,
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return list(zip(names, prompts, answers, strict=True))


def run_and_compare(llm, reference, adapters, seed=0, tokens=12, lengths=LENGTHS, limit=511):
    """Runs a mixed batch and compares every token; every adapter must change what comes."""
    found = Comparison()
    for name, prompt, answer in answer_batch(llm, adapters, seed, tokens, lengths, limit):
        assert len(answer.token_ids) == min(tokens, limit + 1 - len(prompt))
        compare(found, reference, prompt, name, answer.token_ids, answer.logprobs)
        if name is not None and (name != "activated" or last_invocation(prompt) is not None):
            changes = reference.logprobs(prompt, name, len(prompt))[:, :VOCAB]
            changes = changes - reference.logprobs(prompt, None, len(prompt))
            assert np.abs(changes).max() > 0.01, f"{name} changes nothing"
    print(f"{found.tokens} tokens, {found.ties} ties, worst logprob {found.worst_logprob:.2g}")
    assert found.differences == []
    assert found.worst_logprob < 1e-4
    assert found.ties <= found.tokens // 50
    return found


def every_kind(model, adapters, **options):
    """An engine with what these adapters need, and four slots."""
    fixed = {"max_loras": 4, "lora_modules": requests_of(adapters), "max_cpu_loras": 30}
    return engine(model, **fixed, **options)


# A length-dependent rope answers as if each token had come in a forward of its own length, which
# is what generating with a cache does; teacher forcing in one forward cannot show it.
LENGTH_DEPENDENT = ("llama-dynamic", "llama-longrope", "phi3-longrope")


# They differ from other families in the rotation, the window or the biases only.
ALIKE = ("llama2", "llama3.1", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen2-window")
# Tested with low-rank adapters alone in the quick list too: their engine reserves nothing.
PLAIN_ONLY = (*ALIKE, "granite", "llama3", "olmoe")


def slow_if(slow, family):
    return pytest.param(family, marks=pytest.mark.slow) if slow else family


@pytest.mark.parametrize(
    "family",
    [slow_if(name not in PLAIN_ONLY, name) for name in FAMILIES if name not in LENGTH_DEPENDENT],
)
def test_every_family_gives_pefts_tokens(family, tmp_path):
    model, adapters = build(tmp_path, family)
    run_and_compare(engine(model), Reference(model, adapters), adapters)


def requests_of(adapters):
    return [LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(adapters.items())]


@pytest.mark.parametrize(
    "family",
    [
        # Granite is Llama with multipliers, and OLMoE has the experts of Qwen3-MoE.
        slow_if(name in (*ALIKE, "granite", "olmoe"), name)
        for name in FAMILIES
        if name not in LENGTH_DEPENDENT
    ],
)
def test_every_kind_of_adapter_gives_pefts_tokens(family, tmp_path):
    model, adapters = build(tmp_path, family, special_kinds(family))
    run_and_compare(every_kind(model, adapters), Reference(model, adapters), adapters)


def test_preemption_changes_nothing(tmp_path):
    model, adapters = build(tmp_path, "llama3.1")
    llm = engine(model, num_gpu_blocks_override=16, max_model_len=256, max_num_seqs=6)
    run_and_compare(
        llm, Reference(model, adapters), adapters, tokens=60, lengths=(30, 40, 50), limit=255
    )
    assert llm.llm_engine.scheduler.num_preemptions > 0


def test_warmed_up_engine_with_repeats(tmp_path):
    """The same through the compiled buckets and the prefix cache: the second run finds pages."""
    model, adapters = build(tmp_path, "llama3")
    llm = engine(model, enforce_eager=False)
    reference = Reference(model, adapters)
    run_and_compare(llm, reference, adapters, seed=1)
    run_and_compare(llm, reference, adapters, seed=1)
    run_and_compare(llm, reference, adapters, seed=2, tokens=3)
