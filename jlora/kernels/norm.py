"""RMS norm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class NormRule:
    """x / sqrt(mean(x²) + eps) · (offset + weight), the mean in float32.

    in_float32: the product too; else x is rounded to its dtype before it.
    """

    eps: float
    offset: float = 0.0
    in_float32: bool = False


def rms_norm(
    x: Float[Array, "... width"],
    weight: Float[Array, " width"],
    rule: NormRule,
    axis_name: str | None = None,
) -> Float[Array, "... width"]:
    """axis_name: of a mesh, where x is one device's share of the width and the mean is over all."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    if axis_name is not None:
        mean = jax.lax.pmean(mean, axis_name)
    wide = wide * jax.lax.rsqrt(mean + rule.eps)
    if rule.in_float32:
        return ((rule.offset + weight.astype(jnp.float32)) * wide).astype(x.dtype)
    return weight * wide.astype(x.dtype)
