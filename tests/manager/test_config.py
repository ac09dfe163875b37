"""Configuration and requests: every violation says which value is wrong and what would be right."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jlora.config import EngineArgs, LoRAConfig, resolve_dtype
from jlora.request import LoRARequest, RequestOutputKind, SamplingParams, parse_prompt

NAN, INF = float("nan"), float("inf")


def violates(make, *parts: str) -> None:
    """make() must raise ValueError or TypeError with every part in its message."""
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert not isinstance(caught.value, UnicodeError)
    for part in parts:
        assert part in str(caught.value)


# -- LoRAConfig ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"max_lora_rank": 0}, ["max_lora_rank", "at least 1", "0"]),
        ({"max_lora_rank": 8.0}, ["max_lora_rank", "integer", "8.0"]),
        ({"max_lora_rank": True}, ["max_lora_rank", "integer", "True"]),
        ({"max_loras": 0}, ["max_loras", "at least 1", "0"]),
        ({"max_loras": "2"}, ["max_loras", "'2'"]),
        ({"max_loras": None}, ["max_loras", "None"]),
        ({"max_cpu_loras": 0}, ["max_cpu_loras", "at least 1", "0"]),
        ({"max_loras": 4, "max_cpu_loras": 3}, ["max_cpu_loras=3", "max_loras=4", "use 4 or more"]),
        ({"lora_dtype": "int8"}, ["lora_dtype", "int8", "float32", "bfloat16", "float16"]),
        ({"target_modules": "q_proj"}, ["target_modules", "list", "'q_proj'"]),
        ({"target_modules": []}, ["target_modules", "[]"]),
        ({"target_modules": 3}, ["target_modules", "list", "3"]),
        ({"target_modules": ["q_proj", 3]}, ["target_modules", "3"]),
        ({"target_modules": [""]}, ["target_modules", "['']"]),
        ({"lora_pool_blocks": 0}, ["lora_pool_blocks", "at least 1", "0"]),
        ({"max_lora_rank": 40, "lora_pool_blocks": 2}, ["lora_pool_blocks", "at least 3", "2"]),
    ],
)
def test_lora_config_refuses(options, parts):
    violates(lambda: LoRAConfig(**options), *parts)


def test_the_host_tier_is_larger_than_the_slots_by_default():
    assert LoRAConfig(max_loras=3).max_cpu_loras == 11
    assert LoRAConfig(max_loras=32).max_cpu_loras == 64


@pytest.mark.parametrize(("rank", "blocks"), [(1, 1), (16, 1), (17, 2), (32, 2), (100, 7)])
def test_blocks_of_the_largest_rank(rank, blocks):
    config = LoRAConfig(max_lora_rank=rank, max_loras=3)
    assert config.max_blocks == blocks
    assert config.pool_blocks == 3 * blocks
    assert LoRAConfig(max_lora_rank=rank, lora_pool_blocks=50).pool_blocks == 50


def test_lora_config_is_frozen():
    with pytest.raises(AttributeError):
        LoRAConfig().max_loras = 2


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("auto", "auto"),
        (None, "auto"),
        ("half", "float16"),
        ("float", "float32"),
        ("torch.bfloat16", "bfloat16"),
        (torch.float16, "float16"),
        (jnp.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (np.dtype("float16"), "float16"),
    ],
)
def test_dtypes_by_any_name(given, name):
    assert LoRAConfig(lora_dtype=given).lora_dtype == name
    assert resolve_dtype(given, "dtype", auto="auto") == name


# -- EngineArgs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"model": ""}, ["model", "''"]),
        ({"model": None}, ["model", "None"]),
        ({"load_format": "gguf"}, ["load_format", "gguf", "safetensors", "dummy"]),
        ({"dtype": "int8"}, ["dtype", "int8", "bfloat16"]),
        ({"seed": -1}, ["seed", "at least 0", "-1"]),
        ({"seed": "x"}, ["seed", "'x'"]),
        ({"tensor_parallel_size": 0}, ["tensor_parallel_size", "at least 1", "0"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "at least 1", "0"]),
        ({"max_model_len": 0}, ["max_model_len", "at least 1", "0"]),
        ({"max_num_batched_tokens": -5}, ["max_num_batched_tokens", "at least 1", "-5"]),
        ({"block_size": 0}, ["block_size", "at least 1", "0"]),
        ({"kv_cache_memory_bytes": 1.5}, ["kv_cache_memory_bytes", "integer", "1.5"]),
        ({"num_gpu_blocks_override": 0}, ["num_gpu_blocks_override", "at least 1", "0"]),
        ({"max_logprobs": -1}, ["max_logprobs", "at least 0", "-1"]),
        ({"gpu_memory_utilization": 0}, ["gpu_memory_utilization", "above 0", "0"]),
        ({"gpu_memory_utilization": 1.01}, ["gpu_memory_utilization", "1.01", "at most 1"]),
        ({"gpu_memory_utilization": NAN}, ["gpu_memory_utilization", "nan"]),
        ({"gpu_memory_utilization": "0.9"}, ["gpu_memory_utilization", "'0.9'"]),
        ({"enable_lora": "false"}, ["enable_lora", "True or False", "'false'"]),
        ({"enforce_eager": 1}, ["enforce_eager", "True or False", "1"]),
        ({"enable_prefix_caching": "on"}, ["enable_prefix_caching", "'on'"]),
        ({"enable_lora": True, "max_loras": 0}, ["max_loras", "at least 1"]),
        ({"max_lora_rank": 0}, ["max_lora_rank", "at least 1"]),  # also while LoRA is off
        ({"enable_lora": True, "lora_target_modules": "q_proj"}, ["target_modules", "'q_proj'"]),
        ({"enable_lora": True, "lora_target_modules": 5}, ["target_modules", "5"]),
    ],
)
def test_engine_args_refuse(options, parts):
    violates(lambda: EngineArgs.from_options(**{"model": "m", **options}), *parts)


@pytest.mark.parametrize(
    "options",
    [{"quantization": "int8"}, {"fully_sharded_loras": True, "enable_lora_dora": True}],
)
def test_what_is_not_supported_yet_is_refused_by_name(options):
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        EngineArgs("m", **options)


def test_from_options_names_every_unknown_argument():
    with pytest.raises(TypeError, match=r"argument max_lora, speculative; known: .*max_loras"):
        EngineArgs.from_options(model="m", speculative=1, max_lora=2)


def test_lora_limits_reach_the_configuration():
    args = EngineArgs(
        "m",
        enable_lora=True,
        max_loras=3,
        max_lora_rank=20,
        max_cpu_loras=5,
        lora_dtype="half",
        lora_target_modules=["q_proj"],
        lora_pool_blocks=4,
    )
    assert args.lora_config() == LoRAConfig(20, 3, 5, "float16", ("q_proj",), 4)
    assert EngineArgs("m").lora_config() is None


def test_engine_args_have_vllms_names():
    names = (
        "model tokenizer dtype seed enable_lora max_loras max_lora_rank max_cpu_loras lora_dtype "
        "max_model_len max_num_seqs max_num_batched_tokens gpu_memory_utilization block_size "
        "tensor_parallel_size quantization skip_tokenizer_init enable_prefix_caching load_format "
        "enforce_eager"
    )
    assert set(names.split()) <= set(inspect.signature(EngineArgs).parameters)


# -- LoRARequest -----------------------------------------------------------------------------


def test_lora_request_takes_vllms_positions():
    names = list(inspect.signature(LoRARequest).parameters)
    assert names[:5] == ["lora_name", "lora_int_id", "lora_path", "base_model_name", "load_inplace"]
    request = LoRARequest("sql", 3, "some/path")
    assert (request.name, request.adapter_id, request.path) == ("sql", 3, "some/path")
    assert request.base_model_name is None
    assert request.load_inplace is False


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("a", 0, "p"), ["lora_int_id", "from 1", "0"]),
        (("a", -2, "p"), ["lora_int_id", "from 1", "-2"]),
        (("a", "1", "p"), ["lora_int_id", "'1'"]),
        (("a", True, "p"), ["lora_int_id", "True"]),
        (("a", 1.0, "p"), ["lora_int_id", "1.0"]),
        (("", 1, "p"), ["lora_name", "''"]),
        ((7, 1, "p"), ["lora_name", "7"]),
        (("a", 1, ""), ["'a'", "lora_path", "folder", "''"]),
        (("a", 1, 5), ["'a'", "lora_path", "folder", "5"]),
        (("a", 1, "p", None, "no"), ["'a'", "load_inplace", "'no'"]),
    ],
)
def test_lora_request_refuses(arguments, parts):
    violates(lambda: LoRARequest(*arguments), *parts)


PART = LoRARequest("part", 7, "p")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"components": []}, "components must be a list"),
        ({"components": [(PART, 1.0)], "lora_path": "p"}, "give one of lora_path"),
        ({"components": [PART]}, "must be a .LoRARequest, weight. pair"),
        ({"components": [(PART, float("nan"))]}, "finite number, not nan"),
        ({"components": [(PART, True)]}, "finite number, not True"),
        ({"components": [(PART, 1), (PART, 2)]}, "component id 7 comes twice"),
        ({"components": [(PART, 1)], "combination_type": "ties"}, "combination_type='ties'"),
        (
            {"components": [(LoRARequest("m", 8, components=[(PART, 1)]), 1)]},
            "component 'm' is a mixture itself",
        ),
        (
            {"components": [(LoRARequest("i", 8, "p", load_inplace=True), 1)]},
            "'i' has load_inplace",
        ),
        ({"lora_tensors": {"a": 1}}, "belong together"),
        ({"peft_config": {}, "lora_path": "p"}, "belong together"),
        ({"lora_tensors": [1], "peft_config": {}}, "lora_tensors must be a dictionary, not list"),
    ],
)
def test_mixtures_and_tensors_are_checked(options, text):
    with pytest.raises(ValueError, match=f"adapter 'a': .*{text}"):
        LoRARequest("a", 1, **options)


# -- SamplingParams --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"n": 0}, ["n must", "at least 1", "0"]),
        ({"n": 1.5}, ["n must", "integer", "1.5"]),
        ({"max_tokens": 0}, ["max_tokens", "at least 1", "0"]),
        ({"min_tokens": -1}, ["min_tokens", "at least 0", "-1"]),
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens=5", "max_tokens=4"]),
        ({"top_k": -2}, ["top_k", "at least 0", "-2"]),
        ({"top_k": 1.5}, ["top_k", "1.5"]),
        ({"top_k": 2**31}, ["top_k=2147483648", "2147483647"]),
        ({"min_tokens": 2**31, "max_tokens": None}, ["min_tokens=2147483648", "2147483647"]),
        ({"temperature": 10**400}, ["temperature=1000", "is outside 0.0 .."]),
        ({"repetition_penalty": 1e300}, ["repetition_penalty=1e+300", "is outside 0.0 .."]),
        ({"logit_bias": {3: 10**400}}, ["logit_bias", "3", "number"]),
        ({"logit_bias": {3: 1e300}}, ["logit_bias", "3", "1e+300"]),
        ({"top_p": 0.0}, ["top_p=0.0", "1.0"]),
        ({"top_p": 1.5}, ["top_p=1.5", "1.0"]),
        ({"top_p": "0.5"}, ["top_p", "'0.5'"]),
        ({"min_p": -0.1}, ["min_p=-0.1", "0.0 .. 1.0"]),
        ({"temperature": -1}, ["temperature=-1", "0.0"]),
        ({"temperature": NAN}, ["temperature=nan"]),
        ({"temperature": INF}, ["temperature=inf"]),
        ({"temperature": None}, ["temperature", "None"]),
        ({"temperature": True}, ["temperature", "True"]),
        ({"presence_penalty": 2.1}, ["presence_penalty=2.1", "-2.0 .. 2.0"]),
        ({"frequency_penalty": -3}, ["frequency_penalty=-3", "-2.0 .. 2.0"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0"]),
        ({"seed": "x"}, ["seed", "'x'"]),
        ({"seed": True}, ["seed", "True"]),
        ({"logprobs": -1}, ["logprobs", "at least 0", "-1"]),
        ({"prompt_logprobs": 1.0}, ["prompt_logprobs", "1.0"]),
        ({"stop": [""]}, ["stop", "non-empty"]),
        ({"stop": [3]}, ["stop", "3"]),
        ({"stop": 3}, ["stop", "3"]),
        ({"stop": "x", "detokenize": False}, ["stop", "detokenize=True"]),
        ({"stop_token_ids": [-1]}, ["stop_token_ids", "-1"]),
        ({"stop_token_ids": 5}, ["stop_token_ids", "list", "5"]),
        ({"stop_token_ids": ["a"]}, ["stop_token_ids", "'a'"]),
        ({"logit_bias": {-1: 1.0}}, ["logit_bias", "-1"]),
        ({"logit_bias": {"3": 1.0}}, ["logit_bias", "'3'"]),
        ({"logit_bias": {3: "x"}}, ["logit_bias", "3", "'x'"]),
        ({"logit_bias": {3: NAN}}, ["logit_bias", "3", "nan"]),
        ({"logit_bias": {3: INF}}, ["logit_bias", "3", "inf"]),
        ({"logit_bias": [3, 4]}, ["logit_bias", "[3, 4]"]),
        ({"output_kind": 1}, ["output_kind", "1"]),
        ({"ignore_eos": "no"}, ["ignore_eos", "'no'"]),
        ({"best_of": 2}, ["best_of"]),
    ],
)
def test_sampling_params_refuse(options, parts):
    violates(lambda: SamplingParams(**options), *parts)


def test_sampling_params_have_vllms_names_and_defaults():
    params = SamplingParams()
    expected = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "detokenize": True,
        "skip_special_tokens": True,
        "output_kind": RequestOutputKind.CUMULATIVE,
    }
    assert {name: getattr(params, name) for name in expected} == expected
    names = set(inspect.signature(SamplingParams).parameters)
    assert {"stop", "stop_token_ids", "logit_bias"} <= names


def test_sampling_params_are_put_in_one_form():
    params = SamplingParams(top_k=-1, stop="x", stop_token_ids=[3], logit_bias={4: -INF}, seed=-7)
    assert params.top_k == 0
    assert (params.stop, params.stop_token_ids) == (("x",), (3,))
    assert params.logit_bias == {4: -INF}  # forbids a token
    assert SamplingParams(max_tokens=None, min_tokens=40).min_tokens == 40


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-3, False)])
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


# -- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("text", ("text", None)),
        ({"prompt": "text"}, ("text", None)),
        ({"prompt_token_ids": [1, 2]}, (None, [1, 2])),
        ({"prompt_token_ids": np.array([1, 2])}, (None, [1, 2])),
        ({"prompt": "text", "prompt_token_ids": (1, 2)}, ("text", [1, 2])),
    ],
)
def test_prompts(prompt, parsed):
    assert parse_prompt(prompt) == parsed


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (5, ["prompt", "int"]),
        (None, ["prompt", "NoneType"]),
        ({}, ["prompt_token_ids"]),
        ({"prompt": 5}, ["prompt"]),
        ({"prompt": 5, "prompt_token_ids": [1]}, ["prompt", "5"]),
        ({"prompt_token_ids": 5}, ["prompt_token_ids", "5"]),
        ({"prompt_token_ids": [1.5]}, ["prompt_token_ids", "1.5"]),
        ({"prompt_token_ids": ["1"]}, ["prompt_token_ids", "'1'"]),
        ({"prompt_token_ids": "12"}, ["prompt_token_ids", "'1'"]),
        ({"prompt": "x", "multi_modal_data": {}}, ["multi_modal_data"]),
    ],
)
def test_prompts_that_are_refused(prompt, parts):
    violates(lambda: parse_prompt(prompt), *parts)
