"""The adapter pool on the device, and the writes that fill its rank blocks in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.kernels import SlotTable
from jlora.manager import BlockWrite, LoRAModelManager, SlotMap
from jlora.model import AXIS, RowPool
from jlora.projections import ModuleMap, Projection

STAGING_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _specs(row: Projection) -> tuple[PartitionSpec, PartitionSpec]:
    """How A and B of a row are divided.

    Column-parallel rows divide B's columns and copy A; row-parallel ones divide A's input and
    copy B; those that nobody divides copy both.
    """
    a = PartitionSpec(None, None, None, None, AXIS) if row.shard == "in" else PartitionSpec()
    b = PartitionSpec(None, None, None, AXIS) if row.shard == "out" else PartitionSpec()
    return a, b


def _row_shapes(
    row: Projection, layers: int, blocks: int, shards: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a = (layers, blocks, len(row.parts), LORA_BLOCK_RANK, row.d_in)
    return a, (layers, blocks, LORA_BLOCK_RANK, row.stored_width(shards))


def pool_bytes(modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, shards: int) -> int:
    """Bytes of the pool on one device."""
    total = 0
    for row in modules.projections:
        a, b = _row_shapes(row, modules.num_layers, config.pool_blocks, shards)
        for shape, shard in ((a, "in"), (b, "out")):
            copies = shards if row.shard == shard else 1
            total += int(np.prod(shape)) // copies * dtype.itemsize
    return total


class AdapterPool:
    """The rows of the pool; `rows` is what a step reads."""

    def __init__(
        self, modules: ModuleMap, config: LoRAConfig, dtype: jnp.dtype, mesh: Mesh
    ) -> None:
        """Allocates the pool, all zero."""
        self._modules, self._mesh, self._shards = modules, mesh, mesh.shape[AXIS]
        self._version = -1
        self._writers: dict[tuple[str, np.dtype], jax.stages.Compiled] = {}
        self.rows: dict[str, RowPool] = {}
        for row in modules.projections:
            shapes = _row_shapes(row, modules.num_layers, config.pool_blocks, self._shards)
            a, b = (
                jax.jit(
                    functools.partial(jnp.zeros, shape, dtype),
                    out_shardings=NamedSharding(mesh, spec),
                )()
                for shape, spec in zip(shapes, _specs(row), strict=True)
            )
            slots = SlotMap(config.max_loras, config.max_blocks)
            self.rows[row.name] = RowPool(a, b, self._table(slots))

    @property
    def specs(self) -> dict[str, RowPool]:
        """How `rows` is divided: the same tree, of PartitionSpecs."""
        whole = PartitionSpec()
        return {
            row.name: jax.tree.unflatten(
                jax.tree.structure(self.rows[row.name]), [*_specs(row), whole, whole, whole]
            )
            for row in self._modules.projections
        }

    def _table(self, slots: SlotMap) -> SlotTable:
        # Copies: the transfer may read them after the manager has gone on.
        arrays = (slots.blocks.copy(), slots.counts.copy(), slots.scales.copy())
        return SlotTable(*jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec())))

    def compile(self) -> None:
        """Compiles the writes, one for each row and dtype in which adapters come."""
        for row in self._modules.projections:
            for dtype in STAGING_DTYPES:
                self._writer(row, dtype)

    def apply(self, manager: LoRAModelManager) -> None:
        """Writes what the manager says must be written, and takes over its slot tables."""
        for write in manager.take_writes():
            self._write(write)
        if manager.version != self._version:
            self.rows = {
                name: RowPool(row.a, row.b, self._table(manager.slot_maps[name]))
                for name, row in self.rows.items()
            }
            self._version = manager.version

    def _write(self, write: BlockWrite) -> None:
        row, name = write.projection, write.projection.name
        arrays = write.arrays(self._shards)
        a, b, scales = jax.device_put(arrays, self._incoming(row))
        block = jax.device_put(np.int32(write.block), NamedSharding(self._mesh, PartitionSpec()))
        pool = self.rows[name]
        writer = self._writer(row, arrays[0].dtype)
        a, b = writer(pool.a, pool.b, block, a, b, scales)
        self.rows[name] = RowPool(a, b, pool.slots)

    def _incoming(self, row: Projection) -> tuple[NamedSharding, ...]:
        """Shardings of BlockWrite.arrays."""
        a = PartitionSpec(None, None, None, AXIS) if row.shard == "in" else PartitionSpec()
        b = PartitionSpec(None, AXIS, None) if row.shard == "out" else PartitionSpec()
        return tuple(NamedSharding(self._mesh, spec) for spec in (a, b, PartitionSpec()))

    def _writer(self, row: Projection, dtype: np.dtype) -> jax.stages.Compiled:
        key = (row.name, dtype)
        if key not in self._writers:
            pool = self.rows[row.name]
            layers, _, parts, rank, d_in = pool.a.shape
            shapes = ((layers, parts, rank, d_in), (layers, pool.b.shape[-1], rank))
            staged = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
                for shape, sharding in zip(shapes, self._incoming(row), strict=False)
            ]
            replicated = NamedSharding(self._mesh, PartitionSpec())
            block = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
            scales = jax.ShapeDtypeStruct((layers, parts), np.float32, sharding=replicated)
            shardings = tuple(NamedSharding(self._mesh, spec) for spec in _specs(row))
            function = functools.partial(write_block, part_of=self._part_of(row))
            self._writers[key] = (
                jax.jit(function, donate_argnums=(0, 1), out_shardings=shardings)
                .lower(pool.a, pool.b, block, *staged, scales)
                .compile()
            )
        return self._writers[key]

    def _part_of(self, row: Projection) -> np.ndarray:
        """int32 [stored width]: the part of each stored column."""
        widths = [part.width for part in row.parts]
        part_of_column = np.repeat(np.arange(len(widths)), widths)
        return part_of_column[row.columns(self._shards)].astype(np.int32)


def write_block(
    a: Array,
    b: Array,
    block: Array,
    new_a: Array,
    new_b: Array,
    scales: Array,
    *,
    part_of: np.ndarray,
) -> tuple[Array, Array]:
    """a and b with one block replaced; the scale goes into B, in float32 before the cast.

    new_a [layers, parts, rank, d_in], new_b [layers, d_out, rank], scales [layers, parts].
    """
    scaled = new_b.astype(jnp.float32) * scales[:, part_of][:, :, None]
    scaled = jnp.swapaxes(scaled, 1, 2).astype(b.dtype)[:, None]  # [layers, 1, rank, d_out]
    a = jax.lax.dynamic_update_slice(a, new_a.astype(a.dtype)[:, None], (0, block, 0, 0, 0))
    return a, jax.lax.dynamic_update_slice(b, scaled, (0, block, 0, 0))
