"""Models end to end: ropes that depend on the length, small dtypes, activations."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from jlora import LLM, SamplingParams
from jlora.model import load_hf_config, model_config
from jlora.model.layers import ACTIVATIONS
from tests.reference import FAMILIES, TIE, VOCAB, Comparison, Reference, compare, make_model

LIMIT = 96  # of the two length-dependent ropes of tests/reference.py
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)


def small(model, **options) -> LLM:
    """One token bucket; prompts come in chunks of 16."""
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "use_tqdm": False,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16,
        "block_size": 16,
        "max_model_len": 180,
    }
    return LLM(str(model), **{**defaults, **options})


def random_prompts(lengths, vocab=VOCAB):
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def answer(llm, prompts, params=GREEDY):
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, params, use_tqdm=False)


# -- ropes that depend on the length -----------------------------------------------------------


def generate(folder, prompt, tokens):
    """transformers' greedy answer with a cache, and the logits; a fresh model knows no lengths."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = model.float().eval()
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), [step[0].numpy() for step in out.logits]


def assert_equal_up_to_ties(found, expected, logits):
    for token, best, row in zip(found, expected, logits, strict=True):
        if token != best:  # what follows has another context
            assert row[best] - row[token] < TIE
            return


@pytest.fixture(scope="module", params=["llama-dynamic", "llama-longrope", "phi3-longrope"])
def length_dependent(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, folder)
    return folder, small(folder)


def test_answers_around_the_limit_are_those_of_generate(length_dependent):
    """Below, crossing while generating (in the middle, with the first token), at and above."""
    folder, llm = length_dependent
    prompts = random_prompts((5, LIMIT - 20, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 40))
    outputs = answer(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, logits = generate(folder, prompt, GREEDY.max_tokens)
        assert_equal_up_to_ties(output.outputs[0].token_ids, expected, logits)


def test_cached_prefixes_are_only_those_of_the_same_rotation(length_dependent):
    folder, llm = length_dependent
    (prompt,) = random_prompts((140,))
    lengths, cached = (60, 80, 110, 140, 140), []
    for length in lengths:
        (output,) = answer(llm, [prompt[:length]])
        cached.append(output.num_cached_tokens)
        expected, logits = generate(folder, prompt[:length], GREEDY.max_tokens)
        assert_equal_up_to_ties(output.outputs[0].token_ids, expected, logits)
    by_length = dict(zip(lengths, cached, strict=True))
    assert by_length[80] == 48  # whole pages of the prompt of 60
    assert by_length[110] == 0  # rotated by another length than those of 60 and 80
    assert by_length[140] == 128  # only the second prompt of 140 finds pages, the first's


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("llama-dynamic", 192),
        ("llama-linear", 1024),
        ("llama-yarn", 512),
        ("llama3.1", 512),
        ("llama-longrope", 512),
    ],
)
def test_positions_that_the_scaling_makes_room_for(family, positions, tmp_path):
    """transformers' factor is over max_position_embeddings, or the original one it names."""
    model_type, differences = FAMILIES[family]
    sizes = {"max_position_embeddings": 512, "hidden_size": 48, "num_attention_heads": 6}
    hf = transformers.AutoConfig.for_model(model_type, **{**sizes, **differences})
    assert model_config(hf).max_position_embeddings == positions


def test_yarn_makes_room_beyond_max_position_embeddings():
    hf = transformers.LlamaConfig(
        max_position_embeddings=512,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    )
    assert model_config(hf).max_position_embeddings == 2048


# -- dtypes ------------------------------------------------------------------------------------


@torch.no_grad()
def hf_logprobs(model, tokens):
    logits = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama3.1", "bfloat16"),
        ("llama3.1", "float16"),
        ("qwen3", "bfloat16"),
        pytest.param("qwen3", "float16", marks=pytest.mark.slow),
        ("gemma2", "bfloat16"),
        pytest.param("gemma3", "bfloat16", marks=pytest.mark.slow),
        ("phi3", "bfloat16"),
        pytest.param("granite", "bfloat16", marks=pytest.mark.slow),
        pytest.param("olmo2", "bfloat16", marks=pytest.mark.slow),
        ("mixtral", "bfloat16"),
        ("qwen3-moe", "bfloat16"),
        pytest.param("olmoe", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_small_dtypes_are_as_good_as_transformers(family, dtype, tmp_path):
    """Against the same weights computed in float32: the error is at most that of transformers.

    And whatever token is chosen, transformers in the same dtype finds no better one than its own
    error could hide; nine of ten tokens are its best.
    """
    make_model(family, tmp_path)
    outputs = answer(small(tmp_path, dtype=dtype), random_prompts((3, 17, 60)))
    load = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained, tmp_path, attn_implementation="eager"
    )
    same = load(dtype=getattr(torch, dtype)).eval()
    exact = load(dtype=getattr(torch, dtype)).float().eval()
    ours, theirs, gaps, tokens = [], [], [], []
    for output in outputs:
        prompt, found = output.prompt_token_ids, output.outputs[0]
        rows = slice(len(prompt) - 1, -1)
        in_dtype, truth = (hf_logprobs(m, prompt + found.token_ids)[rows] for m in (same, exact))
        picked = (np.arange(len(found.token_ids)), found.token_ids)
        logprobs = [
            row[token].logprob for row, token in zip(found.logprobs, found.token_ids, strict=True)
        ]
        ours.append(np.abs(truth[picked] - logprobs))
        theirs.append(np.abs(truth - in_dtype))
        gaps.append(in_dtype.max(axis=-1) - in_dtype[picked])
        tokens += found.token_ids
    ours, theirs, gaps = map(np.concatenate, (ours, theirs, gaps))
    assert ours.mean() <= 1.2 * theirs.mean()
    assert ours.max() <= 1.2 * theirs.max()
    assert gaps.max() <= 2 * theirs.max()
    assert np.mean(gaps == 0) > 0.9
    assert len(set(tokens)) > 10


def test_dtype_of_the_checkpoint_is_the_default(tmp_path):
    make_model("llama3", tmp_path)
    hf = load_hf_config(str(tmp_path))
    assert model_config(hf).dtype == "float32"
    hf.dtype = torch.bfloat16
    assert model_config(hf).dtype == "bfloat16"
    assert model_config(hf, "half").dtype == "float16"


# -- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(
        ACTIVATIONS[name](jnp.asarray(x)), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama3", {"hidden_act": "gelu_new", "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "hidden_act": "gelu"}),
        ("qwen2", {"tie_word_embeddings": False}),
    ],
)
def test_other_flags_than_a_familys_usual_ones(family, changes, tmp_path):
    make_model(family, tmp_path, **changes)
    reference, found = Reference(tmp_path, {}), Comparison()
    for output in answer(small(tmp_path), random_prompts((4, 40))):
        one = output.outputs[0]
        compare(found, reference, output.prompt_token_ids, None, one.token_ids, one.logprobs)
    assert found.differences == []
    assert found.worst_logprob < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"layer_types": ["chunked_attention"]}, "layer type chunked_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, message):
    hf = transformers.Qwen2Config()
    for name, value in changes.items():
        setattr(hf, name, value)
    with pytest.raises(ValueError, match=message):
        model_config(hf)


def test_llama_looks_at_no_window():
    """As in transformers, whose Llama passes over both keys."""
    hf = transformers.LlamaConfig(num_hidden_layers=2)
    hf.sliding_window, hf.layer_types = 4, ["sliding_attention", "full_attention"]
    assert model_config(hf).sliding_windows == (None, None)


def test_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model_type 'gpt2' is not supported.*llama"):
        model_config(transformers.GPT2Config())


def test_configuration_is_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config(transformers.LlamaConfig()).num_layers = 3
