"""Router and experts by hand, and the names that Mixtral's checkpoints have."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from jlora.engine.memory import step_bytes
from jlora.model import load_hf_config, load_model, model_config
from jlora.model.layers import AXIS
from jlora.model.moe import combine, route, sort_rows
from jlora.projections import ModuleMap, check_shards
from tests.reference import make_model


def test_weights_and_choices_are_those_of_transformers():
    logits = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    router = MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=8))
    router.weight.data = torch.eye(8)
    _, theirs, chosen = router(torch.tensor(logits))
    weights, experts = route(jnp.asarray(logits), 2, normalise=True)
    np.testing.assert_array_equal(experts, chosen.numpy())
    np.testing.assert_allclose(weights, theirs.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, atol=1e-6)


def test_without_normalising_the_weights_are_those_of_the_whole_softmax():
    logits = jnp.asarray([[0.0, 1.0, 2.0, -1.0]], jnp.bfloat16)
    weights, experts = route(logits, 2, normalise=False)
    assert experts.tolist() == [[2, 1]]
    assert weights.dtype == jnp.float32
    whole = np.asarray(jax.nn.softmax(logits[0].astype(jnp.float32)))
    np.testing.assert_allclose(weights[0], whole[[2, 1]], rtol=1e-6)


def test_rows_are_sorted_by_expert_and_summed_where_they_came_from():
    rng = np.random.default_rng(1)
    tokens, choices, experts = 13, 3, 6
    chosen = np.stack([rng.permutation(experts - 1)[:choices] for _ in range(tokens)])
    rows = sort_rows(jnp.asarray(chosen, jnp.int32), experts, None)
    found = chosen.reshape(-1)[np.asarray(rows.order)]
    assert found.tolist() == sorted(chosen.reshape(-1).tolist())
    assert rows.group_sizes.tolist() == np.bincount(chosen.reshape(-1), minlength=experts).tolist()
    assert rows.group_sizes[-1] == 0
    assert (np.diff(np.asarray(rows.token))[np.diff(found) == 0] > 0).all()
    out, weights = rng.normal(size=(tokens * choices, 4)), rng.normal(size=(tokens, choices))
    expected = np.zeros((tokens, 4))
    for row, place in enumerate(np.asarray(rows.order)):
        expected[place // choices] += out[row] * weights[place // choices, place % choices]
    summed = combine(jnp.asarray(out, jnp.float32), rows, jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(summed, expected, atol=1e-5)


def leaves(config, folder):
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.tree.leaves(load_model(config, str(folder), mesh, progress=False).params)


def test_mixtrals_own_names_and_everybodys_are_the_same(tmp_path):
    make_model("mixtral", tmp_path)
    config = model_config(load_hf_config(str(tmp_path)))
    tensors = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in tensors
    own = leaves(config, tmp_path)
    for ours, theirs in (
        ("mlp", "block_sparse_moe"),
        ("gate_proj.weight", "w1.weight"),
        ("down_proj.weight", "w2.weight"),
        ("up_proj.weight", "w3.weight"),
    ):
        tensors = {name.replace(theirs, ours): value for name, value in tensors.items()}
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    save_file(tensors, renamed / "model.safetensors")
    for one, other in zip(own, leaves(config, renamed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_expert_that_is_missing_is_named(tmp_path):
    make_model("qwen3-moe", tmp_path)
    config = model_config(load_hf_config(str(tmp_path)))
    tensors = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file({k: v for k, v in tensors.items() if k != name}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing tensor {name}"):
        leaves(config, broken)


def test_sizes_that_count_are_those_of_the_experts():
    hf = MixtralConfig(num_hidden_layers=1, intermediate_size=100, num_experts_per_tok=2)
    config = model_config(hf)
    modules = ModuleMap(config)
    place = modules.place("model.layers.0.mlp.experts.7.down_proj")
    assert place is not None
    assert (place.projection.name, place.expert, place.d_in) == ("experts_down", 7, 100)
    assert modules.place("model.layers.0.mlp.gate").projection.shard == "none"
    with pytest.raises(ValueError, match="moe_intermediate_size=100; enable_expert_parallel=True"):
        check_shards(config, 8)
    check_shards(dataclasses.replace(config, expert_parallel=True), 8)  # of eight experts
    with pytest.raises(ValueError, match="tensor_parallel_size=16 does not divide num_experts=8"):
        check_shards(dataclasses.replace(config, expert_parallel=True), 16)
    dense = dataclasses.replace(config, num_experts=0, expert_parallel=True)
    with pytest.raises(ValueError, match="=True, but the model has no experts"):
        check_shards(dense, 2)
    more = model_config(MixtralConfig(**{**hf.to_dict(), "num_experts_per_tok": 4}))
    fixed = step_bytes(config, 0, 8, 1)
    rows = step_bytes(config, 512, 8, 1) - fixed
    assert 1.9 * rows < step_bytes(more, 512, 8, 1) - fixed + 512 * 6 * 4096 * 4 <= 2.1 * rows
