"""From logits to tokens, on the device. Every function is a row by itself: no row sees another."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.engine.state import (
    FREQUENCY,
    KV_LEN,
    MIN_P,
    NUM_BIAS,
    PRESENCE,
    PROMPT_LEN,
    REPETITION,
    ROW,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SeqState,
)
from jlora.request import SamplingParams

# What a step compiles: greedy takes the best token; random knows temperature, top-k, top-p and
# min-p; full knows penalties, biases and log-probabilities as well.
Variant = Literal["greedy", "random", "full"]
VARIANTS: tuple[Variant, ...] = ("greedy", "random", "full")
GREEDY_BELOW = 1e-5  # temperature


def variant_of(params: SamplingParams) -> Variant:
    """The cheapest variant that serves a request."""
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    if (
        params.logprobs is not None
        or penalties != (0, 0, 1)
        or params.logit_bias
        or params.min_tokens
    ):
        return "full"
    return "greedy" if params.greedy else "random"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logprobs", "ranks", "top_ids", "top_logprobs"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Of each row's token: its log-probability and rank (from 1), and the best tokens'."""

    logprobs: Any  # float32 [rows]
    ranks: Any  # int32 [rows]
    top_ids: Any  # int32 [rows, top]
    top_logprobs: Any  # float32 [rows, top]


def token_logprobs(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], top: int
) -> TokenLogprobs:
    """Log-probabilities by the softmax of the logits as they are."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)
    ranks = jnp.sum(logprobs > chosen, axis=1, dtype=jnp.int32) + 1
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(top, logits.shape[1]))
    return TokenLogprobs(chosen[:, 0], ranks, top_ids.astype(jnp.int32), top_logprobs)


def sample(
    logits: Float[Array, "rows vocab"],
    state: SeqState,
    batch: Int[Array, "rows columns"],
    variant: Variant,
    top: int,
) -> tuple[Int[Array, " rows"], TokenLogprobs | None]:
    """The next token of each row, and (variant "full") its log-probabilities.

    The log-probabilities are those of the model, before biases, penalties and temperature. Order
    of the rest: biases, penalties, temperature, min-p, top-k, top-p.
    """
    raw, row = logits, batch[:, ROW]
    if variant == "full":
        logits = add_bias(logits, state, batch)
        logits = penalize(logits, state, batch)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if variant != "greedy":
        temperature = state.floats[row, TEMPERATURE]
        drawn = draw(
            logits / jnp.maximum(temperature, GREEDY_BELOW)[:, None],
            state.floats[row, MIN_P],
            state.ints[row, TOP_K],
            state.floats[row, TOP_P],
            state.ints[row, SEED],
            batch[:, KV_LEN] - state.ints[row, PROMPT_LEN],
        )
        tokens = jnp.where(temperature < GREEDY_BELOW, tokens, drawn)
    return tokens, token_logprobs(raw, tokens, top) if variant == "full" else None


def add_bias(logits: Array, state: SeqState, batch: Array) -> Array:
    """logit_bias, and -inf for the stop tokens of answers shorter than min_tokens."""
    row = batch[:, ROW]
    drawn = batch[:, KV_LEN] - state.ints[row, PROMPT_LEN]
    entry = jnp.arange(state.bias_ids.shape[1])[None]
    active = (entry < state.ints[row, NUM_BIAS][:, None]) & (drawn[:, None] < state.bias_until[row])
    ids = jnp.where(active, state.bias_ids[row], logits.shape[1])  # out of range: dropped
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].add(state.bias_values[row], mode="drop")


def penalize(logits: Array, state: SeqState, batch: Array) -> Array:
    """Repetition, then frequency and presence; the counts come from the history of tokens."""
    row = batch[:, ROW]
    history = state.tokens[row]  # [rows, history]
    position = jnp.arange(history.shape[1])[None]
    known = position < batch[:, KV_LEN][:, None]
    output = known & (position >= state.ints[row, PROMPT_LEN][:, None])
    rows = jnp.arange(logits.shape[0])[:, None]
    zero = jnp.zeros(logits.shape, jnp.int32)
    seen = zero.at[rows, history].max(known.astype(jnp.int32)) > 0
    counts = zero.at[rows, history].add(output.astype(jnp.int32))
    floats = state.floats[row][:, :, None]  # [rows, 6, 1]
    repetition = floats[:, REPETITION]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    return logits - floats[:, FREQUENCY] * counts - floats[:, PRESENCE] * (counts > 0)


def draw(
    logits: Float[Array, "rows vocab"],
    min_p: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    seed: Int[Array, " rows"],
    index: Int[Array, " rows"],
) -> Int[Array, " rows"]:
    """Draws from softmax(logits), cut by min-p, top-k and top-p in this order.

    By Gumbel-max; the noise of a row depends on its seed and on how many tokens it has drawn, so
    on nothing that runs beside it.
    """
    vocab = logits.shape[1]
    best = jnp.max(logits, axis=1, keepdims=True)
    logits = jnp.where(logits < best + jnp.log(min_p)[:, None], -jnp.inf, logits)
    descending = -jnp.sort(-logits, axis=1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = jnp.take_along_axis(descending, (k - 1)[:, None], axis=1)
    descending = jnp.where(descending < kth, -jnp.inf, descending)
    probability = jax.nn.softmax(descending, axis=1)
    before = jnp.cumsum(probability, axis=1) - probability
    # At 1 everything is kept, whatever the sum has lost to rounding.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (jnp.arange(vocab)[None] == 0)
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=1, keepdims=True)
    logits = jnp.where((logits < least) | (logits < kth), -jnp.inf, logits)

    def noise(seed: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(seed, index), axis=1).astype(jnp.int32)
