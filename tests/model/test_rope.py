"""Cosines and sines of every rope type against transformers' LlamaRotaryEmbedding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_apply

from jlora.kernels import apply_rope
from jlora.model import model_config, rope_cos_sin

CONTEXT = 96  # max_position_embeddings; longrope, yarn and llama3 start from ORIGINAL
ORIGINAL = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn, its factor below 1": {**YARN, "factor": 0.5},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 0.7},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.7},
    "yarn, betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, null options": {**YARN, "mscale": None, "attention_factor": None, "beta_fast": None},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL},
    "longrope, factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": ORIGINAL,
        "factor": 8.0,
    },
    "longrope, attention_factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.4,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def llama(parameters: dict, head_dim: int, theta: float = 10000.0) -> LlamaConfig:
    parameters = {"rope_theta": theta, **parameters}
    if parameters["rope_type"] == "longrope":
        half = np.arange(head_dim // 2)
        parameters["short_factor"] = (1 + 0.02 * half).tolist()
        parameters["long_factor"] = (1.5 + 0.3 * half).tolist()
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters=parameters,
    )


LENGTHS = (1, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 300)


def both(config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [2, tokens, head_dim] of prompts of LENGTHS: transformers' and ours."""
    rotaries = [LlamaRotaryEmbedding(config) for _ in LENGTHS]  # they remember lengths
    expected = [
        torch.stack(rotary(torch.zeros(1), torch.arange(length)[None]))[:, 0]
        for rotary, length in zip(rotaries, LENGTHS, strict=True)
    ]
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
    lengths = np.repeat(LENGTHS, LENGTHS).astype(np.int32)
    rope = model_config(config).rope
    found = np.asarray(
        rope_cos_sin(rope, config.head_dim, jnp.asarray(positions), jnp.asarray(lengths))
    )
    return torch.cat(expected, dim=1).numpy(), np.concatenate([found, found], axis=-1)


@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_below_and_above_the_limits(kind, head_dim):
    expected, found = both(llama(KINDS[kind], head_dim))
    # float32 angles of some hundred radians differ in their last bits.
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("theta", [10000, 500000.0])
def test_theta(theta):
    expected, found = both(llama(KINDS["default"], 80, theta))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tokens_after_the_prompt_are_rotated_by_their_own_length(kind):
    """A cache: each generated token comes in a forward of its own, the limit in between."""
    config = llama(KINDS[kind], 16)
    rotary, rope = LlamaRotaryEmbedding(config), model_config(config).rope
    rotary(torch.zeros(1), torch.arange(60)[None])
    positions = jnp.arange(60, 130, dtype=jnp.int32)
    cos, sin = rope_cos_sin(rope, 16, positions, positions + 1)
    for index, position in enumerate(positions.tolist()):
        expected = rotary(torch.zeros(1), torch.tensor([[position]]))
        np.testing.assert_allclose(cos[index], expected[0][0, 0, :8].numpy(), atol=1e-4)
        np.testing.assert_allclose(sin[index], expected[1][0, 0, :8].numpy(), atol=1e-4)


def test_apply_rope_turns_the_pairs_that_transformers_turns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 3, 16)).astype(np.float32)
    cos, sin = rng.normal(size=(2, 9, 8)).astype(np.float32)
    theirs, _ = apply_rotary_pos_emb(
        torch.tensor(x),
        torch.tensor(x),
        *(torch.tensor(np.concatenate([one, one], axis=-1)) for one in (cos, sin)),
        unsqueeze_dim=1,
    )
    ours = apply_rope(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "longrope"])
def test_a_part_of_the_head_turns(kind):
    """Phi-3's: the frequencies are those of the part, what is behind it stays."""
    parameters = {**KINDS[kind], "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    if kind == "longrope":
        parameters |= {"short_factor": [1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0]}
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    config = Phi3Config(
        **sizes, rope_parameters=parameters, original_max_position_embeddings=ORIGINAL
    )
    x = np.random.default_rng(0).normal(size=(CONTEXT, 3, 8)).astype(np.float32)
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(CONTEXT)[None])
    q = torch.tensor(x).swapaxes(0, 1)[None]
    expected = phi3_apply(q, q, cos, sin)[0][0].swapaxes(0, 1)
    positions = jnp.arange(CONTEXT, dtype=jnp.int32)
    ours = rope_cos_sin(model_config(config).rope, 8, positions, jnp.full_like(positions, CONTEXT))
    assert ours[0].shape == (CONTEXT, 3)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), *ours), expected, atol=1e-4)


# -- refusals ----------------------------------------------------------------------------------


def test_unknown_rope_type_is_refused_by_name():
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type 'spiral' is not supported"):
        model_config(config)


def test_partial_rotation_is_refused_by_name():
    config = llama({"rope_type": "default", "partial_rotary_factor": 0.5}, 16)
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        model_config(config)


def test_rope_that_differs_between_layers_is_refused_by_name():
    config = LlamaConfig()
    config.rope_parameters = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(ValueError, match="full_attention"):
        model_config(config)
