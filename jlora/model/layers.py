"""The layers of the decoder. Everything here runs on one device's share of the arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.kernels import Implementation
from jlora.model.adapters import TokenAdapters
from jlora.model.rope import apply_rope
from jlora.projections import Projection

AXIS = "model"  # of the mesh, over which a model is divided

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
        "cos",
        "sin",
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

    cos: Float[Array, "tokens half"]
    sin: Float[Array, "tokens half"]
    destinations: Int[Array, " tokens"]  # of the KV, as if there were one layer
    kv_lens: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]
    cu_q_lens: Int[Array, " seqs_1"]
    num_seqs: Int[Array, "1"]
    pages_per_layer: int
    implementation: Implementation
    adapters: TokenAdapters | None = None  # None: nobody in this step has one


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, the mean in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * (wide * scale).astype(x.dtype)


class LoRALinear(nnx.Module):
    """One row of the projection table: base weight, bias, and the adapters of each token."""

    def __init__(self, row: Projection, shards: int, dtype: jnp.dtype) -> None:
        width = row.stored_width(shards)
        self.weight = nnx.Param(jnp.zeros((row.d_in, width), dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if row.bias else None
        self.name, self.sums = row.name, row.shard == "in"
        self.part_widths = row.local_widths(shards)
        self.piece_widths = row.local_pieces(shards)

    def __call__(
        self, x: Float[Array, "tokens d_in"], layer: int | Int[Array, ""], step: StepContext
    ) -> Float[Array, "tokens d_out"]:
        weight = self.weight[...]
        y = jnp.dot(x, weight, precision=kernels.dot_precision(x.dtype))
        adapters = step.adapters
        if adapters is None:
            y = jax.lax.psum(y, AXIS) if self.sums else y
            return y if self.bias is None else y + self.bias[...]
        row = adapters.state.rows[self.name]
        y = adapters.add_delta(y, x, row, layer, self.part_widths)
        if self.sums:  # the adapter's partial sums ride on the base's own all-reduce
            y = jax.lax.psum(y, AXIS)
        y = adapters.rescale(y, row, layer)
        y = y if self.bias is None else y + self.bias[...]
        return adapters.add_bias(y, row, layer)


class DecoderLayer(nnx.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, rows: dict[str, Projection], layer: int, shards: int
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        norm = functools.partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        self.input_norm = norm(config.hidden_size)
        self.qkv = LoRALinear(rows["qkv"], shards, dtype)
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.o = LoRALinear(rows["o"], shards, dtype)
        self.post_norm = norm(config.hidden_size)
        self.gate_up = LoRALinear(rows["gate_up"], shards, dtype)
        self.down = LoRALinear(rows["down"], shards, dtype)
        self.head_dim, self.activation = config.head_dim, config.hidden_act
        self.window = config.sliding_windows[layer] if config.sliding_windows else None

    def __call__(
        self,
        hidden: Float[Array, "tokens hidden"],
        kv: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
        layer: int | Int[Array, ""],
        step: StepContext,
    ) -> tuple[Array, Array]:
        """-> hidden, kv; the layer's pages are `pages_per_layer` after those of the last."""
        attended, kv = self.attention(self.input_norm(hidden), kv, layer, step)
        hidden = hidden + attended
        gate_up = self.gate_up(self.post_norm(hidden), layer, step)
        gate, up = jnp.split(gate_up, [self.gate_up.part_widths[0]], axis=-1)
        return hidden + self.down(ACTIVATIONS[self.activation](gate) * up, layer, step), kv

    def attention(self, x: Array, kv: Array, layer: Any, step: StepContext) -> tuple[Array, Array]:
        """Writes the tokens' keys and values, then attends; -> [tokens, hidden], kv."""
        widths = self.qkv.part_widths
        qkv = jnp.split(self.qkv(x, layer, step), [widths[0], widths[0] + widths[1]], axis=-1)
        q, k, v = (part.reshape(part.shape[0], -1, self.head_dim) for part in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, step.cos, step.sin), apply_rope(k, step.cos, step.sin)
        page_size, first_page = kv.shape[1], layer * step.pages_per_layer
        destinations = jnp.where(
            step.destinations < 0, -1, step.destinations + first_page * page_size
        )
        kv = kernels.write_kv(kv, k, v, destinations, implementation=step.implementation)
        attended = kernels.ragged_paged_attention(
            q,
            kv,
            step.kv_lens,
            step.page_indices + first_page,
            step.cu_q_lens,
            step.num_seqs,
            kv_heads=k.shape[1],
            sm_scale=self.head_dim**-0.5,
            sliding_window=self.window,
            implementation=step.implementation,
        )
        return self.o(attended.reshape(attended.shape[0], -1), layer, step), kv
