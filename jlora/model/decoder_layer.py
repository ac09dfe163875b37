"""One layer of the decoder: attention and MLP, each between its norms, added to the residual."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.kernels import LoRADelta
from jlora.model.layers import ACTIVATIONS, LoRALinear, RMSNorm, StepContext, scaled
from jlora.model.moe import MoE
from jlora.projections import Projection, layer_norms


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rows: dict[str, Projection], shards: int) -> None:
        dtype = jnp.dtype(config.dtype)
        self.gate_up = LoRALinear(rows["gate_up"], shards, dtype)
        self.down = LoRALinear(rows["down"], shards, dtype)
        self.activation = config.hidden_act

    def __call__(
        self, x: Float[Array, "tokens hidden"], layer: int | Int[Array, ""], step: StepContext
    ) -> Float[Array, "tokens hidden"]:
        y, delta = self.gate_up.with_delta(x, layer, step)
        activation, implementation = ACTIVATIONS[self.activation], step.implementation
        inner = kernels.gated(y, delta, activation, implementation=implementation)
        return self.down(inner, layer, step)


class Attention(nnx.Module):
    """Attention over the pages of each sequence, heads divided among the devices."""

    def __init__(
        self, config: ModelConfig, rows: dict[str, Projection], layer: int, shards: int
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.qkv = LoRALinear(rows["qkv"], shards, dtype)
        self.o = LoRALinear(rows["o"], shards, dtype)
        q_width, k_width, _ = self.qkv.piece_widths
        self.piece_heads = (q_width // config.head_dim, k_width // config.head_dim)
        self.head_dim, self.norm_whole = config.head_dim, config.qk_norm_whole
        widths: tuple[int | None, int | None] = (None, None)
        if config.qk_norm:
            whole = (q_width * shards, k_width * shards)
            widths = whole if self.norm_whole else (config.head_dim, config.head_dim)
        self.q_norm, self.k_norm = (
            None if width is None else RMSNorm(width, config, sharded=self.norm_whole)
            for width in widths
        )
        self.clip, self.rope_in_float32 = config.clip_qkv, config.rope_in_float32
        self.window = config.sliding_windows[layer] if config.sliding_windows else None
        self.rope = 1 if self.window and config.sliding_rope is not None else 0
        scale, self.soft_cap = config.attention_scale, config.attention_soft_cap
        self.scale = config.head_dim**-0.5 if scale is None else scale

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        kv: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
        layer: int | Int[Array, ""],
        step: StepContext,
    ) -> tuple[Array, Array]:
        """Writes the tokens' keys and values, then attends; -> [tokens, hidden], kv."""
        qkv, delta = self.heads(x, layer, step)
        first_page, (cos, sin) = layer * step.pages_per_layer, step.ropes[self.rope]
        q, kv = kernels.rope_and_write_kv(
            qkv,
            delta,
            cos,
            sin,
            kv,
            step.destinations,
            first_page,
            heads=self.piece_heads[0],
            kv_heads=self.piece_heads[1],
            in_float32=self.rope_in_float32,
            implementation=step.implementation,
        )
        attended = kernels.ragged_paged_attention(
            q,
            kv,
            step.kv_lens,
            step.page_indices + first_page,
            step.cu_q_lens,
            step.num_seqs,
            kv_heads=self.piece_heads[1],
            sm_scale=self.scale,
            sliding_window=self.window,
            soft_cap=self.soft_cap,
            implementation=step.implementation,
        )
        return self.o(attended.reshape(attended.shape[0], -1), layer, step), kv

    def heads(
        self, x: Array, layer: Any, step: StepContext
    ) -> tuple[Float[Array, "tokens width"], LoRADelta | None]:
        """Queries, keys and values of this device's heads side by side, normed and clipped.

        And what the adapters have still to add, where there is neither norm nor clip.
        """
        if self.q_norm is None and self.clip is None:
            return self.qkv.with_delta(x, layer, step)
        q_width, k_width, _ = self.qkv.piece_widths
        q, k, v = jnp.split(self.qkv(x, layer, step), [q_width, q_width + k_width], axis=-1)
        if self.norm_whole:
            q, k = self.norm(q, k)
        if self.clip is not None:
            q, k, v = (jnp.clip(part, -self.clip, self.clip) for part in (q, k, v))
        if not self.norm_whole:
            by_head = (part.reshape(part.shape[0], -1, self.head_dim) for part in (q, k))
            q, k = (part.reshape(part.shape[0], -1) for part in self.norm(*by_head))
        return jnp.concatenate([q, k, v], axis=-1), None

    def norm(self, q: Array, k: Array) -> tuple[Array, Array]:
        """The norms of q and k, in the families that have them."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each between its norms and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, rows: dict[str, Projection], layer: int, shards: int
    ) -> None:
        norms = {place: RMSNorm(config.hidden_size, config) for place in layer_norms(config)}
        self.attention_norm, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm = (
            norms.get(place) for place in ("attention", "attention_out", "mlp", "mlp_out")
        )
        self.attention = Attention(config, rows, layer, shards)
        self.mlp = (MoE if config.num_experts else GatedMLP)(config, rows, shards)
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        hidden: Float[Array, "tokens hidden"],
        normed: Float[Array, "tokens hidden"],
        kv: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
        layer: int | Int[Array, ""],
        step: StepContext,
        next_norm: RMSNorm | None,
    ) -> tuple[Array, Array, Array]:
        """-> hidden, its norm by `next_norm`, kv.

        normed: hidden after the layer's own first norm. A norm follows the sum that it is of, and
        that of the last sum is the next layer's. The layer's pages are `pages_per_layer` after
        those of the last.
        """
        out, kv = self.attention(normed, kv, layer, step)
        hidden, normed = self.add(hidden, out, self.attention_out_norm, self.mlp_norm, step)
        out = self.mlp(normed, layer, step)
        return *self.add(hidden, out, self.mlp_out_norm, next_norm, step), kv

    def add(
        self,
        hidden: Array,
        out: Array,
        out_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
        step: StepContext,
    ) -> tuple[Array, Array]:
        """hidden plus what changes it, and the next norm of that."""
        if out_norm is None and next_norm is not None and self.residual_scale == 1:
            arrays = (hidden, out, next_norm.weight[...], next_norm.rule)
            return kernels.add_and_norm(*arrays, implementation=step.implementation)
        hidden = hidden + scaled(normed_by(out_norm, out), self.residual_scale)
        return hidden, normed_by(next_norm, hidden)


def normed_by(norm: RMSNorm | None, x: Array) -> Array:
    """x itself where there is no norm."""
    return x if norm is None else norm(x)
