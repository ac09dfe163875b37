"""Adapters of mixture-of-experts models that PEFT saves, and those of transformers 4's modules."""

from __future__ import annotations

import json
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from jlora.errors import AdapterError
from jlora.projections import ModuleMap
from tests.manager.adapters import WEIGHTS, lora_config, make_config, model_config
from tests.manager.peft_models import read, save, tensor
from tests.manager.test_peft_mutations import mutations

EXPERTS = 4
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS = {
    "mixtral": lambda inner: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=inner, num_local_experts=EXPERTS)
    ),
    "qwen3_moe": lambda inner: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=inner, intermediate_size=inner, num_experts=EXPERTS
        )
    ),
    "olmoe": lambda inner: OlmoeForCausalLM(
        OlmoeConfig(
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            intermediate_size=inner,
            num_experts=EXPERTS,
        )
    ),
}
GATE_UP, DOWN, ROUTER = "experts.gate_up_proj", "experts.down_proj", "gate.weight"


def moe(family: str, inner: int = 20):
    torch.manual_seed(5)
    return MODELS[family](inner).eval()


def modules_of(family: str, inner: int = 20) -> ModuleMap:
    dim = 6 if family == "olmoe" else 8
    return ModuleMap(
        model_config(
            head_dim=dim,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=inner,
        )
    )


def assert_same(model, expected) -> None:
    """Of weights: logits hang on which expert wins, and so on the last bit."""
    theirs = expected.state_dict()
    for name, one in model.state_dict().items():
        np.testing.assert_allclose(one.numpy(), theirs[name].numpy(), atol=1e-5, err_msg=name)


def applied(model, lora):
    """The base model with the adapter written into its weights."""
    for name, layer in lora.loras.items():
        delta = tensor(layer.lora_b) @ tensor(layer.lora_a) * layer.scaling
        if ".experts." not in name:
            model.get_parameter(f"{name}.weight").data += delta
            continue
        module, expert, part = name.rsplit(".", 2)
        experts = model.get_submodule(module)
        if part == "down_proj":
            experts.down_proj.data[int(expert)] += delta
        else:
            start = 0 if part == "gate_proj" else len(delta)
            experts.gate_up_proj.data[int(expert), start : start + len(delta)] += delta
    return model


CASES = {
    "gate and up": {"target_parameters": [GATE_UP]},
    "down": {"target_parameters": [DOWN]},
    "both": {"target_parameters": [DOWN, GATE_UP]},
    "all": {"target_parameters": [ROUTER, DOWN, GATE_UP], "target_modules": ["q_proj"]},
    "by the last name": {"target_parameters": ["down_proj", "gate_up_proj"]},
    "one layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "both in one layer": {"target_parameters": [GATE_UP, "model.layers.0.mlp.experts.down_proj"]},
    "patterns": {
        "target_parameters": [DOWN, GATE_UP, ROUTER],
        "rank_pattern": {"down_proj": 5, "gate": 2, "gate.weight": 1},
        "alpha_pattern": {"experts.gate_up_proj": 9, "mlp.experts": 1},
        "use_rslora": True,
    },
    "router": {"target_parameters": [ROUTER]},
    "by modules": {"target_modules": ["gate", "q_proj"]},
    "everything": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("family", "inner"),
    [*((family, 20) for family in MODELS), ("qwen3_moe", 12)],  # 2 * 12 is hidden_size
)
def test_weights_are_pefts(case, family, inner, tmp_path):
    config = {"target_modules": [], **CASES[case]}
    expected = save(moe(family, inner), tmp_path, **config).merge_and_unload()
    lora = read(tmp_path, modules_of(family, inner))
    assert sum(lora.tensor_counts.values()) == len(load_file(tmp_path / WEIGHTS))
    assert set(lora.tensor_counts) <= {"router", "experts_gate_up", "experts_down", "qkv", "o"}
    assert_same(applied(moe(family, inner), lora), expected)
    assert lora.loras


def test_the_experts_are_views_of_the_two_arrays(tmp_path):
    save(moe("mixtral"), tmp_path, target_modules=[], target_parameters=[GATE_UP])
    lora = read(tmp_path, modules_of("mixtral"))
    name = "model.layers.0.mlp.experts"
    gate, up = lora.loras[f"{name}.1.gate_proj"], lora.loras[f"{name}.1.up_proj"]
    other = lora.loras[f"{name}.3.gate_proj"]
    assert np.shares_memory(gate.lora_a, up.lora_a)
    assert gate.lora_a.base is other.lora_a.base is not None
    assert gate.lora_b.shape == (20, 3)
    assert gate.rank == up.rank == 3


# -- files of transformers 4, with each expert apart ---------------------------------------------


OLD = {"mixtral": ("block_sparse_moe", "w1", "w2", "w3")}


def per_expert(folder, family: str, **config):
    """An adapter as transformers 4 had it; returns its tensors."""
    mlp, gate, down, up = OLD.get(family, ("mlp", "gate_proj", "down_proj", "up_proj"))
    rng = np.random.default_rng(0)
    tensors = {}

    def add(module, d_in, d_out):
        a, b = rng.standard_normal((3, d_in)), rng.standard_normal((d_out, 3))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)

    for layer in range(2):
        prefix = f"model.layers.{layer}.{mlp}"
        add(f"{prefix}.gate", 24, EXPERTS)
        for expert in range(EXPERTS):
            add(f"{prefix}.experts.{expert}.{gate}", 24, 20)
            add(f"{prefix}.experts.{expert}.{up}", 24, 20)
            add(f"{prefix}.experts.{expert}.{down}", 20, 24)
    save_file(tensors, folder / WEIGHTS)
    content = make_config(r=3, target_modules=["gate", gate, up, down], task_type="CAUSAL_LM")
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return tensors


@pytest.mark.parametrize("family", MODELS)
def test_old_files_are_as_peft_converts_them(family, tmp_path):
    tensors = per_expert(tmp_path, family)
    lora = read(tmp_path, modules_of(family))
    assert sum(lora.tensor_counts.values()) == len(tensors) == 2 * 2 * (1 + 3 * EXPERTS)
    peft = PeftModel.from_pretrained(moe(family), tmp_path).eval()
    # What PEFT saves now has fused ranks; they are taken apart again.
    peft.save_pretrained(tmp_path / "new")
    assert_same(applied(moe(family), lora), peft.merge_and_unload())
    new = read(tmp_path / "new", modules_of(family))
    assert set(new.loras) == set(lora.loras)
    for name, layer in new.loras.items():
        assert (layer.rank, layer.scaling) == (3, lora.loras[name].scaling)
        assert layer.lora_alpha == lora.loras[name].lora_alpha
        np.testing.assert_array_equal(layer.lora_a, lora.loras[name].lora_a)
        np.testing.assert_array_equal(layer.lora_b, lora.loras[name].lora_b)


def test_one_expert_alone(tmp_path):
    tensors = per_expert(tmp_path, "qwen3_moe")
    name = "model.layers.1.mlp.experts.2.up_proj"
    save_file({k: t for k, t in tensors.items() if name in k}, tmp_path / WEIGHTS)
    lora = read(tmp_path, modules_of("qwen3_moe"))
    assert set(lora.loras) == {name}
    assert lora.needs["lora_expert_blocks"] == 1


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        ({"target_parameters": [GATE_UP]}, 2 * EXPERTS),
        ({"target_parameters": [GATE_UP, DOWN], "r": 17}, 2 * 2 * EXPERTS),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, EXPERTS),
        ({"target_parameters": [ROUTER]}, 0),
    ],
    ids=str,
)
def test_blocks_of_experts(config, blocks, tmp_path):
    save(moe("olmoe"), tmp_path, target_modules=[], **config)
    assert read(tmp_path, modules_of("olmoe")).needs["lora_expert_blocks"] == blocks
    options = {"max_lora_rank": 32, "lora_expert_blocks": blocks}
    read(tmp_path, modules_of("olmoe"), config=lora_config(**options))
    if blocks:
        with pytest.raises(AdapterError, match=f"lora_expert_blocks={blocks}"):
            read(tmp_path, modules_of("olmoe"), config=lora_config())


RENAMES = [
    ("layers.0", "layers.1"),
    ("layers.1", "layers.2"),
    ("experts.lora", "experts.base_layer.lora"),
    ("experts.base_layer", "experts"),
    ("experts.base_layer", "experts.base_layer.base_layer"),
    ("experts", "experts.0"),
    ("experts.lora", "experts.0.down_proj.lora"),
    ("mlp.experts", "mlp.gate"),
    ("mlp.gate", "mlp.experts"),
    ("lora_A", "lora_B"),
    (".weight", ".bias"),
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.parametrize("targets", [[GATE_UP, DOWN, ROUTER], [GATE_UP], [DOWN]], ids=str)
@given(data=st.data())
def test_files_changed_at_random_are_refused_or_pefts(targets, data, tmp_path):
    save(moe("mixtral"), tmp_path, target_modules=[], target_parameters=targets)
    changed = data.draw(mutations(load_file(tmp_path / WEIGHTS), RENAMES))
    save_file(changed, tmp_path / WEIGHTS)
    try:
        lora = read(tmp_path, modules_of("mixtral"))
    except AdapterError:
        return
    assert sum(lora.tensor_counts.values()) == len(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(moe("mixtral"), tmp_path).merge_and_unload()
    assert_same(applied(moe("mixtral"), lora), theirs)


OUTER = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
INNER = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_{}.weight"
SPOILED = {
    "no B": ({OUTER.format("B"): lambda t: None}, {}, "no lora_B.weight"),
    "ranks of one expert": (
        {INNER.format("A"): lambda t: t[:3]},
        {},
        r"\[3, 24\], expected \[12, 24\].*4 experts",
    ),
    "B transposed": (
        {INNER.format("B"): lambda t: np.ascontiguousarray(t.T)},
        {},
        r"\[12, 40\], expected \[40, 12\]",
    ),
    "wrappers exchanged": (
        {
            INNER.format("A"): lambda t: np.ones((12, 20), np.float32),
            OUTER.format("A"): lambda t: np.ones((12, 24), np.float32),
        },
        {},
        r"\[12, 20\]|\[12, 24\]",
    ),
    "one parameter named, two in the file": (
        {},
        {"target_parameters": [DOWN]},
        "base_layer.*names",
    ),
    "none named": (
        {},
        {"target_parameters": [ROUTER], "target_modules": ["q_proj"]},
        "names none",
    ),
    "a bias": (
        {OUTER.format("B").replace("weight", "bias"): lambda t: np.ones(24, np.float32)},
        {},
        "does not belong",
    ),
    "NaN": ({OUTER.format("B"): lambda t: t * np.nan}, {}, "holds nan"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled(case, tmp_path):
    changes, config, message = SPOILED[case]
    save(moe("mixtral"), tmp_path, target_modules=[], target_parameters=[GATE_UP, DOWN])
    tensors = load_file(tmp_path / WEIGHTS)
    for key, change in changes.items():
        new = change(tensors.pop(key, None))
        if new is not None:
            tensors[key] = new
    save_file(tensors, tmp_path / WEIGHTS)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterError, match=f"'a'.*({message})"):
        read(tmp_path, modules_of("mixtral"))
