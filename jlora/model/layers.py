"""The layers of the decoder. Everything here runs on one device's share of the arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.kernels import Implementation, LoRADelta, NormRule
from jlora.model.adapters import AXIS, TokenAdapters, add_delta
from jlora.projections import Projection

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "ropes",
        "destinations",
        "kv_lens",
        "page_indices",
        "cu_q_lens",
        "num_seqs",
        "adapters",
    ],
    meta_fields=["pages_per_layer", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class StepContext:
    """What the layers need to know of the tokens of a step; built inside the jitted step."""

    ropes: tuple[tuple[Array, Array], ...]  # cos, sin [tokens, half] of each of ModelConfig.ropes
    destinations: Int[Array, " tokens"]  # of the KV, as if there were one layer
    kv_lens: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]
    cu_q_lens: Int[Array, " seqs_1"]
    num_seqs: Int[Array, "1"]
    pages_per_layer: int
    implementation: Implementation
    adapters: TokenAdapters | None = None  # None: nobody in this step has one


class RMSNorm(nnx.Module):
    """`kernels.rms_norm` with its weight.

    sharded: x is one device's share of the width (some of it may be on several devices, all of it
    equally often), and the mean is over all devices.
    """

    def __init__(self, width: int, config: ModelConfig, sharded: bool = False) -> None:
        self.weight = nnx.Param(jnp.ones(width, jnp.dtype(config.dtype)))
        self.rule = NormRule(config.rms_norm_eps, config.norm_offset, config.norm_in_float32)
        self.axis_name = AXIS if sharded else None

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return kernels.rms_norm(x, self.weight[...], self.rule, self.axis_name)


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """x * factor in x's dtype, the factor itself unrounded (as torch multiplies by a number)."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class LoRALinear(nnx.Module):
    """One row of the projection table: base weight, bias, and the adapters of each token."""

    def __init__(self, row: Projection, shards: int, dtype: jnp.dtype) -> None:
        width = row.stored_width(shards)
        self.weight = nnx.Param(jnp.zeros((row.d_in, width), dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if row.bias else None
        self.name, self.divided = row.name, row.shard != "none" and shards > 1
        self.sums = row.shard == "in" and shards > 1
        self.part_widths = row.local_widths(shards)
        self.piece_widths = row.local_pieces(shards)

    def __call__(
        self, x: Float[Array, "tokens d_in"], layer: int | Int[Array, ""], step: StepContext
    ) -> Float[Array, "tokens d_out"]:
        y, delta = self.with_delta(x, layer, step)
        if delta is None:
            return y
        return add_delta(y, delta, self.part_widths, step.implementation)

    def with_delta(
        self, x: Float[Array, "tokens d_in"], layer: int | Int[Array, ""], step: StepContext
    ) -> tuple[Float[Array, "tokens d_out"], LoRADelta | None]:
        """The output, and what the adapters have still to add to it; None: it is whole."""
        y = jnp.dot(x, self.weight[...], precision=kernels.dot_precision(x.dtype))
        adapters = step.adapters
        if adapters is None:
            return self.add_bias(jax.lax.psum(y, AXIS) if self.sums else y), None
        row = adapters.state.rows[self.name]
        delta = adapters.delta(x, row, layer, self.divided)
        if not self.sums and row.magnitude is None and row.bias is None:
            return self.add_bias(y), delta
        y = add_delta(y, delta, self.part_widths, step.implementation)
        if self.sums:  # the adapter's partial sums ride on the base's own all-reduce
            y = jax.lax.psum(y, AXIS)
        y = self.add_bias(adapters.rescale(y, row, layer))
        return adapters.add_bias(y, row, layer), None

    def add_bias(self, y: Float[Array, "tokens d_out"]) -> Float[Array, "tokens d_out"]:
        """y plus the base's bias."""
        return y if self.bias is None else y + self.bias[...]
