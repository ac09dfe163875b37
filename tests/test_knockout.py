"""Take the adapter of each module away in turn: the answers change, and stay PEFT's."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora import LLM, LoRARequest, SamplingParams
from tests.reference import ALL, VOCAB, Reference, make_adapter, make_model

PROMPT = np.random.default_rng(0).integers(3, VOCAB, 24).tolist()
MODULES = [(layer, module) for layer in range(2) for module in ALL]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The whole adapter, and for each module a copy in which its lora_B is zero."""
    folder = tmp_path_factory.mktemp("knockout")
    make_model("llama-bias", folder / "model")
    make_adapter(folder / "model", folder / "whole", r=20, lora_alpha=20, target_modules=ALL)
    tensors = load_file(folder / "whole" / "adapter_model.safetensors")
    for layer, module in MODULES:
        copy = folder / f"{layer}-{module}"
        shutil.copytree(folder / "whole", copy)
        names = [
            name for name in tensors if f"layers.{layer}." in name and f".{module}.lora_B" in name
        ]
        assert len(names) == 1
        changed = {**tensors, names[0]: np.zeros_like(tensors[names[0]])}
        save_file(changed, copy / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(folders) -> Reference:
    names = ["whole", *(f"{layer}-{module}" for layer, module in MODULES)]
    return Reference(folders / "model", {name.replace(".", ""): folders / name for name in names})


@pytest.fixture(scope="module")
def logprobs(folders) -> dict[str, np.ndarray]:
    """Of the prompt's tokens, by every adapter in one batch."""
    names = ["whole", *(f"{layer}-{module}" for layer, module in MODULES)]
    llm = LLM(
        str(folders / "model"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        use_tqdm=False,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=32,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        max_model_len=64,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPT}] * len(names),
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        lora_request=[
            LoRARequest(name, index + 1, str(folders / name)) for index, name in enumerate(names)
        ],
        use_tqdm=False,
    )
    return {
        name: np.array(
            [
                row[token].logprob
                for row, token in zip(o.prompt_logprobs[1:], PROMPT[1:], strict=True)
            ]
        )
        for name, o in zip(names, outputs, strict=True)
    }


def expected(reference, name) -> np.ndarray:
    rows = reference.logprobs(PROMPT, name)
    return rows[np.arange(len(PROMPT) - 1), PROMPT[1:]]


def test_whole_adapter(reference, logprobs):
    np.testing.assert_allclose(logprobs["whole"], expected(reference, "whole"), atol=1e-4)


@pytest.mark.parametrize(("layer", "module"), MODULES)
def test_without_one_module(reference, logprobs, layer, module):
    name = f"{layer}-{module}"
    np.testing.assert_allclose(logprobs[name], expected(reference, name), atol=1e-4)
    assert np.abs(logprobs[name] - logprobs["whole"]).max() > 0.01
