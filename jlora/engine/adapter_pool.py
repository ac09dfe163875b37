"""Adapters on their way into the pool: packed and sent by any thread, placed between steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, MutableMapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jlora.config import LoRAConfig
from jlora.engine.hosts import Leader, agreed, staging, working
from jlora.engine.pool_arrays import PoolArrays
from jlora.engine.pool_functions import layers_of
from jlora.engine.pool_layout import staged_specs
from jlora.engine.staging import (
    Landings,
    PlacedBlock,
    StagedAdapter,
    StagedBlock,
    StagingBuffers,
    pinned_memory,
)
from jlora.manager import (
    BlockArrays,
    BlockWrite,
    FeatureWrite,
    LoRAModel,
    LoRAModelManager,
    Write,
    block_arrays,
    blocks_needed,
    feature_writes,
    is_full,
    pool_rows,
    row_blocks,
)
from jlora.model import LoadedModel
from jlora.projections import Feature, ModuleMap, Projection


class AdapterPool(PoolArrays):
    """Makes of adapters what the pool's arrays hold, and has it written when slots are given."""

    def __init__(
        self,
        modules: ModuleMap,
        config: LoRAConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        model: LoadedModel,
        base_weight: Callable[[str], np.ndarray],
        hosts: Leader | None = None,
    ) -> None:
        """As PoolArrays.

        base_weight: reads a tensor of the base's checkpoint; adapters' biases and matrices are
        made with it. hosts: who are to do the same to their shares of the pool.
        """
        super().__init__(modules, config, dtype, mesh, model)
        self._base_weight, self._hosts = base_weight, hosts
        self._version = -1  # of the slot tables that the devices have
        self._pinned = pinned_memory(mesh)
        self._landings = None if self._pinned is None else Landings(mesh.devices.flat[0])
        self._buffers: list[StagingBuffers] = []  # of threads that do not stage now

    def compile(self) -> None:
        """As PoolArrays, and makes memory for as many adapters as are staged at a time.

        It is of the pool's dtype; adapters of another one get theirs when the first of them comes.
        """
        super().compile()
        self._buffers = [self._new_buffers() for _ in range(self._config.max_staged_loras)]
        places = Counter[tuple[int, ...]]()
        for row in pool_rows(self._modules, self._config):
            blocks = min(row_blocks(row, self._config), self._config.rank_blocks)
            for shape in self.block_shapes(row):
                layers = self._modules.num_layers // shape[0] if row.per_layer else 1
                places[shape] += len(self._buffers) * blocks * layers
        for buffers in self._buffers:
            for shape in places:
                buffers.reserve(shape, self._dtype)
        if self._landings is not None:
            self._landings.reserve(places, self._dtype)

    def _new_buffers(self) -> StagingBuffers:
        return StagingBuffers(self._pinned, self._landings)

    def stage(self, lora: LoRAModel) -> StagedAdapter:
        """Packs an adapter and sends its blocks to the device; for any thread, at any time."""
        try:
            buffers = self._buffers.pop()
        except IndexError:
            buffers = self._new_buffers()
        needs = blocks_needed(lora, self._modules)
        features = feature_writes(lora, self._modules, self._config, 0, self._full(lora))[1]
        with staging(self._hosts) as staged:
            if self._landings is not None:
                self._landings.keep_after(staged)
            try:
                for row in pool_rows(self._modules, self._config):
                    self._stage_row(lora, row, needs.get(row.name, 0), staged, buffers)
                for feature in features:
                    self._stage_feature(feature, staged)
            finally:
                buffers.wait()  # after an error, too: when `staged` is let go of, its arrays may go
                self._buffers.append(buffers)
        return staged

    def _full(self, lora: LoRAModel) -> dict[str, int]:
        """The whole matrices that an adapter takes, wherever they will be."""
        return {name: 0 for name, rows in lora.vocab_rows.items() if is_full(rows, self._config)}

    def _stage_row(
        self,
        lora: LoRAModel,
        row: Projection,
        count: int,
        staged: StagedAdapter,
        buffers: StagingBuffers,
    ) -> None:
        """Sends an adapter's blocks of a row, `count` for a layer, on their way to the devices."""
        every = BlockWrite.all(lora, self._modules, row, [0] * count)  # the place comes later
        for layer in dict.fromkeys(write.layer for write in every):
            writes = [write for write in every if write.layer == layer]
            places = lora, self._modules, row, layer, range(count), self._shards
            for write, arrays in zip(writes, block_arrays(*places, buffers.empty), strict=True):
                self._stage_block(write, arrays, staged, buffers)

    def _stage_block(
        self,
        write: BlockWrite,
        arrays: BlockArrays,
        staged: StagedAdapter,
        buffers: StagingBuffers,
    ) -> None:
        """arrays: of the write (see BlockArrays)."""
        if self._hosts is not None:
            self._hosts.stage("block", [staged.number, *write.name], arrays)
        staged.blocks[write.name] = self.send_block(write.projection, arrays, buffers)

    def send_block(
        self, row: Projection, arrays: Sequence[np.ndarray], buffers: StagingBuffers
    ) -> StagedBlock:
        """A block's a and b on their way to the devices of this host, and its scales."""
        a, b, scales = arrays
        a_in, b_in = staged_specs(row, self._config.fully_sharded_loras)
        return (
            buffers.send(a, NamedSharding(self._mesh, a_in)),
            buffers.send(b, NamedSharding(self._mesh, b_in)),
            scales,
        )

    def _stage_feature(self, write: FeatureWrite, staged: StagedAdapter) -> None:
        values = self._feature_arrays(write)
        if self._hosts is not None:
            self._hosts.stage("feature", [staged.number, *write.name], values)
        staged.features[write.name] = values

    def _feature_arrays(self, write: FeatureWrite) -> tuple[np.ndarray, ...]:
        """What `_write_feature` writes: made of what the host holds."""
        match write.feature:
            case Feature.MAGNITUDE:
                return (write.magnitudes(self._shards),)
            case Feature.BIAS:
                return (write.biases(self._shards, self._base_weight),)
            case Feature.EMBED_ROWS | Feature.HEAD_ROWS:
                return write.token_rows(self._config.max_lora_token_rows)
            case _:
                vocab = self.state.full[write.projection.name].shape[1]
                return (write.matrix(vocab, self._base_weight).astype(self._dtype),)

    def apply(
        self, manager: LoRAModelManager, staged: MutableMapping[str, StagedAdapter] | None = None
    ) -> None:
        """Writes what the manager says must be written, and takes over its slot tables.

        staged: by LoRAModel.key, what `stage` has made; what has been written is taken out, and
        what is not there is packed now. After an error everything is still to be written; only an
        interrupt between a write and its being noted leaves arrays that are gone.
        """
        writes, staged = manager.take_writes(), {} if staged is None else staged
        try:
            with working(self._hosts):
                self._apply(manager, writes, staged)
        except BaseException:  # an interrupt too
            manager.put_back(writes)
            raise
        for write in writes:
            staged.pop(write.lora.key, None)

    def _apply(
        self,
        manager: LoRAModelManager,
        writes: list[Write],
        staged: MutableMapping[str, StagedAdapter],
    ) -> None:
        buffers, together = StagingBuffers(), defaultdict[tuple, list[BlockWrite]](list)
        for write in writes:
            if isinstance(write, BlockWrite):
                place = write.lora.key, write.first_rank, write.layer, layers_of(write.projection)
                together[place].append(write)
        for blocks in together.values():
            self._apply_blocks(blocks, staged.get(blocks[0].lora.key), buffers)
        buffers.wait()  # what was sent takes device memory until then
        if manager.version != self._version:
            # Copies: the transfer may read them after the manager has gone on.
            slots = [manager.slot_maps[name] for name in self.state.rows]
            tables = [x.copy() for one in slots for x in (one.blocks, one.counts, one.scales)]
            tables.append(manager.features.copy())
            with agreed(self._hosts, "tables", [], tables):
                self.set_tables(tables)
            self._version = manager.version
        for write in writes:
            if isinstance(write, FeatureWrite):  # magnitudes read blocks and slot tables
                self._apply_feature(write, staged.get(write.lora.key))

    def _apply_blocks(
        self, writes: list[BlockWrite], staged: StagedAdapter | None, buffers: StagingBuffers
    ) -> None:
        """writes: of one adapter, in different rows."""
        places, blocks, kept = [], [], []
        for write in writes:
            name, layer, there = write.name, write.layer or 0, staged
            if there is None or name not in there.blocks:
                with staging(self._hosts) as there:
                    arrays = write.arrays(self._shards, buffers.empty)  # waits for earlier ones
                    self._stage_block(write, arrays, there, buffers)
            kept.append(there)  # other hosts drop what is let go of here
            places.append([there.number, *name, layer, write.block])
            blocks.append(PlacedBlock(write.projection, layer, write.block, *there.blocks[name]))
        with agreed(self._hosts, "blocks", places, []):
            self.write_blocks(blocks)

    def _apply_feature(self, write: FeatureWrite, staged: StagedAdapter | None) -> None:
        name = write.name
        if staged is None or name not in staged.features:
            with staging(self._hosts) as staged:
                self._stage_feature(write, staged)
        with agreed(self._hosts, "feature", [staged.number, *name, write.index], []):
            self.write_feature(*name, write.index, staged.features[name])
