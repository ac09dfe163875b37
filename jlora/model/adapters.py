"""What of the adapters is on the device, and what a projection does with it.

With s the slot of a token, an adapted projection computes

    y = m(s) * (x W + delta(s)) + bias + b(s)

where delta is the LoRA product (kernels.lora_shrink, lora_expand), m is DoRA's magnitude over the
norm of the whole weight (Liu et al. 2024, eq. 5), and b what the adapter adds to the bias. m and b
are there only where an engine has reserved them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora import kernels
from jlora.kernels import Implementation, LoRADelta, LoRARouting, SlotTable
from jlora.projections import Feature

AXIS = "model"  # of the mesh, over which a model is divided


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "slots", "magnitude", "bias"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RowPool:
    """The adapters of one projection (a row of the adapter pool).

    The blocks of a row of experts are each of all experts, which have an axis after them.
    embed_tokens looks a up by token: there it is [blocks, vocabulary, rank].
    """

    a: Any  # [layers, blocks, (experts,) parts, rank, d_in]
    b: Any  # [layers, blocks, (experts,) rank, d_out]
    slots: SlotTable
    magnitude: Any = None  # float32 [layers, slots + 1, d_out], the last 1; None: not reserved
    bias: Any = None  # float32 [layers, slots + 1, d_out], the last 0; None: not reserved


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of embed_tokens or lm_head that the adapters in the slots have of their own."""

    ids: Any  # int32 [slots + 1, rows], the tokens; -1 past the last
    rows: Any  # [slots + 1, rows, hidden]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "features", "token_rows", "full"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AdapterState:
    """Everything of the adapters that a step reads.

    rows: by the projection's name. features: int32 [slots + 1, features], see
    projections.Feature. token_rows, full: by "embed_tokens" and "lm_head"; full matrices are
    [matrices, vocabulary, hidden]. What is not reserved is not there.
    """

    rows: dict[str, RowPool]
    features: Any
    token_rows: dict[str, TokenRows]
    full: dict[str, Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "routing", "features"],
    meta_fields=["implementation", "fully_sharded"],
)
@dataclasses.dataclass(frozen=True)
class TokenAdapters:
    """The adapters of some tokens: those of a step, or those that are sampled from.

    fully_sharded: A and B of every row of a layer that devices share are divided among them.
    """

    state: AdapterState
    routing: LoRARouting
    features: Int[Array, "tokens features"]
    implementation: Implementation
    fully_sharded: bool = False

    @classmethod
    def of(
        cls,
        state: AdapterState,
        slots: Int[Array, " tokens"],
        implementation: Implementation,
        fully_sharded: bool,
    ) -> TokenAdapters:
        """slots: of each token, `kernels.NO_ADAPTER` for none; those of a slot stand together."""
        num_slots = state.features.shape[0] - 1
        routing = kernels.lora_routing(slots, num_slots, implementation=implementation)
        # NO_ADAPTER is -1, and so the last row.
        return cls(state, routing, state.features[slots], implementation, fully_sharded)

    def of_experts(
        self, token: Int[Array, " rows"], expert: Int[Array, " rows"], experts: int
    ) -> TokenAdapters:
        """For rows that are each a token at one of its experts; no adapter from `experts` on.

        A pair of a slot and an expert is a slot of its own there: see `of_each_expert`.
        """
        slots = self.routing.token_slots[token]
        nobody = (slots < 0) | (expert >= experts)
        slots = jnp.where(nobody, kernels.NO_ADAPTER, slots * experts + expert)
        routing = kernels.lora_routing(slots, implementation=self.implementation)
        return dataclasses.replace(self, routing=routing, features=self.features[token])

    def feature(self, which: Feature) -> Int[Array, " tokens"]:
        """A column of the feature table."""
        return self.features[:, which]

    def delta(
        self,
        x: Float[Array, "tokens d_in"],
        row: RowPool,
        layer: int | Int[Array, ""],
        divided: bool,
    ) -> LoRADelta:
        """The LoRA product of a projection's input, to be added to its output (`add_delta`).

        divided: whether the row is one that devices share.
        """
        x, share = x.astype(row.a.dtype), row.a.shape[-1]
        if share < x.shape[1]:  # x is whole, and A is not
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * share, share, axis=1)
        options: dict[str, Any] = {"implementation": self.implementation}
        h = kernels.lora_shrink(x, row.a, layer, self.routing, row.slots, **options)
        if self.fully_sharded and divided:
            h = jax.lax.psum(jnp.sum(h, axis=0, keepdims=True), AXIS)
        return LoRADelta(h, row.b, layer, self.routing, row.slots)

    def rescale(
        self, y: Float[Array, "tokens d_out"], row: RowPool, layer: int | Int[Array, ""]
    ) -> Float[Array, "tokens d_out"]:
        """y times m; y itself where magnitudes are not reserved."""
        if row.magnitude is None:
            return y
        factor = _of_slot(row.magnitude, layer, self.feature(Feature.MAGNITUDE))
        return (y.astype(jnp.float32) * factor).astype(y.dtype)

    def add_bias(
        self, y: Float[Array, "tokens d_out"], row: RowPool, layer: int | Int[Array, ""]
    ) -> Float[Array, "tokens d_out"]:
        """y plus b; y itself where biases are not reserved."""
        if row.bias is None:
            return y
        return (y + _of_slot(row.bias, layer, self.feature(Feature.BIAS))).astype(y.dtype)


def add_delta(
    y: Float[Array, "tokens d_out"],
    delta: LoRADelta,
    part_widths: tuple[int, ...],
    implementation: Implementation,
) -> Float[Array, "tokens d_out"]:
    """y and what the adapters add to it, in the columns of which this device has B."""
    share = delta.b.shape[-1]
    if share == y.shape[1]:
        return kernels.lora_expand(y, delta, part_widths, implementation=implementation)
    start = jax.lax.axis_index(AXIS) * share  # a sum over devices follows
    mine = jax.lax.dynamic_slice_in_dim(y, start, share, axis=1)
    mine = kernels.lora_expand(mine, delta, (share,), implementation=implementation)
    # The TPU compiler (libtpu 0.0.42) aborts when it joins the update with what comes before.
    mine = jax.lax.optimization_barrier(mine)
    return jax.lax.dynamic_update_slice_in_dim(y, mine, start, axis=1)


def of_each_expert(row: RowPool) -> RowPool:
    """With block * experts + expert for a block, and slot * experts + expert for a slot."""
    slots, experts = row.slots, row.b.shape[2]
    blocks = slots.blocks[:, None] * experts + jnp.arange(experts, dtype=jnp.int32)[:, None]
    table = SlotTable(
        blocks.reshape(-1, slots.blocks.shape[1]),
        jnp.repeat(slots.counts, experts),
        jnp.repeat(slots.scales, experts, axis=0),
    )
    a, b = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (row.a, row.b))
    return dataclasses.replace(row, a=a, b=b, slots=table)


def _of_slot(
    values: Float[Array, "layers slots d_out"],
    layer: int | Int[Array, ""],
    slots: Int[Array, " tokens"],
) -> Float[Array, "tokens d_out"]:
    """values[layer, slots], without a copy of the layer."""
    return values.reshape(-1, values.shape[2])[layer * values.shape[1] + slots]
