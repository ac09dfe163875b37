"""Files changed at random: jlora refuses them by name, or computes what PEFT does with them."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from jlora.errors import AdapterError
from tests.manager.adapters import WEIGHTS
from tests.manager.peft_models import applied, llama, logits, modules_of, read, save

PREFIX = "base_model.model."
CONFIGS = {
    "plain": {"target_modules": ["q_proj", "o_proj"]},
    "DoRA": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "bias": "all"},
    "vocabulary": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["o_proj", "lm_head"], "trainable_token_indices": [3, 1]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "parameters": {"target_modules": [], "target_parameters": ["o_proj.weight", "lm_head.weight"]},
}


@functools.cache
def original(name: str) -> tuple[Path, dict[str, np.ndarray]]:
    folder = Path(tempfile.mkdtemp())
    save(llama(name == "tied", bias=True), folder, **CONFIGS[name])
    return folder, load_file(folder / WEIGHTS)


RENAMES = [
    ("layers.0", "layers.1"),
    ("layers.1", "layers.2"),
    ("layers.0", "layers.00"),
    ("q_proj", "o_proj"),
    ("q_proj", "k_proj"),
    ("o_proj", "down_proj"),
    ("lora_A", "lora_B"),
    ("lora_B", "lora_A"),
    (".weight", ".bias"),
    (".weight", ""),
    (".base_layer", ""),
    (".bias", ".base_layer.bias"),
    ("lora_embedding_A", "lora_A.weight"),
    ("lora_embedding_", "lora_"),
    ("lora_magnitude_vector", "lora_magnitude"),
    ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    ("trainable_tokens_delta", "weight"),
    ("model.embed_tokens", "lm_head"),
    ("lm_head", "model.embed_tokens"),
    (".lora_", ".base_layer.lora_"),
    (".lora_A", ".lora_A.default"),
    ("self_attn", "attn"),
    (PREFIX, "base_model."),
    (PREFIX, PREFIX + PREFIX),
]


CHANGES = ["remove", "module", "rename", "copy", "transpose", "exchange", "scale"]


@st.composite
def mutations(
    draw, tensors: dict[str, np.ndarray], renames: list[tuple[str, str]] = RENAMES
) -> dict[str, np.ndarray]:
    """The tensors after one to three changes."""
    changed = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        if not changed:
            break
        names = sorted(changed)
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        kind = draw(
            st.sampled_from(
                ["remove", "module", "rename", "copy", "transpose", "exchange", "scale"]
            )
        )
        if kind == "remove":
            del changed[name]
        elif kind == "module":
            module = name.split(".lora_")[0]
            changed = {k: t for k, t in changed.items() if not k.startswith(module)}
        elif kind in ("rename", "copy"):
            fitting = [new for old in renames if (new := name.replace(*old)) != name]
            if fitting:
                new = draw(st.sampled_from(fitting))
                changed[new] = changed[name] if kind == "copy" else changed.pop(name)
        elif kind == "transpose":
            changed[name] = np.ascontiguousarray(changed[name].T)
        elif kind == "exchange":
            changed[name], changed[other] = changed[other], changed[name]
        else:
            changed[name] = changed[name] * np.float32(0.5)
    return changed


def pefts(folder: Path, tied: bool) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(llama(tied, bias=True), folder).eval())


@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_same_as_pefts_or_refused(name, data, tmp_path):
    folder, tensors = original(name)
    changed = data.draw(mutations(tensors))
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(changed, tmp_path / WEIGHTS)
    tied = name == "tied"
    message, lora = "", None
    try:
        lora = read(tmp_path, modules_of(tied, bias=True), llama(tied, bias=True))
    except AdapterError as error:
        message = str(error)
    if lora is None:
        named = any(key in message for key in changed)
        assert named or "module" in message or "lm_head" in message or not changed, message
        return
    assert sum(lora.tensor_counts.values()) == len(changed)
    ours = logits(applied(llama(tied, bias=True), lora))
    np.testing.assert_allclose(ours, pefts(tmp_path, tied), atol=3e-5, rtol=1e-4)


def test_a_matrix_of_a_targeted_module_that_has_no_adapter_is_refused(tmp_path):
    """PEFT makes an adapter that changes nothing, and drops a matrix that is not under it."""
    folder, tensors = original("vocabulary")
    name = f"{PREFIX}model.embed_tokens"
    changed = {key: one for key, one in tensors.items() if not key.startswith(name)}
    changed[f"{name}.weight"] = tensors[f"{PREFIX}lm_head.weight"]
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(changed, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight does not fit"):
        read(tmp_path, modules_of(False, bias=True), llama(False, bias=True))
