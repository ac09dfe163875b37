"""The turning of queries and keys by their position (Su et al. 2021)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(
    x: Float[Array, "tokens heads head_dim"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    in_float32: bool = False,
) -> Float[Array, "tokens heads head_dim"]:
    """Turns the pairs (x[i], x[i + half]); in x's dtype, as transformers does, or in float32.

    What lies behind the two halves passes unturned. The result has x's dtype.
    """
    dtype = jnp.float32 if in_float32 else x.dtype
    cos, sin = cos[:, None].astype(dtype), sin[:, None].astype(dtype)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first, second = first.astype(dtype), second.astype(dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.astype(x.dtype) for part in turned]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
