"""Checkpoints: how they may be cut, and that one that does not fit is refused with every fault."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

from jlora.model import AXIS, load_hf_config, load_model, model_config
from jlora.model.safetensors_checkpoint import FileTensor
from jlora.model.weight_table import Weight, weight_table
from tests.reference import make_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of several shards, and its tensors."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("llama-bias", folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return folder, {name: value for file in files for name, value in load_file(file).items()}


@pytest.fixture
def tensors(original):
    return dict(original[1])


@pytest.fixture
def config(original):
    return model_config(load_hf_config(str(original[0])))


def load(config, folder, devices=1):
    mesh = jax.make_mesh(
        (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return load_model(config, str(folder), mesh, progress=False)


def leaves(loaded):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(loaded.params)]


def test_one_file_and_many_are_the_same(original, config, tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    for one, other in zip(
        leaves(load(config, original[0])), leaves(load(config, tmp_path)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_files_of_any_name_without_an_index(config, tensors, tmp_path):
    names = sorted(tensors)
    for part in range(3):
        save_file(
            {name: tensors[name] for name in names[part::3]}, tmp_path / f"x{part}.safetensors"
        )
    load(config, tmp_path)


def test_every_fault_is_listed(config, tensors, tmp_path):
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.lora_magic"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((5, 7), np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((48, 72), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load(config, tmp_path)
    for fault in (
        "missing tensor model.layers.1.mlp.up_proj.weight",
        "missing tensor model.norm.weight",
        r"unknown tensor model.layers.0.self_attn.q_proj.lora_magic [2, 3]",
        r"model.layers.0.self_attn.k_proj.weight has shape [5, 7], expected [32, 48]",
        "model.layers.0.mlp.down_proj.weight is int8",
    ):
        assert fault in str(error.value)


def test_a_layer_too_many_is_refused(config, tensors, tmp_path):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown tensor model.layers.2.mlp.up_proj.weight"):
        load(config, tmp_path)


def test_a_tensor_that_two_files_hold_is_refused(config, tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: tensors[name]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=f"{name} comes twice"):
        load(config, tmp_path)


def test_buffers_of_old_checkpoints_are_passed_over(config, tensors, tmp_path):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    load(config, tmp_path)


def tied(folder, change: float):
    """A tied model whose file holds an lm_head as well, off by change."""
    make_model("llama3.2", folder)
    config = model_config(load_hf_config(str(folder)))
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    assert "lm_head.weight" not in tensors
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(change)
    save_file(tensors, folder / "model.safetensors")
    return config


def test_lm_head_of_a_tied_model_may_repeat_the_embedding(tmp_path):
    load(tied(tmp_path, 0.0), tmp_path)


def test_lm_head_of_a_tied_model_that_differs_is_refused(tmp_path):
    """transformers would use it, untied; ignoring it would give other answers."""
    config = tied(tmp_path, 0.5)
    with pytest.raises(ValueError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        load(config, tmp_path)


def test_missing_file_of_an_index_is_named(config, tensors, tmp_path):
    save_file(tensors, tmp_path / "model-1.safetensors")
    names = dict.fromkeys(tensors, "model-1.safetensors")
    names["model.norm.weight"] = "model-2.safetensors"
    index = {"weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"no model-2.safetensors"):
        load(config, tmp_path)


def test_folder_without_weights_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        load(config, tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_broken_file_is_named(config, tensors, tmp_path, content):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"model.safetensors"):
        load(config, tmp_path)


def test_two_devices_hold_the_same_weights(original, config):
    one, two = load(config, original[0]), load(config, original[0], devices=2)
    rows = [leaf.nbytes for leaf in jax.tree.leaves(two.params)]
    assert sum(rows) == sum(leaf.nbytes for leaf in jax.tree.leaves(one.params)) + 128 * 48 * 4 * 2
    for first, second in zip(leaves(one), leaves(two), strict=True):
        if first.shape == second.shape:
            np.testing.assert_array_equal(np.sort(first, axis=None), np.sort(second, axis=None))


def test_faults_are_found_before_numbers_are_read(config, tensors, tmp_path, monkeypatch):
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(FileTensor, "__getitem__", lambda *_: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match=r"missing tensor model.norm.weight"):
        load(config, tmp_path)


def test_a_tied_head_that_differs_is_named_beside_other_faults(tmp_path):
    config = tied(tmp_path, 0.5)
    save_file({"more": np.zeros(3, np.float32)}, tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"unknown tensor more \[3\]\n.*lm_head.weight differs"):
        load(config, tmp_path)


def test_devices_read_only_what_they_hold(original, config, monkeypatch):
    """Two devices together read each number of a divided weight once."""
    read = {}
    get = FileTensor.__getitem__

    def spy(tensor, index):
        part = get(tensor, index)
        read.setdefault((tensor.path, tensor.offset), []).append(part.size / np.prod(tensor.shape))
        return part

    monkeypatch.setattr(FileTensor, "__getitem__", spy)
    load(config, original[0], devices=2)
    for parts in read.values():
        assert 1 <= sum(parts) < 1.02  # the vocabulary is padded
    assert sum(len(parts) > 1 for parts in read.values()) > len(read) / 2


@pytest.mark.parametrize("extra", [0, 40])
def test_devices_hold_the_rows_of_the_table(original, config, extra):
    """However a weight is divided and copied, each stored row is the one that the table says."""
    config = dataclasses.replace(config, extra_vocab_size=extra)
    one = load_model_leaves(config, original[0], 1)
    two = load_model_leaves(config, original[0], 2)
    assert one.keys() == two.keys()
    for weight in weight_table(config, 2):
        whole, divided = one[weight.path], two[weight.path]
        if weight.transposed:
            whole, divided = (np.swapaxes(value, -1, -2) for value in (whole, divided))
        rows = weight.rows_order
        expected = whole if rows is None else np.take(whole, rows, axis=weight.rows_axis)
        np.testing.assert_array_equal(divided, expected)


def load_model_leaves(config, folder, devices):
    flat = nnx.to_flat_state(load(config, folder, devices).params)
    return {tuple(path): np.asarray(leaf.get_value()) for path, leaf in flat}


def test_runs_of_rows_are_as_long_as_can_be():
    order = np.array([4, 5, 6, 1, 2, 9, 9, 9, 3])
    weight = Weight((), (), (10, 2), PartitionSpec(), order)
    found = list(weight.runs(slice(None)))
    assert [(run.start, run.stop) for _, run in found] == [(4, 7), (1, 3), (9, 10), (3, 4)]
    filled = np.full(len(order), -1)
    for place, run in found:
        filled[place] = np.arange(10)[run]
    np.testing.assert_array_equal(filled, order)
