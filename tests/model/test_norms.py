"""The norms of the families in bfloat16, bit by bit, and the one that is over all devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, PartitionSpec
from transformers import Gemma2Config, LlamaConfig, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from jlora.model import model_config
from jlora.model.layers import AXIS, RMSNorm, scaled

WIDTH = 96


@pytest.mark.parametrize(
    ("norm", "hf"),
    [
        (LlamaRMSNorm, LlamaConfig()),
        (Gemma2RMSNorm, Gemma2Config()),
        (Olmo2RMSNorm, Olmo2Config()),
    ],
)
def test_norms_round_where_transformers_does(norm, hf):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(40, WIDTH)), rng.normal(size=WIDTH)
    theirs = norm(WIDTH, eps=1e-6).to(torch.bfloat16)
    theirs.weight.data = torch.tensor(weight).to(torch.bfloat16)
    expected = theirs(torch.tensor(x).to(torch.bfloat16)).float().detach().numpy()
    hf.rms_norm_eps = 1e-6
    ours = RMSNorm(WIDTH, model_config(hf, "bfloat16"))
    ours.weight[...] = jnp.asarray(weight, jnp.bfloat16)
    found = ours(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32)
    assert np.mean(np.asarray(found) == expected) > 0.99  # but for the last bit of a mean
    np.testing.assert_allclose(found, expected, rtol=2**-7)


def test_a_norm_over_heads_that_lie_on_two_devices():
    """Keys of one head are on both of them, and count once."""
    rng = np.random.default_rng(1)
    config = model_config(LlamaConfig())
    whole = RMSNorm(WIDTH, config)
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    divided = PartitionSpec(None, AXIS)

    def local(x):
        return RMSNorm(x.shape[-1], config, sharded=True)(x)

    both = jax.shard_map(local, mesh=mesh, in_specs=divided, out_specs=divided, check_vma=False)
    x = jnp.asarray(rng.normal(size=(5, WIDTH)), jnp.float32)
    np.testing.assert_allclose(both(x), whole(x), atol=1e-6)
    copied = both(jnp.concatenate([x, x], axis=1))
    np.testing.assert_allclose(copied[:, :WIDTH], whole(x), atol=1e-6)


def test_a_factor_is_not_rounded_before_it_multiplies():
    x = np.random.default_rng(2).normal(size=1000)
    expected = (torch.tensor(x).to(torch.bfloat16) * 0.2201).float().numpy()
    np.testing.assert_array_equal(scaled(jnp.asarray(x, jnp.bfloat16), 0.2201), expected)
