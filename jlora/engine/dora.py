"""The norms that DoRA divides by, from what the pool holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.kernels import dot_precision
from jlora.model import AXIS, RowPool


def merged_norms(
    weight: Float[Array, "d_in d_out"],
    a: Float[Array, "blocks parts rank d_in"],
    b: Float[Array, "blocks rank d_out"],
    part_widths: tuple[int, ...],
    sums: bool,
) -> Float[Array, " d_out"]:
    """float32 norm over the input of weight + (B A)ᵀ, with one device's share of each.

    ‖w + BA‖² = ‖w‖² + 2 w·BA + B (A Aᵀ) Bᵀ for each output: W + BA itself is never made. b holds
    the scale already. part_widths: columns of each part, which has its own A. sums: whether the
    devices share the input, so that the squares must be added up.
    """
    precision = dot_precision(jnp.float32)
    squares, start = [], 0
    for part, width in enumerate(part_widths):
        w = weight[:, start : start + width]
        low = a[:, part].reshape(-1, a.shape[3])  # [blocks * rank, d_in]
        high = b[:, :, start : start + width].reshape(-1, width).astype(jnp.float32)
        cross = jnp.dot(
            low.astype(w.dtype), w, precision=precision, preferred_element_type=jnp.float32
        )
        wide = low.astype(jnp.float32)
        own = jnp.dot(wide, wide.T, precision=precision)
        square = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)
        if sums:
            square, cross, own = jax.lax.psum((square, cross, own), AXIS)
        product = jnp.dot(own, high, precision=precision)
        squares.append(square + jnp.sum(high * (2 * cross + product), axis=0))
        start += width
    return jnp.sqrt(jnp.maximum(jnp.concatenate(squares), 0.0))


def slot_blocks(
    row: RowPool, layer: Int[Array, ""], slot: Int[Array, ""]
) -> tuple[Float[Array, "blocks parts rank d_in"], Float[Array, "blocks rank d_out"]]:
    """A and B of the blocks that a slot lists in a layer, zero past the last."""
    blocks = row.slots.blocks[slot]
    used = jnp.arange(blocks.shape[0]) < row.slots.counts[slot]
    a = jnp.where(used[:, None, None, None], row.a[layer, blocks], 0)
    return a, jnp.where(used[:, None, None], row.b[layer, blocks], 0)


def magnitude_factor(
    magnitude: Float[Array, " d_out"], norms: Float[Array, " d_out"]
) -> Float[Array, " d_out"]:
    """m of jlora.model.adapters: magnitude / norm, 1 where the module has no magnitude (NaN)."""
    return jnp.where(jnp.isnan(magnitude), 1.0, magnitude / norms)
