"""The sampler against plain numpy definitions, and that a request's tokens are its own."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from jlora import LoRARequest, SamplingParams
from jlora.engine.sampler import sample, variant_of
from jlora.engine.scheduler import Entry, Plan
from jlora.engine.sequence import RequestState, Sequence
from jlora.engine.state import SEED, admission, admit, empty_state, pack_batch
from tests.reference import Reference

VOCAB, ROWS, HISTORY = 12, 8, 16
STOPS = frozenset({2, 5})
DRAWS = 3000
LOGITS = np.random.default_rng(3).normal(0, 1.5, VOCAB).astype(np.float32)

compiled = jax.jit(sample, static_argnums=(3, 4))
admitted = jax.jit(admit)


def sequence(params: SamplingParams, prompt: list[int], output: list[int], row: int) -> Sequence:
    request = RequestState("r", None, prompt, params, None, 99, STOPS)
    tokens = [*prompt, *output]
    return Sequence(request, 0, params.seed or 0, tokens, len(prompt), 0, 0, None, row=row)


def run(params, prompt=(1,), output=(), logits=LOGITS, variant=None, row=3):
    """One row of a step through the state that the engine builds; -> token, its logprobs."""
    one = sequence(params, list(prompt), list(output), row)
    state = admitted(empty_state(ROWS, HISTORY), *admission([one], ROWS, HISTORY))
    plan = Plan([Entry(one, 0, len(one.tokens), True)], [])
    batch = pack_batch(plan, 4, 1)
    rows = np.tile(np.asarray(logits, np.float32), (4, 1))
    tokens, logprobs = compiled(rows, state, batch, variant or variant_of(params), 5)
    return int(tokens[0]), None if logprobs is None else jax.tree.map(lambda x: x[0], logprobs)


def draws(params, prompt=(1,), output=(), logits=LOGITS) -> np.ndarray:
    """How often each token is drawn, by as many seeds."""
    one = sequence(params, list(prompt), list(output), 0)
    small, _ = admission([one], ROWS, HISTORY)
    state = jax.tree.map(lambda x: np.repeat(x[:1], DRAWS, axis=0), small)
    state.ints[:, SEED] = np.random.default_rng(0).integers(2**31, size=DRAWS)
    batch = np.repeat(pack_batch(Plan([Entry(one, 0, len(one.tokens), True)], []), 1, 1), DRAWS, 0)
    batch[:, 0] = np.arange(DRAWS)
    rows = np.tile(np.asarray(logits, np.float32), (DRAWS, 1))
    tokens, _ = compiled(rows, state, batch, variant_of(params), 5)
    return np.bincount(np.asarray(tokens), minlength=VOCAB)


# -- the definition ----------------------------------------------------------------------------


def adjusted(params: SamplingParams, prompt, output, logits=LOGITS) -> np.ndarray:
    """Logits after biases and penalties."""
    logits = np.asarray(logits, np.float64).copy()
    for token, value in (params.logit_bias or {}).items():
        logits[token] += value
    if len(output) < params.min_tokens:
        logits[list(STOPS)] = -np.inf
    for token in {*prompt, *output}:
        repetition = params.repetition_penalty
        logits[token] *= 1 / repetition if logits[token] > 0 else repetition
    for token in output:
        logits[token] -= params.frequency_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty
    return logits


def distribution(params: SamplingParams, prompt, output, logits=LOGITS) -> np.ndarray:
    """Probabilities: temperature, then the least likely go by min-p, top-k and top-p."""
    scaled = adjusted(params, prompt, output, logits) / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    return p / p.sum()


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 3},
    "top-k 1": {"top_k": 1},
    "top-k above the vocabulary": {"top_k": 99},
    "top-p": {"top_p": 0.7},
    "small top-p": {"top_p": 0.01},
    "min-p": {"min_p": 0.2},
    "min-p 1": {"min_p": 1.0},
    "all three": {"min_p": 0.05, "top_k": 5, "top_p": 0.8, "temperature": 1.4},
    "repetition": {"repetition_penalty": 1.8},
    "less repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "bias": {"logit_bias": {0: 2.0, 4: -1.0, 11: 0.5}},
    "min_tokens": {"min_tokens": 4},
    "min_tokens reached": {"min_tokens": 3},
    "everything": {
        "temperature": 0.8,
        "top_k": 8,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {7: 1.0, 2: 3.0},
        "min_tokens": 4,
    },
}
PROMPT, OUTPUT = [1, 4, 4], [0, 7, 7]


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case):
    params = SamplingParams(max_tokens=9, **CASES[case])
    expected = distribution(params, PROMPT, OUTPUT)
    found = draws(params, PROMPT, OUTPUT)
    assert (found[expected == 0] == 0).all()
    likely = expected * DRAWS >= 5
    rest = [found[~likely].sum()], [expected[~likely].sum() * DRAWS]
    if rest[1][0] < 1:
        assert rest[0][0] < 8
        rest = [], []
    observed = np.concatenate([found[likely], rest[0]])
    wanted = np.concatenate([expected[likely] * DRAWS, rest[1]])
    assert (
        len(observed) == 1
        or chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    )


@pytest.mark.parametrize("case", CASES)
def test_greedy_takes_the_best_after_biases_and_penalties(case):
    params = SamplingParams(max_tokens=9, **{**CASES[case], "temperature": 0})
    for seed in range(3):
        logits = np.random.default_rng(seed).normal(0, 1.5, VOCAB)
        expected = adjusted(params, PROMPT, OUTPUT, logits)
        assert run(params, PROMPT, OUTPUT, logits)[0] == np.argmax(expected)


def support(params, logits) -> set[int]:
    return set(np.flatnonzero(draws(params, logits=logits)).tolist())


def test_top_p_keeps_the_token_that_reaches_it_and_no_more():
    logits = np.full(VOCAB, -1e9)
    logits[:4] = np.log([0.4, 0.3, 0.2, 0.1])
    assert support(SamplingParams(top_p=0.39), logits) == {0}
    assert support(SamplingParams(top_p=0.41), logits) == {0, 1}
    assert support(SamplingParams(top_p=0.69), logits) == {0, 1}
    assert support(SamplingParams(top_p=0.71), logits) == {0, 1, 2}
    assert support(SamplingParams(top_p=1.0), logits) == {0, 1, 2, 3}


def test_min_p_is_relative_to_the_best_and_includes_its_boundary():
    logits = np.full(VOCAB, -1e9)
    logits[:3] = np.log([0.6, 0.3, 0.1])
    assert support(SamplingParams(min_p=0.51), logits) == {0}
    assert support(SamplingParams(min_p=0.49), logits) == {0, 1}


def test_top_p_counts_what_top_k_and_min_p_left():
    """0.4 of 0.7 is 57 %: with top_k=2 the best token alone reaches top_p=0.55."""
    logits = np.full(VOCAB, -1e9)
    logits[:4] = np.log([0.4, 0.3, 0.2, 0.1])
    assert support(SamplingParams(top_k=2, top_p=0.55), logits) == {0}
    assert support(SamplingParams(min_p=0.7, top_p=0.55), logits) == {0}
    assert support(SamplingParams(top_p=0.55), logits) == {0, 1}


def test_min_p_sees_the_temperature():
    logits = np.full(VOCAB, -1e9)
    logits[:2] = np.log([0.8, 0.2])
    assert support(SamplingParams(min_p=0.4), logits) == {0}
    assert support(SamplingParams(min_p=0.4, temperature=2.0), logits) == {0, 1}


def test_bias_of_100_forces_and_of_minus_100_forbids():
    best, worst = int(np.argmax(LOGITS)), int(np.argmin(LOGITS))
    assert support(SamplingParams(logit_bias={worst: 100.0}), LOGITS) == {worst}
    assert best not in support(SamplingParams(logit_bias={best: -100.0}), LOGITS)


def test_min_tokens_masks_stop_ids_even_when_they_are_forced():
    forced = {"temperature": 0, "logit_bias": {2: 100.0}, "min_tokens": 3}
    assert run(SamplingParams(**forced), output=[0, 0])[0] not in STOPS
    assert run(SamplingParams(**forced), output=[0, 0, 0])[0] == 2


def test_penalties_of_many_repetitions_add_up():
    params = SamplingParams(temperature=0, frequency_penalty=0.5)
    logits = np.zeros(VOCAB)
    logits[4], logits[6] = 2.1, 0.2
    assert run(params, output=[4, 4, 4], logits=logits)[0] == 4
    assert run(params, output=[4, 4, 4, 4], logits=logits)[0] == 6


def test_the_prompt_is_repeated_but_not_present():
    logits = np.zeros(VOCAB)
    logits[4], logits[6] = 1.0, 0.9
    assert run(SamplingParams(temperature=0, presence_penalty=2.0), [4], logits=logits)[0] == 4
    assert run(SamplingParams(temperature=0, repetition_penalty=2.0), [4], logits=logits)[0] == 6


def test_tokens_of_an_earlier_sequence_in_the_row_do_not_count():
    params = SamplingParams(temperature=0, repetition_penalty=5.0)
    one = sequence(params, [1], [], 3)
    new, at = admission([one], ROWS, HISTORY)
    new.tokens[0, 1:] = 4  # what the row held, where nothing is known yet
    state = admitted(empty_state(ROWS, HISTORY), new, at)
    batch = pack_batch(Plan([Entry(one, 0, 1, True)], []), 4, 1)
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 4], logits[:, 6] = 1.0, 0.9
    assert int(compiled(logits, state, batch, "full", 5)[0][0]) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_logprobs_are_of_the_model_whatever_is_done_to_its_logits(temperature):
    params = SamplingParams(
        temperature=temperature, logprobs=5, logit_bias={9: 3.0}, repetition_penalty=1.5, seed=1
    )
    token, found = run(params, PROMPT, OUTPUT)
    expected = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    order = np.argsort(-expected)
    assert found.logprobs == pytest.approx(expected[token], abs=1e-5)
    assert found.ranks == order.tolist().index(token) + 1
    assert found.top_ids.tolist() == order[:5].tolist()
    np.testing.assert_allclose(found.top_logprobs, expected[order[:5]], atol=1e-5)


@pytest.mark.parametrize("variant", ["random", "full"])
def test_variants_agree(variant):
    """A request's tokens do not depend on what its neighbours make a step compile."""
    for seed in range(20):
        params = SamplingParams(seed=seed, temperature=0.9, top_k=6, top_p=0.9)
        assert run(params, variant=variant)[0] == run(params, variant="random")[0]
    greedy = SamplingParams(temperature=0)
    assert run(greedy, variant=variant)[0] == run(greedy, variant="greedy")[0]


def test_noise_depends_on_seed_and_count_and_not_on_the_row():
    params = [SamplingParams(seed=seed, temperature=5.0) for seed in range(12)]
    first = [run(one, row=0)[0] for one in params]
    assert first == [run(one, row=7)[0] for one in params]
    assert len(set(first)) > 3
    later = [run(one, output=[0], row=0)[0] for one in params]
    assert first != later


def test_variant_is_the_cheapest_that_serves():
    kinds = {
        "greedy": [{"temperature": 0}],
        "random": [{}, {"top_k": 3}, {"seed": 1}],
        "full": [{"logprobs": 0}, {"min_tokens": 1}, {"logit_bias": {1: 1}}],
    }
    kinds["full"] += [
        {name: 0.5} for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
    ]
    for variant, cases in kinds.items():
        assert [variant_of(SamplingParams(**case)) for case in cases] == [variant] * len(cases)


# -- in the engine -----------------------------------------------------------------------------

HOT = functools.partial(SamplingParams, temperature=1.5, max_tokens=12, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": np.random.default_rng(seed).integers(3, 300, length).tolist()}
    for seed, length in enumerate((3, 40, 9, 25, 14, 33))
]


def answers(llm, prompts, params, adapters=None):
    outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    return [[one.token_ids for one in output.outputs] for output in outputs]


def test_seeded_tokens_do_not_depend_on_the_batch(llm, files):
    """Alone; together, in chunks, in both orders, beside unseeded requests and adapters."""
    params = [HOT(seed=seed) for seed in range(len(PROMPTS))]
    alone = [answers(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert answers(llm, PROMPTS, params) == alone
    assert answers(llm, PROMPTS[::-1], params[::-1]) == alone[::-1]
    adapter = LoRARequest("a", 1, str(files.adapters[0]))
    others = [{"prompt_token_ids": [9, 8, 7]}] * 2
    mixed = answers(
        llm,
        [others[0], *PROMPTS, others[1]],
        [HOT(logprobs=1), *params, HOT(temperature=0)],
        [adapter, *[None] * len(PROMPTS), None],
    )
    assert mixed[1:-1] == alone


def test_seeded_tokens_do_not_depend_on_preemption(llm):
    params = [HOT(seed=seed, max_tokens=60) for seed in range(len(PROMPTS))] * 2
    scheduler = llm.llm_engine.scheduler
    before = scheduler.num_preemptions
    together = answers(llm, PROMPTS * 2, params)
    assert scheduler.num_preemptions > before
    alone = [answers(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=False)]
    assert together == alone * 2


def test_other_seeds_give_other_tokens(llm):
    found = answers(llm, PROMPTS[:1] * 6, [HOT(seed=seed) for seed in (0, 1, 2, -1, 2**40, 0)])
    assert found[0] == found[5]
    assert len({str(one) for one in found}) == 5


def test_unseeded_requests_differ(llm):
    found = answers(llm, PROMPTS[:1] * 3, HOT())
    assert len({str(one) for one in found}) == 3


def test_n_answers_differ_and_a_seed_repeats_them(llm):
    (first,), (second,) = (answers(llm, PROMPTS[:1], HOT(n=3, seed=7)) for _ in range(2))
    assert first == second
    assert len({str(one) for one in first}) == 3


def test_greedy_penalties_are_those_of_the_definition(llm, files):
    """By the logits of transformers: every token is the best after penalties."""
    penalties = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 3.0}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **penalties)
    (found,) = answers(llm, PROMPTS[1:2], params)[0]
    prompt = PROMPTS[1]["prompt_token_ids"]
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    assert answers(llm, PROMPTS[1:2], plain) != [[found]]
    # Logits, not log-probabilities: the repetition penalty tells their signs apart.
    reference = Reference(files.model, {})
    logits = reference.base(torch.tensor([prompt + found])).logits[0].detach().numpy()
    for index, token in enumerate(found):
        row = adjusted(params, prompt, found[:index], logits[len(prompt) - 1 + index])
        assert row.max() - row[token] < 1e-3


def test_min_tokens_and_a_forced_end(llm):
    end = llm.get_tokenizer().eos_token_id
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, logit_bias={end: 100})
    (output,) = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    assert [token == end for token in output.outputs[0].token_ids] == [False] * 4 + [True]
    assert output.outputs[0].finish_reason == "stop"
