"""Unusual adapters: combinations that broke."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from jlora import AdapterError, LoRARequest
from tests.reference import ADDED, INVOCATION, VOCAB, Reference, load_base, make_adapter, make_model
from tests.test_adapter_kinds import answers, check, prompt
from tests.test_against_peft import engine, requests_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken") / "model"
    make_model("llama3", folder)
    return folder


def test_a_whole_matrix_keeps_the_rows_that_an_adapter_left_alone(model, tmp_path):
    """Added tokens must not be counted as changed ones: two rows are still the base's."""
    base = load_base(model, ADDED)
    kind = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft = get_peft_model(base, kind)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                change = 0.2 * torch.randn_like(parameter)
                change[[7, 40]] = 0
                parameter.add_(change)
    peft.save_pretrained(str(tmp_path / "added"))
    adapters = {"added": tmp_path / "added"}
    llm = engine(model, lora_extra_vocab_size=ADDED, max_lora_full_weights=1)
    prompts = [[5, 7, 40, 7, VOCAB + 1, 40], [7], [40, 40]]
    outputs = answers(llm, requests_of(adapters) * 3, prompts)
    check(outputs, Reference(model, adapters), ["added"] * 3)


def test_a_whole_matrix_keeps_the_bases_precision(model, tmp_path):
    """Rows in bfloat16 among a base in float32 must not round the base's."""
    make_adapter(
        model, tmp_path / "a", r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6, 90]
    )
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: one.astype(ml_dtypes.bfloat16) for key, one in tensors.items()}, file)
    adapters = {"a": tmp_path / "a"}
    llm = engine(model, max_lora_full_weights=1)
    prompts = [prompt(1), [5, 6, 90]]
    outputs = answers(llm, requests_of(adapters) * 2, prompts)
    check(outputs, Reference(model, adapters), ["a"] * 2)


ALORA = {"r": 4, "alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama3", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 90]}),
        ("llama3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama3", {"target_modules": ["q_proj"], "added": ADDED}),
        ("llama-bias", {"target_modules": ["q_proj"], "bias": "all"}),
    ],
    ids=["tokens", "saved-head", "added", "bias"],
)
def test_what_an_activated_lora_changes_everywhere_is_refused(tmp_path, family, kind):
    """PEFT's rows and biases act before the invocation too."""
    make_model(family, tmp_path / "model")
    make_adapter(tmp_path / "model", tmp_path / "activated", **ALORA, **kind)
    request = LoRARequest("activated", 1, str(tmp_path / "activated"))
    with pytest.raises(AdapterError, match="alora_invocation_tokens"):
        engine(tmp_path / "model", lora_modules=[request])


def test_a_step_that_fails_while_it_writes_an_adapter_leaves_it_unwritten(tmp_path):
    """The base's file is away when an adapter's matrix is made: an error; then it is back."""
    make_model("llama3", tmp_path / "model")
    make_adapter(
        tmp_path / "model",
        tmp_path / "a",
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices=[5, 6, 90],
    )
    adapters = {"a": tmp_path / "a"}
    request = requests_of(adapters)[0]
    llm = engine(tmp_path / "model", max_lora_full_weights=1)
    reference = Reference(tmp_path / "model", adapters)
    files = list((tmp_path / "model").glob("*.safetensors"))
    away = tmp_path / "away"
    away.mkdir()
    for file in files:
        shutil.move(file, away / file.name)
    with pytest.raises(FileNotFoundError):
        answers(llm, [request])
    check(answers(llm, [None]), reference, [None])  # others are served meanwhile
    for file in files:
        shutil.move(away / file.name, file)
    outputs = answers(llm, [request, None])
    check(outputs, reference, ["a", None])


class Merged:
    """The base with other weights: of adapters that PEFT cannot make with this transformers."""

    def __init__(self, model, change):
        self.base = load_base(model)
        with torch.no_grad():
            change(dict(self.base.named_parameters()))

    @torch.no_grad()
    def logprobs(self, tokens, adapter, prompt=None):
        return torch.log_softmax(self.base(torch.tensor([tokens])).logits[0].double(), -1).numpy()


def written(folder, tensors, **config):
    """An adapter folder by hand."""
    folder.mkdir()
    named = {f"base_model.model.{key}": one for key, one in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return LoRARequest(folder.name, 1, str(folder))


def normal(*shape, seed=0, scale=0.3):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken") / "moe"
    make_model("qwen3-moe", folder)
    return folder


def dora(weight, a, b, magnitude):
    whole = weight + torch.tensor(b) @ torch.tensor(a)
    return torch.tensor(magnitude)[:, None] * whole / whole.norm(dim=1, keepdim=True)


def test_dora_of_single_experts(moe, tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj"
    a, b, magnitude = normal(2, 24), normal(48, 2, seed=1), 2 + normal(48, seed=2)
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude}
    request = written(
        tmp_path / "a",
        {f"{name}.{key}": one for key, one in tensors.items()},
        r=2,
        lora_alpha=2,
        target_modules=["down_proj"],
        use_dora=True,
    )
    with pytest.raises(AdapterError, match="lora_magnitude_vector is not supported: DoRA"):
        engine(moe, lora_modules=[request])


def test_lora_bias_of_single_experts(moe, tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj"
    tensors = {
        f"{name}.lora_A.weight": normal(2, 24),
        f"{name}.lora_B.weight": normal(48, 2),
        f"{name}.lora_B.bias": normal(48),
    }
    with pytest.raises(AdapterError, match=r"lora_bias|lora_B\.bias"):
        engine(
            moe,
            lora_modules=[
                written(
                    tmp_path / "a",
                    tensors,
                    r=2,
                    lora_alpha=2,
                    target_modules=["down_proj"],
                    lora_bias=True,
                )
            ],
        )


def test_dora_of_a_router(moe, tmp_path):
    name = "model.layers.1.mlp.gate"
    a, b, magnitude = normal(2, 48), normal(4, 2, seed=1), 2 + normal(4, seed=2)
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude}
    request = written(
        tmp_path / "a",
        {f"{name}.{key}": one for key, one in tensors.items()},
        r=2,
        lora_alpha=2,
        target_modules=["gate"],
        use_dora=True,
    )

    def change(parameters):
        weight = parameters["model.layers.1.mlp.gate.weight"]
        weight.copy_(dora(weight, a, b, magnitude))

    llm = engine(moe, lora_modules=[request])
    check(answers(llm, [request] * 2), Merged(moe, change), ["a"] * 2)


def test_target_modules_of_an_engine_may_be_of_the_vocabulary(model, tmp_path):
    targets = ["q_proj", "embed_tokens", "lm_head"]
    make_adapter(model, tmp_path / "a", r=2, target_modules=targets)
    request = LoRARequest("a", 1, str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="not among the engine's target modules"):
        engine(model, lora_modules=[request], lora_target_modules=["q_proj"])
    llm = engine(model, lora_modules=[request], lora_target_modules=targets)
    check(answers(llm, [request]), Reference(model, {"a": tmp_path / "a"}), ["a"])


def test_what_pinned_adapters_leave_too_little_of_is_named(moe, tmp_path):
    """Not always lora_pool_blocks: experts and whole matrices have blocks of their own."""
    kinds = {
        "experts": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    llm = engine(moe, lora_expert_blocks=1, max_lora_full_weights=1)
    options = {"experts": "raise lora_expert_blocks", "saved": "raise max_lora_full_weights"}
    for index, (name, kind) in enumerate(kinds.items()):
        make_adapter(moe, tmp_path / name, r=2, **kind)
        llm.llm_engine.add_lora(LoRARequest(name, 2 * index + 1, str(tmp_path / name)))
        llm.llm_engine.pin_lora(2 * index + 1)
        with pytest.raises(AdapterError, match=options[name]):
            llm.llm_engine.add_lora(LoRARequest("two", 2 * index + 2, str(tmp_path / name)))
