"""Every field of each family's transformers configuration is decided: read, neutral or refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jlora.model import load_hf_config, model_config
from jlora.model.hf_config import FAMILIES

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}

# Read: a value other than the default, and what the ModelConfig then says.
READ = {
    "vocab_size": (77, {"vocab_size": 77}),
    "hidden_size": (768, {"hidden_size": 768}),
    "intermediate_size": (640, {"intermediate_size": 640}),
    "num_hidden_layers": (12, {"num_layers": 12}),
    "num_attention_heads": (64, {"num_heads": 64}),
    "num_key_value_heads": (2, {"num_kv_heads": 2}),
    "max_position_embeddings": (6000, {"max_position_embeddings": 6000}),
    "rms_norm_eps": (0.5, {"rms_norm_eps": 0.5}),
    "tie_word_embeddings": (None, {}),  # the other value than the default, below
    "hidden_act": ("gelu", {"hidden_act": "gelu"}),
    "rope_parameters": (YARN, {}),
    "dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "bos_token_id": (5, {"bos_token_id": 5}),
    "eos_token_id": ([5, 6], {"eos_token_ids": (5, 6)}),
}
# Leaves the answers alone: of training, of bookkeeping, of what else a forward returns.
NEUTRAL = {
    "transformers_version": "5.0.0",
    "architectures": ["Model"],
    "output_hidden_states": True,
    "return_dict": False,
    "chunk_size_feed_forward": 2,  # none of these models chunks
    "id2label": {0: "yes", 1: "no"},
    "label2id": {"yes": 0, "no": 1},
    "problem_type": "regression",
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 3,
    "attention_dropout": 0.25,
}
# Changes the answers, and is not served.
REFUSED = {"is_encoder_decoder": [True]}

HEAD_DIM = {"head_dim": (40, {"head_dim": 40})}
ATTENTION_BIAS = {"attention_bias": (True, {"qkv_bias": True, "o_bias": True})}
MLP_BIAS = {"mlp_bias": (True, {"mlp_bias": True})}
WINDOW = {"sliding_window": (9, {"sliding_windows": (9,)})}  # of every layer
BY_LAYER = {
    "layer_types": (["full_attention"], {"sliding_windows": (None,)}),
    "sliding_window": (9, {"sliding_windows": (9,)}),
}
QWEN_WINDOW = {
    "use_sliding_window": (True, {"sliding_windows": (4096,)}),
    "sliding_window": (9, {"sliding_windows": (9,)}),
}
GEMMA = {
    **HEAD_DIM,
    **ATTENTION_BIAS,
    **BY_LAYER,
    "hidden_activation": ("gelu", {"hidden_act": "gelu"}),
    "query_pre_attn_scalar": (16, {"attention_scale": 0.25}),
    "final_logit_softcapping": (7.0, {"logits_soft_cap": 7.0}),
}
BIDIRECTIONAL = {"use_bidirectional_attention": [True]}
ROUTER_OUTPUT = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
CHOICES = {"num_experts_per_tok": (3, {"num_experts_per_tok": 3})}
EXPERTS = {
    **CHOICES,
    "num_experts": (32, {"num_experts": 32}),
    "norm_topk_prob": (True, {"norm_topk_prob": True}),
}
# Family -> its further fields that are read, neutral and refused.
FURTHER: dict[str, tuple[dict, dict, dict]] = {
    "llama": ({**HEAD_DIM, **ATTENTION_BIAS, **MLP_BIAS}, {"pretraining_tp": 2}, {}),
    "mistral": ({**HEAD_DIM, **WINDOW}, {}, {}),
    "qwen2": (
        {**BY_LAYER, **QWEN_WINDOW, "max_window_layers": (0, {"sliding_windows": (4096,)})},
        {},
        {},
    ),
    "qwen3": (
        {
            **HEAD_DIM,
            **ATTENTION_BIAS,
            **BY_LAYER,
            **QWEN_WINDOW,
            "max_window_layers": (0, {"sliding_windows": (4096,)}),
        },
        {},
        {},
    ),
    "gemma2": (
        {**GEMMA, "attn_logit_softcapping": (7.0, {"attention_soft_cap": 7.0})},
        {},
        BIDIRECTIONAL,
    ),
    "gemma3_text": (GEMMA, {}, {**BIDIRECTIONAL, "attn_logit_softcapping": [7.0]}),
    "phi3": (
        {
            **WINDOW,
            "rope_parameters": ({"rope_type": "default", "rope_theta": 5.0}, {}),
            "original_max_position_embeddings": (64, {}),
        },
        {"resid_pdrop": 0.5, "embd_pdrop": 0.5},
        {},
    ),
    "granite": (
        {
            **ATTENTION_BIAS,
            **MLP_BIAS,
            "embedding_multiplier": (3.0, {"embedding_scale": 3.0}),
            "logits_scaling": (3.0, {"logits_divisor": 3.0}),
            "residual_multiplier": (3.0, {"residual_scale": 3.0}),
            "attention_multiplier": (3.0, {"attention_scale": 3.0}),
        },
        {},
        {},
    ),
    "olmo2": (ATTENTION_BIAS, {}, {}),
    "mixtral": (
        {**HEAD_DIM, **WINDOW, **CHOICES, "num_local_experts": (32, {"num_experts": 32})},
        {**ROUTER_OUTPUT, "router_jitter_noise": 0.5},  # noise of training only
        {},
    ),
    "qwen3_moe": (
        {
            **ATTENTION_BIAS,
            **QWEN_WINDOW,
            **EXPERTS,
            "moe_intermediate_size": (99, {"moe_intermediate_size": 99}),
        },
        ROUTER_OUTPUT,
        {"decoder_sparse_step": [2], "mlp_only_layers": [[1]]},
    ),
    "olmoe": (
        {**ATTENTION_BIAS, **EXPERTS, "clip_qkv": (7.0, {"clip_qkv": 7.0})},
        ROUTER_OUTPUT,
        {},
    ),
}
# What must stand beside a value for it to count.
BESIDE = {
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 0},
    "layer_types": {"use_sliding_window": True, "max_window_layers": 0, "num_hidden_layers": 1},
    "max_window_layers": {"use_sliding_window": True},
    "use_sliding_window": {"max_window_layers": 0},
    "original_max_position_embeddings": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    },
}
GEMMA3_ROPE = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}


def fields(family):
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}


def decided(family):
    """The family's fields that are read, neutral and refused."""
    read, neutral, refused = FURTHER[family]
    common = {name: READ[name] for name in READ if name in fields(family)}
    return {**common, **read}, {**NEUTRAL, **neutral}, {**REFUSED, **refused}


def make(family, **values):
    """Only what the family's class declares is given to it."""
    known = {name: value for name, value in values.items() if name in fields(family)}
    return CONFIG_MAPPING[family](**known)


def cases(kind):
    return [(family, name) for family in FAMILIES for name in decided(family)[kind]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_decided(family):
    names = [name for kind in decided(family) for name in kind]
    assert len(names) == len(set(names))
    new = fields(family) - set(names)
    assert not new, f"decide whether these may change a model's answers: {sorted(new)}"
    assert set(names) <= fields(family)


@pytest.mark.parametrize(("family", "name"), cases(0))
def test_read(family, name):
    value, expected = decided(family)[0][name]
    if name == "tie_word_embeddings":
        value = not make(family).tie_word_embeddings
        expected = {name: value}
    if family == "gemma3_text" and name == "rope_parameters":
        value = GEMMA3_ROPE
    beside = BESIDE.get(name, {})
    found = model_config(make(family, **{**beside, name: value}))
    assert found != model_config(make(family, **beside))
    for attribute, wanted in expected.items():
        actual = getattr(found, attribute)
        assert actual[:1] == wanted if attribute == "sliding_windows" else actual == wanted


@pytest.mark.parametrize(("family", "name"), cases(1))
def test_neutral(family, name):
    value = decided(family)[1][name]
    assert model_config(make(family, **{name: value})) == model_config(make(family))


@pytest.mark.parametrize(("family", "name"), cases(2))
def test_refused_by_name(family, name):
    for value in decided(family)[2][name]:
        hf = make(family)
        setattr(hf, name, value)
        with pytest.raises(ValueError, match=name):
            model_config(hf)


@pytest.mark.parametrize("family", ["phi3", "granite", "olmo2", "qwen3_moe", "olmoe"])
def test_head_dim_is_read_where_only_the_model_looks_for_it(family):
    """Their classes declare none, but the models ask for it (Qwen3-MoE's checkpoints have it)."""
    assert model_config(CONFIG_MAPPING[family](head_dim=40)).head_dim == 40


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("gemma3_text", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported"),
        ("phi3", {"rope_type": "llama3", "factor": 2.0}, "'llama3' is not supported for phi3"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    ],
)
def test_a_rope_that_the_family_cannot_have_is_refused(family, rope, message):
    hf = make(family)
    rope = {"rope_theta": 1e4, **rope}
    gemma = family == "gemma3_text"
    hf.rope_parameters = {"full_attention": rope, "sliding_attention": rope} if gemma else rope
    with pytest.raises(ValueError, match=message):
        model_config(hf)


def test_layers_that_differ_in_more_than_their_window_are_refused():
    hf = CONFIG_MAPPING["llama"](per_layer_config={0: {"intermediate_size": 64}})
    with pytest.raises(ValueError, match="is_heterogeneous"):
        model_config(hf)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok=9 of 8"):
        model_config(CONFIG_MAPPING["mixtral"](num_local_experts=8, num_experts_per_tok=9))


# -- as they are on the Hub --------------------------------------------------------------------

HALF = 48  # of the dimensions that Phi-4-mini turns: 3/4 of 128, halved
HUB = {
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "num_hidden_layers": 12,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "hidden_size": 1152,
            "torch_dtype": "bfloat16",
        },
        {
            "sliding_windows": ((512,) * 5 + (None,)) * 2,
            "max_position_embeddings": 131072,  # the factor is in it
            "attention_scale": 1 / 16,
            "embedding_scale": 34.0,  # sqrt(1152) = 33.94 in bfloat16
        },
        (("linear", 1e6), ("default", 1e4)),
    ),
    "Phi-4-mini-instruct": (
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_hidden_layers": 2,
            "partial_rotary_factor": 0.75,
            "sliding_window": 262144,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131072,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * HALF,
                "long_factor": [2.0] * HALF,
            },
            "tie_word_embeddings": True,
        },
        {"restarts_above": 4096, "fused_projections": True, "tie_word_embeddings": True},
        (("longrope", 1e4),),
    ),
    "Phi-3-mini-4k-instruct": (
        {
            "model_type": "phi3",
            "num_hidden_layers": 2,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "attention_bias": False,
        },
        {"restarts_above": None, "sliding_windows": (2047, 2047)},
        (("default", 1e4),),
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "head_dim": 128,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "max_window_layers": 48,
            "sliding_window": None,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_theta": 1000000.0,
        },
        {
            "head_dim": 128,
            "num_experts": 128,
            "norm_topk_prob": True,
            "sliding_windows": (None,) * 2,
        },
        (("default", 1e6),),
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 14336,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        {"num_experts": 8, "moe_intermediate_size": 14336, "norm_topk_prob": True},
        (("default", 1e6),),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_older_spellings_of_the_hub(name, tmp_path):
    """Keys as real checkpoints have them, the layers fewer, read as a folder's file is."""
    content, expected, ropes = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = model_config(load_hf_config(str(tmp_path)))
    assert {attribute: getattr(found, attribute) for attribute in expected} == expected
    assert tuple((rope.type, rope.theta) for rope in found.ropes) == ropes
