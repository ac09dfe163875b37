"""The two ends of the model: token embeddings and the output matrix, with adapters of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.model.adapters import TokenAdapters, TokenRows
from jlora.model.layers import AXIS
from jlora.projections import EMBED, HEAD, Feature, vocab_projections

OWN_ROWS_AT_ONCE = 1 << 24  # numbers of adapters' own rows that are gathered for logits at once


def stored_vocab(config: ModelConfig, shards: int) -> int:
    """Vocabulary rows, those that adapters may add too, padded so that every device has as many."""
    return vocab_projections(config, config.total_vocab)[1].stored_width(shards)


class Embedding(nnx.Module):
    """Token embeddings, the vocabulary divided among the devices."""

    def __init__(self, vocab: int, width: int, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))

    def __call__(
        self, tokens: Int[Array, " tokens"], adapters: TokenAdapters | None
    ) -> Float[Array, "tokens width"]:
        weight = self.weight[...]  # [vocab / devices, width]
        local = tokens - jax.lax.axis_index(AXIS) * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        local = jnp.where(mine, local, 0)
        rows = weight[local]
        full = None if adapters is None else adapters.state.full.get(EMBED)
        if adapters is not None and full is not None:
            which = adapters.feature(Feature.FULL_EMBED)
            own = full.reshape(-1, full.shape[2])[jnp.maximum(which, 0) * full.shape[1] + local]
            rows = jnp.where((which >= 0)[:, None], own.astype(rows.dtype), rows)
        rows = jax.lax.psum(jnp.where(mine[:, None], rows, 0), AXIS)
        return rows if adapters is None else _adapt_embeddings(rows, tokens, adapters)


def _adapt_embeddings(
    rows: Float[Array, "tokens width"], tokens: Int[Array, " tokens"], adapters: TokenAdapters
) -> Float[Array, "tokens width"]:
    """Rows of the adapters' own, then their low-rank part."""
    state = adapters.state
    if EMBED in state.token_rows:
        own, slot = state.token_rows[EMBED], adapters.feature(Feature.EMBED_ROWS)
        match = own.ids[slot] == tokens[:, None]  # [tokens, rows]
        at = slot * own.ids.shape[1] + jnp.argmax(match, axis=1)
        found = own.rows.reshape(-1, own.rows.shape[2])[at].astype(rows.dtype)
        rows = jnp.where(jnp.any(match, axis=1)[:, None], found, rows)
    if EMBED in state.rows:
        row = state.rows[EMBED]
        h = kernels.lora_embedding_shrink(tokens, row.a, adapters.routing, row.slots)
        delta = kernels.LoRADelta(h, row.b, 0, adapters.routing, row.slots)
        widths, implementation = (rows.shape[1],), adapters.implementation
        rows = kernels.lora_expand(rows, delta, widths, implementation=implementation)
        rows = adapters.rescale(rows, row, 0)
    return rows


class LMHead(nnx.Module):
    """An output matrix of its own (untied)."""

    def __init__(self, vocab: int, width: int, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))


def head_logits(
    weight: Float[Array, "vocab width"],
    hidden: Float[Array, "rows width"],
    adapters: TokenAdapters | None,
) -> Float[Array, "rows vocab"]:
    """float32 logits of one device's share of the vocabulary, and of what adapters may add."""
    local = _dot(hidden, weight)
    return local if adapters is None else _adapt_logits(local, hidden, adapters)


def known_tokens(
    logits: Float[Array, "rows stored_vocab"], config: ModelConfig, adapters: TokenAdapters | None
) -> Float[Array, "rows known"]:
    """The logits of the vocabulary; of added tokens -inf where the adapter does not know them."""
    if adapters is None or not config.extra_vocab_size:
        return logits[:, : config.vocab_size]
    logits = logits[:, : config.total_vocab]
    known = config.vocab_size + adapters.feature(Feature.ADDED)[:, None]
    return jnp.where(jnp.arange(config.total_vocab)[None] < known, logits, -jnp.inf)


def _dot(
    hidden: Float[Array, "rows width"], weight: Float[Array, "vocab width"]
) -> Float[Array, "rows vocab"]:
    return jax.lax.dot_general(
        hidden,
        weight.astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        precision=kernels.dot_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def _adapt_logits(
    local: Float[Array, "rows vocab"], hidden: Float[Array, "rows width"], adapters: TokenAdapters
) -> Float[Array, "rows vocab"]:
    """Rows and whole matrices of the adapters' own, then their low-rank part."""
    state = adapters.state
    if HEAD in state.full:
        full, which = state.full[HEAD], adapters.feature(Feature.FULL_HEAD)
        for index in range(full.shape[0]):
            mine = (which == index)[:, None]

            def replaced(local: Array, index: int = index, mine: Array = mine) -> Array:
                return jnp.where(mine, _dot(hidden, full[index]), local)

            local = jax.lax.cond(jnp.any(mine), replaced, lambda local: local, local)
    if HEAD in state.token_rows:
        local = _own_token_logits(local, hidden, state.token_rows[HEAD], adapters)
    if HEAD in state.rows:
        row = state.rows[HEAD]
        delta = adapters.delta(hidden, row, 0, divided=False)
        widths, implementation = (local.shape[1],), adapters.implementation
        local = kernels.lora_expand(local, delta, widths, implementation=implementation)
        local = adapters.add_bias(adapters.rescale(local, row, 0), row, 0)
    return local


def _own_token_logits(
    local: Float[Array, "rows vocab"],
    hidden: Float[Array, "rows width"],
    own: TokenRows,
    adapters: TokenAdapters,
) -> Float[Array, "rows vocab"]:
    slot = adapters.feature(Feature.HEAD_ROWS)
    ids = own.ids[slot]  # [rows, own]

    def of_one(one: tuple[Array, Array]) -> Array:
        return _dot(one[0][None], own.rows[one[1]])[0]

    # A few at a time: each takes a copy of its slot's rows.
    at_once = max(OWN_ROWS_AT_ONCE // own.rows[0].size, 1)
    values = jax.lax.map(of_one, (hidden, slot), batch_size=min(at_once, hidden.shape[0]))
    column = ids - jax.lax.axis_index(AXIS) * local.shape[1]
    outside = (ids < 0) | (column < 0) | (column >= local.shape[1])
    column = jnp.where(outside, local.shape[1], column)  # dropped
    return local.at[jnp.arange(local.shape[0])[:, None], column].set(values, mode="drop")
