"""The one decoder of every family; families are flags of ModelConfig and the projection table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.config import ModelConfig
from jlora.model.adapters import TokenAdapters
from jlora.model.decoder_layer import DecoderLayer, normed_by
from jlora.model.layers import AXIS, RMSNorm, StepContext, scaled
from jlora.model.vocabulary import Embedding, LMHead, head_logits, known_tokens, stored_vocab
from jlora.projections import projection_table


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: Any, params: Any, hidden: Any, normed: Any, kv: Any, layer: Any, step: StepContext
) -> Any:
    """One layer; being a jit of its own it is traced and lowered once for all layers alike."""
    module, next_norm = nnx.merge(graph, params)
    return module(hidden, normed, kv, layer, step, next_norm)


class Decoder(nnx.Module):
    """Tokens to hidden states to logits; arrays are one device's share when it is called."""

    def __init__(self, config: ModelConfig, shards: int = 1) -> None:
        """Shapes are those of all devices together; every weight is zero until it is loaded."""
        dtype = jnp.dtype(config.dtype)
        rows = {row.name: row for row in projection_table(config)}
        vocab = stored_vocab(config, shards)
        self.config = config
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
        hidden = scaled(self.embed(tokens, step.adapters), self.config.embedding_scale)
        norms = [*(module.attention_norm for module in self.layers), self.norm]
        normed = normed_by(norms[0], hidden)
        for layer, module in enumerate(self.layers):
            graph, params = nnx.split((module, norms[layer + 1]))
            carry = (hidden, normed, kv)
            hidden, normed, kv = _run_layer(graph, params, *carry, jnp.int32(layer), step)
        return normed, kv

    def logits(
        self, hidden: Float[Array, "rows hidden"], adapters: TokenAdapters | None = None
    ) -> Float[Array, "rows vocab"]:
        """float32 logits of all devices' vocabulary; adapters: those of the rows."""
        head = self.embed if self.lm_head is None else self.lm_head
        local = head_logits(head.weight[...], hidden, adapters)
        if self.config.logits_divisor != 1:
            local = local / self.config.logits_divisor
        if self.config.logits_soft_cap is not None:
            cap = self.config.logits_soft_cap
            local = jnp.tanh(local / cap) * cap
        whole = jax.lax.all_gather(local, AXIS, axis=1, tiled=True)
        return known_tokens(whole, self.config, adapters)
