"""A mixture of experts: a router chooses a few of the MLPs for each token.

The rows (token, choice) of a step are sorted by expert, so that each expert multiplies a stretch
of them: two grouped matmuls for all experts, and no capacity, nothing dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.config import ModelConfig
from jlora.model.adapters import AXIS, TokenAdapters, add_delta, of_each_expert
from jlora.model.layers import ACTIVATIONS, LoRALinear, StepContext
from jlora.projections import Projection


class SortedRows(NamedTuple):
    """The rows (token, choice) of a step, those of an expert beside each other.

    Behind the last group come those of other devices' experts, which stay zero here.
    """

    order: Int[Array, " rows"]  # token * choices + choice of each
    token: Int[Array, " rows"]
    group_sizes: Int[Array, " experts"]
    adapters: TokenAdapters | None  # of the rows


def route(
    logits: Float[Array, "tokens experts"], choices: int, normalise: bool
) -> tuple[Float[Array, "tokens choices"], Int[Array, "tokens choices"]]:
    """float32 weights of the most likely experts, and which they are.

    The softmax is over all experts; `normalise` makes the chosen weights sum to one.
    """
    likely, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), choices)
    if normalise:
        likely = likely / jnp.sum(likely, axis=-1, keepdims=True)
    return likely, chosen


def own_experts(chosen: Int[Array, "..."], experts: int) -> Int[Array, "..."]:
    """Of each expert which of the device's own it is, `experts` for those of other devices."""
    own = chosen - jax.lax.axis_index(AXIS) * experts
    return jnp.where((own >= 0) & (own < experts), own, experts)


def sort_rows(
    chosen: Int[Array, "tokens choices"], experts: int, adapters: TokenAdapters | None
) -> SortedRows:
    """Sorts the rows by their expert, and those of one by their adapter: so that both are in
    few tiles.

    chosen: `experts` and above are nobody here. adapters: of the tokens; None when none of them
    changes an expert.
    """
    expert = key = chosen.reshape(-1)
    if adapters is not None:
        state, slots = adapters.state, jnp.repeat(adapters.routing.token_slots, chosen.shape[1])
        key = expert * state.features.shape[0] + slots + 1
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    group_sizes = jnp.zeros(experts, jnp.int32).at[expert].add(1)
    token = order // chosen.shape[1]
    if adapters is not None:
        adapters = adapters.of_experts(token, expert[order], experts)
    return SortedRows(order, token, group_sizes, adapters)


def combine(
    out: Float[Array, "rows hidden"], rows: SortedRows, weights: Float[Array, "tokens choices"]
) -> Float[Array, "tokens hidden"]:
    """The weighted sum of each token's rows, in float32 and in the order of the choices."""
    place = (
        jnp.zeros_like(rows.order).at[rows.order].set(jnp.arange(rows.order.size, dtype=jnp.int32))
    )
    mine = out[place].reshape(*weights.shape, -1).astype(jnp.float32)  # [tokens, choices, hidden]
    return jnp.sum(mine * weights[..., None], axis=1).astype(out.dtype)


class ExpertLinear(nnx.Module):
    """An expert row of the projection table: a matrix for each expert.

    divided: whether devices share each of them.
    """

    def __init__(self, row: Projection, shards: int, dtype: jnp.dtype) -> None:
        matrix = (row.d_in, row.stored_width(shards))
        self.transposed = row.output_first
        shape = (row.experts, *(reversed(matrix) if self.transposed else matrix))
        self.weight = nnx.Param(jnp.zeros(shape, dtype))
        self.name, self.experts = row.name, row.experts
        self.part_widths = row.local_widths(shards)
        self.divided = shards > 1 and row.shard != "experts"

    def __call__(
        self,
        x: Float[Array, "rows d_in"],
        rows: SortedRows,
        layer: int | Int[Array, ""],
        step: StepContext,
    ) -> Float[Array, "rows d_out"]:
        """x: the sorted rows. Of a row-parallel one this is the device's part of a sum."""
        y = kernels.grouped_matmul(
            x,
            self.weight[...],
            rows.group_sizes,
            transpose_rhs=self.transposed,
            total_experts=self.experts,
            implementation=step.implementation,
        )
        if rows.adapters is None:
            return y
        pool = of_each_expert(rows.adapters.state.rows[self.name])
        delta = rows.adapters.delta(x, pool, layer, self.divided)
        return add_delta(y, delta, self.part_widths, step.implementation)


class MoE(nnx.Module):
    """Router and experts, in the place of a dense MLP."""

    def __init__(self, config: ModelConfig, rows: dict[str, Projection], shards: int) -> None:
        dtype = jnp.dtype(config.dtype)
        self.router = LoRALinear(rows["router"], shards, dtype)
        self.experts_gate_up = ExpertLinear(rows["experts_gate_up"], shards, dtype)
        self.experts_down = ExpertLinear(rows["experts_down"], shards, dtype)
        self.local_experts = rows["experts_down"].local_experts(shards)
        self.num_experts, self.choices = config.num_experts, config.num_experts_per_tok
        self.normalise, self.activation = config.norm_topk_prob, config.hidden_act

    def __call__(
        self, x: Float[Array, "tokens hidden"], layer: int | Int[Array, ""], step: StepContext
    ) -> Float[Array, "tokens hidden"]:
        weights, chosen = route(self.router(x, layer, step), self.choices, self.normalise)
        adapters = step.adapters
        if adapters is not None and self.experts_down.name not in adapters.state.rows:
            adapters = None  # the engine has not reserved room for such
        if self.local_experts < self.num_experts:
            chosen = own_experts(chosen, self.local_experts)
        rows = sort_rows(chosen, self.local_experts, adapters)
        out = combine(self.experts(x[rows.token], rows, layer, step), rows, weights)
        return jax.lax.psum(out, AXIS)

    def experts(
        self,
        x: Float[Array, "rows hidden"],
        rows: SortedRows,
        layer: int | Int[Array, ""],
        step: StepContext,
    ) -> Float[Array, "rows hidden"]:
        """The gated MLP of each sorted row's expert; this device's part of the sum."""
        gate, up = jnp.split(self.experts_gate_up(x, rows, layer, step), 2, axis=-1)
        return self.experts_down(ACTIVATIONS[self.activation](gate) * up, rows, layer, step)
