"""Every field of the installed PEFT's LoraConfig is decided here: served, neutral or refused."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from jlora.errors import AdapterError
from jlora.manager import PEFTHelper
from tests.manager.adapters import make_config

Q0 = "model.layers.0.self_attn.q_proj"
PLAIN = PEFTHelper.from_dict(make_config())

# Changes what an adapter computes, and is served: value -> (rank, scaling, targeted) of Q0.
SERVED = {
    "r": (2, (2, 4.0, True)),
    "lora_alpha": (2, (4, 0.5, True)),
    "use_rslora": (True, (4, 4.0, True)),
    "rank_pattern": ({"q_proj": 8}, (8, 1.0, True)),
    "alpha_pattern": ({"q_proj": 16}, (4, 4.0, True)),
    "target_modules": (["k_proj"], (4, 2.0, False)),
    "exclude_modules": (["q_proj"], (4, 2.0, False)),
    "layers_to_transform": ([1], (4, 2.0, False)),
    # Only beside layers_to_transform; test_peft.py compares the two with PEFT.
    "layers_pattern": ([], (4, 2.0, True)),
}

# What an adapter may have beside plain LoRA, and is served: value -> attribute, what it becomes.
BESIDE = {
    "use_dora": (True, "use_dora", True),
    "lora_bias": (True, "lora_bias", True),
    "bias": ("all", "bias", "all"),
    "modules_to_save": (["embed_tokens"], "saved_modules", ("model.embed_tokens",)),
    "trainable_token_indices": ([5, 3], "token_ids", (("model.embed_tokens", (5, 3)),)),
    "ensure_weight_tying": (True, "ensure_weight_tying", True),
    "alora_invocation_tokens": ([1, 2], "invocation_tokens", (1, 2)),
    "target_parameters": (["q_proj.weight"], "target_parameters", ("q_proj.weight",)),
}

# Leaves the mathematics alone, whatever the value (of training, of bookkeeping, of initialising).
NEUTRAL = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "some/model",  # kept, see other_base_model
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 1.5},
    "fan_in_fan_out": True,
    "inference_mode": True,
    "loftq_config": {"loftq_bits": 4},
    "lora_dropout": 0.1,
    "lora_ga_config": {"direction": "random"},
    "megatron_core": "megatron.core",
    "peft_version": "0.99",
    "qalora_group_size": 8,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "velora_config": {"num_groups": 2},
}

# Changes the mathematics or the base weights, and is refused: all values to try.
REFUSED = {
    "arrow_config": [{"top_k": 2}, {}],
    "init_lora_weights": [
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "unknown",
    ],
    "kasa_config": [{"beta": 1.0}, {}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "monteclora_config": [{"num_samples": 4}, {}],
    "peft_type": ["LOHA", "VERA", None],
    "task_type": ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"],
    "use_bdlora": [{"nblocks": 2}, {}, True],
    "use_qalora": [True],
}

FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}


def test_every_field_of_peft_is_decided():
    decided = [*SERVED, *BESIDE, *NEUTRAL, *REFUSED]
    assert len(decided) == len(set(decided))
    new = set(FIELDS) - set(decided)
    assert not new, f"decide whether these may change the served mathematics: {sorted(new)}"


@pytest.mark.parametrize("name", SERVED)
def test_served(name):
    value, expected = SERVED[name]
    one = PEFTHelper.from_dict(make_config(**{name: value}))
    assert (one.rank(Q0), one.scaling(Q0), one.targets(Q0)) == expected


@pytest.mark.parametrize("name", BESIDE)
def test_served_beside_lora(name):
    value, attribute, expected = BESIDE[name]
    one = PEFTHelper.from_dict(make_config(**{name: value}))
    assert getattr(one, attribute) == expected != getattr(PLAIN, attribute)


@pytest.mark.parametrize("value", [["classifier"], ["lm_head", "score"], ["norm"]])
def test_only_the_vocabulary_can_be_saved_as_a_whole(value):
    with pytest.raises(AdapterError, match="modules_to_save") as caught:
        PEFTHelper.from_dict(make_config(modules_to_save=value))
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral(name):
    assert PEFTHelper.from_dict(make_config(**{name: NEUTRAL[name]})) == PLAIN


@pytest.mark.parametrize(("name", "value"), [(name, v) for name in REFUSED for v in REFUSED[name]])
def test_refused_by_name(name, value):
    with pytest.raises(AdapterError, match=name) as caught:
        PEFTHelper.from_dict(make_config(**{name: value}), "adapter 'sql'")
    assert "adapter 'sql'" in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_weights(value):
    assert PEFTHelper.from_dict(make_config(init_lora_weights=value)) == PLAIN


def test_what_peft_writes_by_default_is_accepted():
    written = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    one = PEFTHelper.from_dict(written)
    assert (one.rank(Q0), one.scaling(Q0), one.targets(Q0)) == (4, 2.0, True)


@pytest.mark.parametrize("name", ["modules_to_save", "target_parameters", "layer_replication"])
def test_an_empty_list_is_off_where_peft_takes_it_so(name):
    assert PEFTHelper.from_dict(make_config(**{name: []})) == PLAIN


@pytest.mark.parametrize("value", [True, 0, 0.0, "", "x", {}, [], [0], {"a": None}])
def test_an_unknown_key_with_a_value_is_refused(value):
    with pytest.raises(AdapterError, match="some_new_lora"):
        PEFTHelper.from_dict(make_config(some_new_lora=value))


@pytest.mark.parametrize("value", [None, False])
def test_an_unknown_key_that_is_off_is_accepted(value):
    """Older and newer PEFTs write the switches of what an adapter does not use."""
    assert PEFTHelper.from_dict(make_config(some_new_lora=value)) == PLAIN
