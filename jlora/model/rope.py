"""Rotary position embedding (Su et al. 2021) with the scalings that transformers knows.

The frequencies are those of `transformers`' rope types: linear (position interpolation), dynamic
(NTK-aware, grows with the sequence), yarn (Peng et al. 2023), longrope (Ding et al. 2024) and
llama3 (the piecewise scaling of Llama 3.1).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[np.ndarray, float]:
    """float32 [rotary_dim / 2] radians a position, and what cos and sin are multiplied by.

    For longrope and dynamic these are the frequencies of short sequences.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    match rope.type:
        case "linear":
            return plain / np.float32(rope.get("factor")), 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, rotary_dim, plain)
        case "longrope":
            short = np.asarray(rope.get("short_factor"), np.float32)
            return plain / short, _longrope_attention(rope)
        case _:
            return plain, 1.0


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    factor, context = rope.get("factor"), rope.get("original_max_position_embeddings")
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    turns = context / (2 * math.pi / plain)  # in the original context
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(turns < low, plain / factor, np.where(turns > high, plain, blended))
    return scaled.astype(np.float32)


def _yarn(rope: RopeConfig, rotary_dim: int, plain: np.ndarray) -> tuple[np.ndarray, float]:
    context = rope.get("original_max_position_embeddings", rope.max_position_embeddings)
    factor = rope.get("factor", rope.max_position_embeddings / context)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        mscale, every = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(every) if mscale and every else magnitude(1.0)

    def dimension(turns: float) -> float:
        """The dimension that makes `turns` turns in the original context."""
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(rope.get("beta_fast") or 32)
    high = dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32), float(attention)


def _longrope_attention(rope: RopeConfig) -> float:
    context = rope.get("original_max_position_embeddings")
    factor = rope.get("factor", rope.max_position_embeddings / context)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return rope.get("attention_factor", default)


def rope_cos_sin(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, " tokens"],
    lengths: Int[Array, " tokens"],
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosines and sines of each token's position, float32; half of the dimensions that turn.

    lengths: of the sequence when the token was first computed (the prompt's length for its
    tokens, position + 1 after it), on which dynamic and longrope depend.
    """
    rotary_dim = rope.rotary_dim(head_dim)
    short, attention = inverse_frequencies(rope, rotary_dim)
    frequencies = jnp.asarray(short)[None]
    limit = rope.length_dependent_from
    if limit is not None:
        is_long = (lengths > limit)[:, None]
        frequencies = jnp.where(is_long, _long_frequencies(rope, rotary_dim, lengths), frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [tokens, half]
    return jnp.cos(angles) * attention, jnp.sin(angles) * attention


def _long_frequencies(rope: RopeConfig, rotary_dim: int, lengths: Array) -> Array:
    exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    if rope.type == "longrope":
        factors = jnp.asarray(rope.get("long_factor"), jnp.float32)
        return (1.0 / (factors * rope.theta**exponent))[None]
    factor, limit = rope.get("factor"), rope.max_position_embeddings
    growth = factor * lengths.astype(jnp.float32) / limit - (factor - 1)
    base = rope.theta * growth ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / (base[:, None] ** exponent[None])
