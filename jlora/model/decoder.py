"""The one decoder of every family; families are flags of ModelConfig and the projection table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.model.decoder_layer import DecoderLayer
from jlora.model.layers import AXIS, RMSNorm, StepContext, scaled
from jlora.projections import projection_table


class Embedding(nnx.Module):
    """Token embeddings, the vocabulary divided among the devices."""

    def __init__(self, vocab: int, width: int, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens width"]:
        weight = self.weight[...]  # [vocab / devices, width]
        local = tokens - jax.lax.axis_index(AXIS) * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        rows = weight[jnp.where(mine, local, 0)]
        return jax.lax.psum(jnp.where(mine[:, None], rows, 0), AXIS)


class LMHead(nnx.Module):
    """An output matrix of its own (untied)."""

    def __init__(self, vocab: int, width: int, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))


def stored_vocab(vocab_size: int, shards: int) -> int:
    """Vocabulary rows, padded so that every device has as many."""
    return -(-vocab_size // shards) * shards


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: Any, params: Any, hidden: Any, kv: Any, layer: Any, step: StepContext) -> Any:
    """One layer; being a jit of its own it is traced and lowered once for all layers alike."""
    return nnx.merge(graph, params)(hidden, kv, layer, step)


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; arrays are one device's share when it is called."""

    def __init__(self, config: ModelConfig, shards: int = 1) -> None:
        """Shapes are those of all devices together; every weight is zero until it is loaded."""
        dtype = jnp.dtype(config.dtype)
        rows = {row.name: row for row in projection_table(config)}
        vocab = stored_vocab(config.vocab_size, shards)
        self.vocab_size, self.embedding_scale = config.vocab_size, config.embedding_scale
        self.logits_divisor, self.logits_soft_cap = config.logits_divisor, config.logits_soft_cap
        self.embed = Embedding(vocab, config.hidden_size, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, rows, layer, shards) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else LMHead(vocab, config.hidden_size, dtype)

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        kv: Float[Array, "pages page_size kv_heads_2 kv_head_dim"],
        step: StepContext,
    ) -> tuple[Float[Array, "tokens hidden"], Array]:
        """-> the hidden states after the last norm, and kv with the tokens' keys and values."""
        hidden = scaled(self.embed(tokens), self.embedding_scale)
        for layer, module in enumerate(self.layers):
            graph, params = nnx.split(module)
            hidden, kv = _run_layer(graph, params, hidden, kv, jnp.int32(layer), step)
        return self.norm(hidden), kv

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float[Array, "rows vocab"]:
        """float32 logits of all devices' vocabulary."""
        head = self.embed if self.lm_head is None else self.lm_head
        weight = head.weight[...]
        local = jax.lax.dot_general(
            hidden,
            weight,
            (((1,), (1,)), ((), ())),
            precision=kernels.dot_precision(weight.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.logits_divisor != 1:
            local = local / self.logits_divisor
        if self.logits_soft_cap is not None:
            local = jnp.tanh(local / self.logits_soft_cap) * self.logits_soft_cap
        whole = jax.lax.all_gather(local, AXIS, axis=1, tiled=True)
        return whole[:, : self.vocab_size]
