"""Adapters that the installed PEFT saves, read and applied: the logits are PEFT's.

DoRA, biases of lora_B, biases of modules, tied and untied heads, activated LoRA.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jlora.errors import AdapterError
from tests.manager.adapters import WEIGHTS, lora_config
from tests.manager.peft_models import applied, llama, logits, modules_of, read, save, saved_config

Q0 = "model.layers.0.self_attn.q_proj"
SOME = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "plain": {"target_modules": SOME},
    "DoRA": {"target_modules": SOME, "use_dora": True},
    "DoRA, rsLoRA, patterns": {
        "target_modules": SOME,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 7},
        "alpha_pattern": {"down_proj": 2},
    },
    "DoRA of the vocabulary": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "lora_bias": {"target_modules": SOME, "lora_bias": True},
    "lora_bias of the head": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "head": {"target_modules": ["lm_head", "up_proj"], "alpha_pattern": {"lm_head": 1}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "expression": {"target_modules": r".*(embed_tokens|k_proj)"},
    "whole name": {"target_modules": ["model.embed_tokens"]},
    "tied": {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
    "tied by the head": {
        "target_modules": ["lm_head"],
        "ensure_weight_tying": True,
        "alpha_pattern": {"lm_head": 11},
    },
    "tied by an expression": {"target_modules": ".*embed_tokens", "ensure_weight_tying": True},
    "parameters of linear modules": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight", "1.mlp.up_proj.weight", "lm_head.weight"],
        "rank_pattern": {"q_proj.weight": 2, "up_proj": 5},
    },
    "MiCA": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"},
    "orthogonal": {"target_modules": SOME, "init_lora_weights": "orthogonal", "r": 4},
    "gaussian": {"target_modules": SOME, "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(case, tied, tmp_path):
    expected = logits(save(llama(tied), tmp_path, **CASES[case]))
    lora = read(tmp_path, modules_of(tied), llama(tied))
    assert sum(lora.tensor_counts.values()) == len(load_file(tmp_path / WEIGHTS))
    assert lora.vocab_rows == {}  # what PEFT saves beside is the base's own
    np.testing.assert_allclose(logits(applied(llama(tied), lora)), expected, atol=2e-5)
    assert not np.allclose(logits(llama(tied)), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora_only", "all"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_biases_of_modules(kind, config, tmp_path):
    expected = logits(save(llama(bias=True), tmp_path, target_modules=SOME, bias=kind, **config))
    lora = read(tmp_path, modules_of(bias=True))
    assert len(lora.biases) == (14 if kind == "all" else 6) == lora.tensor_counts["bias"]
    assert lora.needs["enable_lora_bias"]
    np.testing.assert_allclose(logits(applied(llama(bias=True), lora)), expected, atol=2e-5)


def test_bias_all_of_a_model_without_biases_holds_none(tmp_path):
    save(llama(), tmp_path, target_modules=SOME, bias="all")
    assert read(tmp_path, modules_of()).biases == {}


def test_a_tied_head_follows_though_the_file_leaves_it_out(tmp_path):
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "lora_alpha": 7}
    expected = logits(save(llama(True), tmp_path, alpha_pattern={"lm_head": 2}, **config))
    tensors = load_file(tmp_path / WEIGHTS)
    whole = read(tmp_path, modules_of(True), llama(True))
    save_file({k: t for k, t in tensors.items() if "lm_head" not in k}, tmp_path / WEIGHTS)
    lora = read(tmp_path, modules_of(True), llama(True))
    np.testing.assert_array_equal(lora.loras["lm_head"].lora_a, whole.loras["lm_head"].lora_a)
    assert [lora.loras[name].scaling for name in lora.loras] == [7 / 3, 2 / 3]
    np.testing.assert_allclose(logits(applied(llama(True), lora)), expected, atol=2e-5)


def test_a_tied_embedding_follows_though_the_file_leaves_it_out(tmp_path):
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    expected = logits(save(llama(True), tmp_path, alpha_pattern={"lm_head": 2}, **config))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if "lm_head" in k}, tmp_path / WEIGHTS)
    lora = read(tmp_path, modules_of(True), llama(True))
    np.testing.assert_allclose(logits(applied(llama(True), lora)), expected, atol=2e-5)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save(llama(True), tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.lora_B.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"'a'.*lm_head.*embed_tokens.*ensure_weight_tying"):
        read(tmp_path, modules_of(True), llama(True))


def test_tokens_that_invoke_an_activated_lora(tmp_path):
    peft = save(llama(), tmp_path, target_modules=SOME, alora_invocation_tokens=[4, 9, 2])
    lora = read(tmp_path, modules_of())
    assert lora.invocation_tokens == (4, 9, 2)
    from_file = peft.peft_config["default"].alora_invocation_tokens
    assert list(lora.invocation_tokens) == from_file


def test_an_old_name_of_doras_magnitude(tmp_path):
    save(llama(), tmp_path, target_modules=SOME, use_dora=True)
    tensors = load_file(tmp_path / WEIGHTS)
    new = read(tmp_path, modules_of())
    suffix = "lora_magnitude_vector"
    save_file(
        {k + ".weight" * k.endswith(suffix): t for k, t in tensors.items()}, tmp_path / WEIGHTS
    )
    old = read(tmp_path, modules_of())
    np.testing.assert_array_equal(old.loras[Q0].magnitude, new.loras[Q0].magnitude)


SPOILED = {
    "no magnitude": ({"use_dora": True}, "lora_magnitude_vector", None, "no lora_magnitude_vector"),
    "magnitude too long": (
        {"use_dora": True},
        "lora_magnitude_vector",
        lambda t: np.append(t, t),
        r"expected \[32\]",
    ),
    "magnitude in two axes": (
        {"use_dora": True},
        "lora_magnitude_vector",
        lambda t: t[None],
        r"\[1, 32\], expected \[32\]",
    ),
    "no bias of B": ({"lora_bias": True}, "lora_B.bias", None, "no lora_B.bias"),
    "bias of B too short": (
        {"lora_bias": True},
        "lora_B.bias",
        lambda t: t[1:],
        r"\[31\], expected \[32\]",
    ),
    "bias too long": (
        {"bias": "all"},
        "base_layer.bias",
        lambda t: np.append(t, t),
        r"\[64\], expected \[32\]",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled(case, tmp_path):
    config, kind, change, message = SPOILED[case]
    save(llama(bias=True), tmp_path, target_modules=SOME, **config)
    tensors = load_file(tmp_path / WEIGHTS)
    key = f"base_model.model.{Q0}.{kind}"
    old = tensors.pop(key)
    if change is not None:
        tensors[key] = change(old)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"'a'.*{Q0}.*{message}"):
        read(tmp_path, modules_of(bias=True))


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"use_dora": True}, {"use_dora": False}),
        ({}, {"use_dora": True}),
        ({"lora_bias": True}, {"lora_bias": False}),
        ({}, {"lora_bias": True}),
        ({"bias": "all"}, {"bias": "lora_only"}),
        ({"bias": "lora_only"}, {"bias": "none"}),
        ({"bias": "lora_only"}, {"target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_agree_with_the_tensors(config, change, tmp_path):
    save(llama(bias=True), tmp_path, target_modules=SOME, **config)
    content = saved_config(tmp_path) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"'a'.*model\.layers\."):
        read(tmp_path, modules_of(bias=True))


def test_a_bias_that_the_base_has_not_is_refused(tmp_path):
    save(llama(bias=True), tmp_path, target_modules=SOME, bias="all")
    with pytest.raises(AdapterError, match=r"'a'.*bias.*has none in the model"):
        read(tmp_path, modules_of(bias=False))


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ({"use_dora": True, "target_modules": SOME}, "enable_lora_dora=True"),
        ({"lora_bias": True, "target_modules": SOME}, "enable_lora_bias=True"),
        ({"bias": "all", "target_modules": SOME}, "enable_lora_bias=True"),
        ({"target_modules": ["lm_head"]}, "enable_lora_embeddings=True"),
        ({"target_modules": SOME, "r": 33}, "max_lora_rank=32"),
    ],
    ids=str,
)
def test_what_is_not_reserved_is_refused_with_the_option_to_set(config, option, tmp_path):
    save(llama(bias=True), tmp_path, **config)
    read(tmp_path, modules_of(bias=True), llama(bias=True))
    with pytest.raises(AdapterError, match=rf"'a'.*{option}"):
        read(tmp_path, modules_of(bias=True), llama(bias=True), config=lora_config())


def test_plain_lora_needs_no_option(tmp_path):
    save(llama(), tmp_path, target_modules=SOME)
    lora = read(tmp_path, modules_of(), config=lora_config())
    assert lora.needs == {
        "max_lora_rank": 3,
        "enable_lora_dora": False,
        "enable_lora_bias": False,
        "enable_lora_embeddings": False,
        "max_lora_token_rows": 0,
        "lora_extra_vocab_size": 0,
        "lora_expert_blocks": 0,
    }


def test_velora_changes_training_only(tmp_path):
    from peft import VeloraConfig

    expected = logits(save(llama(), tmp_path, target_modules=SOME, velora_config=VeloraConfig()))
    lora = read(tmp_path, modules_of())
    assert sum(lora.tensor_counts.values()) == 18
    np.testing.assert_allclose(logits(applied(llama(), lora)), expected, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_initialisation_is_the_change_of_the_weights(init, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = llama()
    peft = get_peft_model(
        llama(), LoraConfig(r=3, target_modules=SOME, init_lora_weights=init, lora_alpha=5)
    )
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "initial")
    peft.peft_config["default"].init_lora_weights = init
    for name, one in peft.named_parameters():
        if "lora_" in name:
            one.data += torch.randn_like(one) * 0.1
    peft.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    peft.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read(tmp_path / "raw", modules_of())
    lora = read(tmp_path / "converted", modules_of())
    trained = peft.merge_and_unload()
    for name, layer in lora.loras.items():
        delta = layer.scaling * layer.lora_b @ layer.lora_a
        change = trained.get_submodule(name).weight - base.get_submodule(name).weight
        np.testing.assert_allclose(delta, change.detach().numpy(), atol=1e-5)
