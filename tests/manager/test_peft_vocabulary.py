"""Embeddings, heads and rows of them that PEFT saves: read and applied, the logits are PEFT's."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from jlora.errors import AdapterError
from jlora.manager.requirements import options_for
from tests.manager.adapters import WEIGHTS, lora_config
from tests.manager.peft_models import (
    applied,
    base_weight,
    llama,
    logits,
    modules_of,
    read,
    save,
    saved_config,
)

Q = ["q_proj"]
CASES = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head beside LoRA of the embedding": {
        "target_modules": ["embed_tokens", "q_proj"],
        "modules_to_save": ["lm_head"],
    },
    "embedding beside LoRA of the head": {
        "target_modules": ["lm_head", "q_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "embedding beside LoRA of itself": {
        "target_modules": ["embed_tokens", "q_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "embedding, tying": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tying": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "both, tying": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [7, 3, 49]},
    "rows, tying": {"trainable_token_indices": [7, 3], "ensure_weight_tying": True},
    "rows of the embedding": {"trainable_token_indices": {"embed_tokens": [1, 3]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [1, 3]}},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]}},
    "rows that differ": {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [4, 3]}},
    "rows in another order": {
        "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [3, 1]}
    },
    "rows of the head, tying": {
        "trainable_token_indices": {"lm_head": [1, 3]},
        "ensure_weight_tying": True,
    },
    "rows beside a saved head": {
        "trainable_token_indices": [1, 3],
        "modules_to_save": ["lm_head"],
    },
    "rows beside LoRA of the head": {
        "target_modules": ["lm_head", "q_proj"],
        "trainable_token_indices": [1, 3],
    },
    "rows of the head beside LoRA of the embedding": {
        "target_modules": ["embed_tokens", "q_proj"],
        "trainable_token_indices": {"lm_head": [1, 3]},
    },
}
# A tied head follows the rows of the embedding, and PEFT saves something else then.
REFUSED = {("rows beside a saved head", True), ("rows beside LoRA of the head", True)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(case, tied, tmp_path):
    save(llama(tied), tmp_path, **{"target_modules": Q, **CASES[case]})
    if (case, tied) in REFUSED:
        with pytest.raises(AdapterError, match=r"'a'.*lm_head"):
            read(tmp_path, modules_of(tied), llama(tied))
        return
    expected = logits(PeftModel.from_pretrained(llama(tied), tmp_path).eval())
    lora = read(tmp_path, modules_of(tied), llama(tied))
    assert sum(lora.tensor_counts.values()) == len(load_file(tmp_path / WEIGHTS))
    np.testing.assert_allclose(logits(applied(llama(tied), lora)), expected, atol=2e-5)
    assert not np.allclose(logits(llama(tied)), expected, atol=1e-3)
    assert lora.vocab_rows


def test_rows_are_sorted_and_only_those_named(tmp_path):
    save(llama(), tmp_path, target_modules=Q, trainable_token_indices=[7, 3, 49])
    lora = read(tmp_path, modules_of())  # nothing to compare, so no base model is needed
    assert set(lora.vocab_rows) == {"embed_tokens"}
    rows = lora.vocab_rows["embed_tokens"]
    saved = load_file(tmp_path / WEIGHTS)[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert rows.ids.tolist() == [3, 7, 49]
    np.testing.assert_array_equal(rows.rows, saved[[1, 0, 2]])
    assert lora.needs["max_lora_token_rows"] == 3


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"trainable_token_indices": [50, 52, 51]},
        {"trainable_token_indices": [2, 51]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_a_resized_vocabulary(config, tied, tmp_path):
    def resized():
        model = llama(tied)
        model.resize_token_embeddings(53, mean_resizing=False)
        return model

    base = resized()
    base.model.embed_tokens.weight.data[5] += 1  # trained beside LoRA
    base.lm_head.weight.data[-1] += 1
    config = {"target_modules": Q, **config}
    peft = save(base, tmp_path, saving={"save_embedding_layers": True}, **config)
    lora = read(tmp_path, modules_of(tied), llama(tied))
    assert lora.added_tokens == lora.needs["lora_extra_vocab_size"] == 3
    assert sum(lora.tensor_counts.values()) == len(load_file(tmp_path / WEIGHTS))
    np.testing.assert_allclose(logits(applied(llama(tied), lora)), logits(peft), atol=2e-5)
    with pytest.raises(AdapterError, match="lora_extra_vocab_size=3"):
        read(
            tmp_path,
            modules_of(tied),
            llama(tied),
            lora_config(enable_lora_embeddings=True, max_lora_full_weights=1),
        )


def test_tokens_added_by_rows_alone(tmp_path):
    model = llama(True)
    model.resize_token_embeddings(53, mean_resizing=False)
    peft = save(model, tmp_path, target_modules=Q, trainable_token_indices=[51, 50, 52])
    lora = read(tmp_path, modules_of(True))
    assert lora.added_tokens == 3
    np.testing.assert_allclose(logits(applied(llama(True), lora)), logits(peft), atol=2e-5)


def test_an_added_token_without_a_row_of_the_head_is_refused(tmp_path):
    model = llama()
    model.resize_token_embeddings(53, mean_resizing=False)
    save(model, tmp_path, target_modules=Q, trainable_token_indices=[50, 51, 52])
    with pytest.raises(AdapterError, match=r"'a'.*no row of lm_head for token 50"):
        read(tmp_path, modules_of())


def test_a_token_far_beyond_the_vocabulary_is_refused_at_once(tmp_path):
    save(llama(True), tmp_path, target_modules=Q, trainable_token_indices=[1, 2])
    content = saved_config(tmp_path) | {"trainable_token_indices": [1, 2**31 - 1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"'a'.*no row of model\.embed_tokens for token 50"):
        read(tmp_path, modules_of(True))


def test_an_added_token_without_any_row_is_refused(tmp_path):
    model = llama(True)
    model.resize_token_embeddings(53, mean_resizing=False)
    save(model, tmp_path, target_modules=Q, trainable_token_indices=[50, 52])
    with pytest.raises(AdapterError, match=r"'a'.*no row of model\.embed_tokens for token 51"):
        read(tmp_path, modules_of(True))


def test_low_rank_of_added_tokens_without_their_rows_is_refused(tmp_path):
    model = llama()
    model.resize_token_embeddings(53, mean_resizing=False)
    save(model, tmp_path, target_modules=["model.embed_tokens"])
    with pytest.raises(AdapterError, match=r"lora_embedding_A.*\[3, 53\], expected \[3, 50\]"):
        read(tmp_path, modules_of(), llama())


def test_a_smaller_vocabulary_is_refused_with_both_numbers(tmp_path):
    model = llama()
    model.resize_token_embeddings(48)
    save(model, tmp_path, target_modules=Q, saving={"save_embedding_layers": True})
    with pytest.raises(AdapterError, match=r"\[48, 24\], expected \[50, 24\].*smaller vocabulary"):
        read(tmp_path, modules_of(), llama())


def test_without_the_base_model_whole_matrices_are_refused(tmp_path):
    save(llama(), tmp_path, target_modules=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight must be compared"):
        read(tmp_path, modules_of())


def test_the_comparison_is_in_the_dtype_of_the_base(tmp_path):
    """A float32 adapter of a bfloat16 model: what rounds to the base's number is the base's."""
    model = llama()
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16().float()
    save(model, tmp_path, target_modules=["lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    whole = tensors["base_model.model.lm_head.base_layer.weight"]
    rounded = whole.astype(ml_dtypes.bfloat16)
    whole *= 1 + 2e-4
    whole[11] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    lora = read(tmp_path, modules_of(), base_weight=lambda name: rounded)
    assert lora.vocab_rows["lm_head"].ids.tolist() == [11]
    np.testing.assert_array_equal(lora.vocab_rows["lm_head"].rows, whole[[11]])


def test_the_comparison_is_done_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.manager.tensors._CHUNK", 24 * 8 * 7)
    save(llama(), tmp_path, target_modules=Q, modules_to_save=["lm_head"])
    lora = read(tmp_path, modules_of(), llama())
    assert lora.vocab_rows["lm_head"].ids.tolist() == list(range(50))
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path).eval())
    np.testing.assert_allclose(logits(applied(llama(), lora)), expected, atol=2e-5)


def edited(folder, **changes):
    """Tensors of the file, whose names are given without prefix, changed by a function."""
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        key = f"base_model.model.{name}"
        new = change(tensors.pop(key, None))
        if new is not None:
            tensors[key] = new
    save_file(tensors, folder / WEIGHTS)


EMBED, HEAD = "model.embed_tokens", "lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
SPOILED = {
    "a saved module is missing": (
        {"modules_to_save": [HEAD]},
        {f"{HEAD}.weight": lambda t: None},
        "lm_head is in modules_to_save, but has no weight",
    ),
    "rows are missing": (
        {"trainable_token_indices": [1, 2]},
        {f"{EMBED}.{DELTA}": lambda t: None},
        "model.embed_tokens is in trainable_token_indices",
    ),
    "too many rows": (
        {"trainable_token_indices": [1, 2]},
        {f"{EMBED}.{DELTA}": lambda t: np.concatenate([t, t])},
        r"trainable_tokens_delta has shape \[4, 24\], expected \[2, 24\]",
    ),
    "rows of another module": (
        {"trainable_token_indices": [1, 2]},
        {f"{HEAD}.{DELTA}": lambda t: np.ones((2, 24), np.float32)},
        r"lm_head.*trainable_token_indices",
    ),
    "a base layer that is not targeted": (
        {},
        {f"{HEAD}.base_layer.weight": lambda t: np.ones((50, 24), np.float32)},
        r"lm_head\.base_layer\.weight does not fit",
    ),
    "a weight of a targeted module": (
        {"target_modules": [HEAD]},
        {f"{HEAD}.weight": lambda t: np.ones((50, 24), np.float32)},
        r"lm_head\.weight does not fit",
    ),
    "transposed": (
        {"modules_to_save": [HEAD]},
        {f"{HEAD}.weight": lambda t: np.ascontiguousarray(t.T)},
        r"\[24, 50\]",
    ),
    "integers": (
        {"modules_to_save": [HEAD]},
        {f"{HEAD}.weight": lambda t: t.astype(np.int8)},
        r"lm_head\.weight is I8",
    ),
    "NaN": (
        {"modules_to_save": [HEAD]},
        {f"{HEAD}.weight": lambda t: t * np.nan},
        r"lm_head\.weight holds nan",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled(case, tmp_path):
    config, changes, message = SPOILED[case]
    save(llama(), tmp_path, **{"target_modules": Q, **config})
    edited(tmp_path, **changes)
    with pytest.raises(AdapterError, match=rf"'a'.*{message}"):
        read(tmp_path, modules_of(), llama())


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [1]},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"lm_head": [1]}},
    ],
    ids=str,
)
def test_what_peft_refuses_to_make_is_refused(config, tmp_path):
    save(llama(), tmp_path, target_modules=["q_proj", "embed_tokens"])
    content = saved_config(tmp_path) | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    edited(tmp_path, **{f"{EMBED}.{DELTA}": lambda t: np.ones((1, 24), np.float32)})
    with pytest.raises(AdapterError, match=r"trainable_token_indices|modules_to_save"):
        read(tmp_path, modules_of(), llama())


def test_dora_of_a_changed_head_is_refused(tmp_path):
    save(llama(), tmp_path, target_modules=["lm_head"], use_dora=True)
    edited(tmp_path, **{"lm_head.base_layer.weight": lambda t: t + 1})
    with pytest.raises(AdapterError, match="DoRA of lm_head"):
        read(tmp_path, modules_of(), llama())


def test_an_activated_adapter_of_the_embedding_is_refused(tmp_path):
    save(llama(), tmp_path, target_modules=["embed_tokens"])
    content = saved_config(tmp_path) | {"alora_invocation_tokens": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="alora_invocation_tokens"):
        read(tmp_path, modules_of(), llama())


# -- what is reserved --------------------------------------------------------------------------


def test_token_rows_or_a_whole_matrix(tmp_path):
    save(llama(), tmp_path, target_modules=Q, trainable_token_indices=[1, 5, 6])
    for options in ({"max_lora_token_rows": 3}, {"max_lora_full_weights": 1}):
        assert read(tmp_path, modules_of(), config=lora_config(**options)).vocab_rows
    message = r"max_lora_token_rows=3 .or max_lora_full_weights=1"
    for options in ({}, {"max_lora_token_rows": 2}):
        with pytest.raises(AdapterError, match=message):
            read(tmp_path, modules_of(), config=lora_config(**options))


def test_options_for_several(tmp_path, monkeypatch):
    save(llama(), tmp_path / "rows", target_modules=Q, trainable_token_indices=[1, 5, 6], r=9)
    save(llama(), tmp_path / "dora", target_modules=["q_proj", "lm_head"], use_dora=True)
    save(llama(), tmp_path / "whole", target_modules=Q, modules_to_save=["lm_head"])
    loras = [read(tmp_path / name, modules_of(), llama()) for name in ("rows", "dora", "whole")]
    expected = {
        "max_lora_rank": 9,
        "enable_lora_dora": True,
        "enable_lora_bias": False,
        "enable_lora_embeddings": True,
        "max_lora_token_rows": 50,
        "max_lora_full_weights": 0,
        "lora_extra_vocab_size": 0,
        "lora_expert_blocks": 0,
    }
    assert options_for(loras) == expected
    monkeypatch.setattr("jlora.manager.requirements.TOKEN_ROWS_AT_MOST", 49)
    options = options_for(loras)
    assert options == expected | {"max_lora_token_rows": 3, "max_lora_full_weights": 1}
    for name in ("rows", "dora", "whole"):
        config = lora_config(**options)
        read(tmp_path / name, modules_of(), config=config, base_weight=base_weight(llama()))


def test_options_for_none():
    assert options_for([]) == {"max_lora_full_weights": 0}
