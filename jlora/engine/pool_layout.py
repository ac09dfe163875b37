"""Shapes of the adapter pool, how it is divided among devices, and what it takes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.manager import pool_rows, row_blocks
from jlora.model import AXIS, stored_vocab
from jlora.projections import EMBED, ModuleMap, Projection

WHOLE = PartitionSpec()
MATRIX = PartitionSpec(None, AXIS, None)  # of whole matrices, divided as the model's own


def row_specs(row: Projection) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How A, B and what is per output (magnitudes, biases) of a row are divided.

    Column-parallel rows divide B's columns and copy A; row-parallel ones divide A's input and
    copy B.
    """
    match row.shard:
        case "out":
            return WHOLE, PartitionSpec(None, None, None, AXIS), PartitionSpec(None, None, AXIS)
        case "in":
            return PartitionSpec(None, None, None, None, AXIS), WHOLE, WHOLE
        case _:
            return WHOLE, WHOLE, WHOLE


def staged_specs(row: Projection) -> tuple[PartitionSpec, PartitionSpec]:
    """How the arrays of BlockWrite.arrays are divided, as the pool that they are written into."""
    return (
        PartitionSpec(None, None, None, None, AXIS) if row.shard == "in" else WHOLE,
        PartitionSpec(None, None, AXIS, None) if row.shard == "out" else WHOLE,
    )


def row_shapes(
    row: Projection, modules: ModuleMap, config: LoRAConfig, shards: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of A, B and of what is per output, over all devices; see RowPool."""
    layers = modules.num_layers if row.per_layer else 1
    blocks = row_blocks(row, config) * (row.experts or 1)
    width, rank = row.stored_width(shards), LORA_BLOCK_RANK
    a: tuple[int, ...] = (layers, blocks, len(row.parts), rank, row.d_in)
    if row.name == EMBED:
        a = (blocks, row.d_in, rank)
    return a, (layers, blocks, rank, width), (layers, config.max_loras + 1, width)


def stored_matrix(modules: ModuleMap, config: LoRAConfig, shards: int) -> tuple[int, int, int]:
    """Shape of the whole matrices that adapters may bring, over all devices."""
    model = modules.config
    return config.max_lora_full_weights, stored_vocab(model, shards), model.hidden_size


def pool_bytes(modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int) -> int:
    """Bytes of the pool on one device."""
    total = 0
    for row in pool_rows(modules, config):
        shapes, specs = row_shapes(row, modules, config, shards), row_specs(row)
        a, b, vector = (
            int(np.prod(shape)) // (shards if AXIS in spec else 1)
            for shape, spec in zip(shapes, specs, strict=True)
        )
        vectors = config.enable_lora_dora + config.enable_lora_bias if not row.experts else 0
        total += (a + b) * dtype.itemsize + vectors * vector * 4
    rows = (config.max_loras + 1) * config.max_lora_token_rows * modules.config.hidden_size
    full = int(np.prod(stored_matrix(modules, config, shards))) // shards
    return total + 2 * (rows + full) * dtype.itemsize


def staged_bytes(modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int) -> int:
    """What the adapters of the largest rank take that may be staged on one device."""
    experts = min(config.lora_expert_blocks, config.rank_blocks)
    one = dataclasses.replace(
        config, max_loras=1, max_cpu_loras=1, lora_pool_blocks=None, lora_expert_blocks=experts
    )
    return config.max_staged_loras * pool_bytes(modules, one, dtype, shards)
