"""The sum into the residual stream and its norm as a Pallas kernel for GPU (Triton backend)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jlora.kernels.lora_gpu import load, range_of
from jlora.kernels.norm import NormRule

MAX_WIDTH = 16384  # a program has a row in registers


def _add_and_norm_kernel(
    hidden_ref,  # [tokens, width]; the same memory as sum_ref
    y_ref,  # [tokens, width]
    weight_ref,  # [width]
    sum_ref,  # [tokens, width]
    normed_ref,  # [tokens, width]
    *,
    rule: NormRule,
):
    token, width = pl.program_id(0), y_ref.shape[1]
    column, in_width = range_of(width)
    hidden, y = (load(ref, token, column, mask=in_width) for ref in (hidden_ref, y_ref))
    weight = load(weight_ref, column, mask=in_width)
    # The norm is of the sum as it is stored.
    new = (hidden.astype(jnp.float32) + y.astype(jnp.float32)).astype(sum_ref.dtype)
    plgpu.store(sum_ref.at[token, column], new, mask=in_width)
    wide = new.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.sum(wide * wide) / width + rule.eps)
    if rule.in_float32:
        normed = (rule.offset + weight.astype(jnp.float32)) * wide
    else:
        normed = weight * wide.astype(weight.dtype)
    plgpu.store(normed_ref.at[token, column], normed.astype(normed_ref.dtype), mask=in_width)


def add_and_norm_gpu(
    hidden: Float[Array, "tokens width"],
    y: Float[Array, "tokens width"],
    weight: Float[Array, " width"],
    rule: NormRule,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
    """See `jlora.kernels.add_and_norm`. One program a token, of at most MAX_WIDTH columns."""
    tokens, width = y.shape
    shape = jax.ShapeDtypeStruct(y.shape, hidden.dtype)
    total, normed = pl.pallas_call(
        functools.partial(_add_and_norm_kernel, rule=rule),
        name="add_and_norm",
        grid=(tokens,),
        out_shape=(shape, shape),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 4096 else 8, num_stages=1),
        interpret=interpret,
    )(hidden, y, weight)
    return total, normed
