"""Shapes of the adapter pool, how it is divided among devices, and what it takes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.kernels import SlotTable
from jlora.manager import SlotMap, feature_rows, no_features, pool_rows, row_blocks
from jlora.model import AXIS, AdapterState, RowPool, TokenRows, stored_vocab
from jlora.projections import EMBED, HEAD, ModuleMap, Projection

WHOLE = PartitionSpec()
MATRIX = PartitionSpec(None, AXIS, None)  # of whole matrices, divided as the model's own


def _divided(row: Projection, fully_sharded: bool) -> tuple[str | None, str | None, str | None]:
    """The mesh axes over which a row's experts, A's input and B's output lie.

    Column-parallel rows divide B's columns and copy A; row-parallel ones divide A's input and
    copy B. Fully sharded ones divide both, as far as they are of layers. Where devices have whole
    experts, they have all of what belongs to these, and nothing else.
    """
    both = fully_sharded and row.per_layer and row.shard in ("in", "out")
    return (
        AXIS if row.shard == "experts" else None,
        AXIS if both or row.shard == "in" else None,
        AXIS if both or row.shard == "out" else None,
    )


def _spec(*axes: str | None) -> PartitionSpec:
    return PartitionSpec(*axes) if any(axes) else WHOLE


def row_specs(
    row: Projection, fully_sharded: bool
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How A, B and what is per output (magnitudes, biases) of a row are divided."""
    experts, d_in, d_out = _divided(row, fully_sharded)
    front = (None, None, *((experts,) if row.experts else ()))
    per_output = _spec(None, None, AXIS if row.shard == "out" else None)
    return _spec(*front, None, None, d_in), _spec(*front, None, d_out), per_output


def staged_specs(row: Projection, fully_sharded: bool) -> tuple[PartitionSpec, PartitionSpec]:
    """How the arrays of BlockWrite.arrays are divided."""
    experts, d_in, d_out = _divided(row, fully_sharded)
    return _spec(None, experts, None, None, d_in), _spec(None, experts, d_out, None)


@dataclasses.dataclass(frozen=True)
class Held:
    """An array of the pool: over all devices, how it is divided, and what it holds at first."""

    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec = WHOLE
    value: float | np.ndarray = 0


def pool_layout(
    modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int
) -> AdapterState:
    """The whole pool with a Held for each array; no adapter is there."""
    slots, model = config.max_loras + 1, modules.config
    features = no_features(config.max_loras)
    rows = {
        row.name: _row_layout(row, modules, config, dtype, shards)
        for row in pool_rows(modules, config)
    }
    token_rows, full = {}, {}
    for name in (EMBED, HEAD):
        if config.max_lora_token_rows:
            shape = (slots, config.max_lora_token_rows)
            token_rows[name] = TokenRows(
                Held(shape, np.int32, value=-1), Held((*shape, model.hidden_size), dtype)
            )
        if config.max_lora_full_weights:
            matrices = config.max_lora_full_weights
            stored = (matrices, stored_vocab(model, shards), model.hidden_size)
            full[name] = Held(stored, dtype, MATRIX)
    return AdapterState(
        rows, Held(features.shape, features.dtype, value=features), token_rows, full
    )


def _row_layout(
    row: Projection, modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int
) -> RowPool:
    layers = modules.num_layers if row.per_layer else 1
    blocks = (row_blocks(row, config), *((row.experts,) if row.experts else ()))
    width, rank, specs = (
        row.stored_width(shards),
        LORA_BLOCK_RANK,
        row_specs(row, config.fully_sharded_loras),
    )
    a: tuple[int, ...] = (layers, *blocks, len(row.parts), rank, row.d_in)
    if row.name == EMBED:
        a = (*blocks, row.d_in, rank)
    vector = (layers, config.max_loras + 1, width)
    per_slot = row in feature_rows(modules, config)
    table = SlotMap(config.max_loras, config.max_blocks)
    return RowPool(
        Held(a, dtype, specs[0]),
        Held((layers, *blocks, rank, width), dtype, specs[1]),
        SlotTable(
            *(Held(x.shape, x.dtype, value=x) for x in (table.blocks, table.counts, table.scales))
        ),
        Held(vector, np.float32, specs[2], 1) if config.enable_lora_dora and per_slot else None,
        Held(vector, np.float32, specs[2], 0) if config.enable_lora_bias and per_slot else None,
    )


def pool_bytes(modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int) -> int:
    """Bytes of the pool on one device."""
    return sum(
        math.prod(held.shape)
        * np.dtype(held.dtype).itemsize
        // (shards if AXIS in held.spec else 1)
        for held in jax.tree.leaves(pool_layout(modules, config, dtype, shards))
    )


def staged_bytes(modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int) -> int:
    """What the adapters of the largest rank take that may be staged on one device."""
    experts = min(config.lora_expert_blocks, config.rank_blocks)
    one = dataclasses.replace(
        config, max_loras=1, max_cpu_loras=1, lora_pool_blocks=None, lora_expert_blocks=experts
    )
    return config.max_staged_loras * pool_bytes(modules, one, dtype, shards)
