"""What the device keeps of every running sequence, and the one array a step is told by.

A sequence that runs has a row. `tokens` holds its whole history: the prompt is written when it is
admitted, sampled tokens by the step that draws them, so the next step finds its input on the
device and nobody waits for the host. Positions and counts follow from the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jlora import kernels
from jlora.engine.scheduler import Plan
from jlora.engine.sequence import Sequence
from jlora.request import MAX_LOGIT_BIAS

# Columns of SeqState.ints and .floats.
PROMPT_LEN, SEED, TOP_K, NUM_BIAS, ROPE_LEN = range(5)
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
# Columns of the batch; the pages follow.
ROW, Q_LEN, KV_LEN, SLOT, ACTS_FROM, SAMPLE = range(6)
PAGES = 6
ADMIT_ROWS = 8  # sequences one call of `admit` takes
FOREVER = 2**31 - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "ints", "floats", "bias_ids", "bias_values", "bias_until"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SeqState:
    """A row for each sequence that can run. (Fields are Any: JAX puts shapes and specs there too.)

    bias_values are added to the logits of bias_ids while fewer than bias_until tokens are drawn;
    the first ints[:, NUM_BIAS] entries count.
    """

    tokens: Any  # int32 [rows, history]
    ints: Any  # int32 [rows, 5]
    floats: Any  # float32 [rows, 6]
    bias_ids: Any  # int32 [rows, bias]
    bias_values: Any  # float32 [rows, bias]
    bias_until: Any  # int32 [rows, bias]


def empty_state(rows: int, history: int) -> SeqState:
    """All zero, in numpy."""
    bias = (rows, MAX_LOGIT_BIAS)
    return SeqState(
        np.zeros((rows, history), np.int32),
        np.zeros((rows, 5), np.int32),
        np.zeros((rows, 6), np.float32),
        np.zeros(bias, np.int32),
        np.zeros(bias, np.float32),
        np.zeros(bias, np.int32),
    )


def admission(sequences: list[Sequence], rows: int, history: int) -> tuple[SeqState, np.ndarray]:
    """At most ADMIT_ROWS sequences as a small SeqState, and the row of each (`rows`: none)."""
    state, at = empty_state(ADMIT_ROWS, history), np.full(ADMIT_ROWS, rows, np.int32)
    for index, sequence in enumerate(sequences):
        params = sequence.request.params
        at[index] = sequence.row
        state.tokens[index, : len(sequence.tokens)] = sequence.tokens
        bias = [(token, value, FOREVER) for token, value in (params.logit_bias or {}).items()]
        if params.min_tokens:
            stops = sequence.request.stop_ids
            bias += [(token, -np.inf, params.min_tokens) for token in sorted(stops)]
        rope_len = sequence.rope_length or sequence.num_prompt
        state.ints[index] = (sequence.num_prompt, sequence.seed, params.top_k, len(bias), rope_len)
        state.floats[index] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        for entry, (token, value, until) in enumerate(bias):
            state.bias_ids[index, entry] = token
            state.bias_values[index, entry] = value
            state.bias_until[index, entry] = until
    return state, at


def short(new: SeqState) -> list[np.ndarray]:
    """The arrays of an `admission` without the columns that no sequence reaches."""
    used = new.tokens.any(axis=0).nonzero()[0]
    return [new.tokens[:, : used.max(initial=-1) + 1], *list(vars(new).values())[1:]]


def unshortened(arrays: list[np.ndarray], history: int) -> SeqState:
    """The opposite of `short`."""
    tokens = np.zeros((len(arrays[0]), history), np.int32)
    tokens[:, : arrays[0].shape[1]] = arrays[0]
    return SeqState(tokens, *arrays[1:])


def admit(state: SeqState, new: SeqState, at: Int[Array, " admitted"]) -> SeqState:
    """state with the new rows in their places (out of range: nowhere); in place when donated."""
    return jax.tree.map(lambda old, rows: old.at[at].set(rows, mode="drop"), state, new)


def pack_batch(plan: Plan, seqs: int, max_pages: int) -> np.ndarray:
    """The step as int32 [seqs, PAGES + max_pages]; rows past the plan's are zero."""
    batch = np.zeros((seqs, PAGES + max_pages), np.int32)
    batch[: len(plan.entries), :PAGES] = [
        (
            (sequence := entry.sequence).row,
            entry.count,
            entry.start + entry.count,
            sequence.slot,
            sequence.acts_from or 0,
            entry.sample,
        )
        for entry in plan.entries
    ]
    pages = [entry.sequence.pages for entry in plan.entries]
    counts = np.zeros((seqs, 1), np.int32)
    counts[: len(pages), 0] = [len(one) for one in pages]
    # One assignment: one a row takes a millisecond for 256 of them.
    batch[:, PAGES:][np.arange(max_pages) < counts] = list(itertools.chain(*pages))
    return batch


def last_tokens(batch: Int[Array, "seqs columns"]) -> Int[Array, " seqs"]:
    """Where in the step the last token of each sequence is; padding has the last of all."""
    return jnp.maximum(jnp.cumsum(batch[:, Q_LEN], dtype=jnp.int32) - 1, 0)


def last_slots(batch: Int[Array, "seqs columns"]) -> Int[Array, " seqs"]:
    """The adapter slot of each sequence's last token; `kernels.NO_ADAPTER` for none."""
    acts = (batch[:, Q_LEN] > 0) & (batch[:, KV_LEN] > batch[:, ACTS_FROM])
    return jnp.where(acts, batch[:, SLOT], kernels.NO_ADAPTER)


@dataclasses.dataclass(frozen=True)
class TokenView:
    """The tokens of a step, worked out on the device from the batch."""

    tokens: Int[Array, " tokens"]
    next_tokens: Int[Array, " tokens"]  # what follows each in its history
    positions: Int[Array, " tokens"]
    rope_lengths: Int[Array, " tokens"]
    slots: Int[Array, " tokens"]
    destinations: Int[Array, " tokens"]
    cu_q_lens: Int[Array, " seqs_1"]
    num_seqs: Int[Array, "1"]


def token_view(
    state: SeqState, batch: Int[Array, "seqs columns"], num_tokens: int, page_size: int
) -> TokenView:
    """Padding tokens get token 0, position 0, no adapter and no destination."""
    ends = jnp.cumsum(batch[:, Q_LEN], dtype=jnp.int32)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    seq = kernels.token_sequences(cu_q_lens, num_tokens)
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    real = index < ends[-1]
    first = batch[:, KV_LEN] - batch[:, Q_LEN]
    positions = jnp.where(real, first[seq] + index - cu_q_lens[seq], 0)
    row = batch[seq, ROW]
    page = batch[seq, PAGES + positions // page_size]
    return TokenView(
        tokens=jnp.where(real, state.tokens[row, positions], 0),
        next_tokens=jnp.where(real, state.tokens[row, positions + 1], 0),
        positions=positions,
        rope_lengths=jnp.maximum(state.ints[row, ROPE_LEN], positions + 1),
        slots=jnp.where(
            real & (positions >= batch[seq, ACTS_FROM]), batch[seq, SLOT], kernels.NO_ADAPTER
        ),
        destinations=jnp.where(real, page * page_size + positions % page_size, -1),
        cu_q_lens=cu_q_lens,
        num_seqs=jnp.sum(batch[:, Q_LEN] > 0, dtype=jnp.int32)[None],
    )
