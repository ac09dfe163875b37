"""Rank blocks: who holds which on the device, and what is to be written into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.manager.lora_model import LoRALayerWeights, LoRAModel, PackedLoRALayerWeights
from jlora.projections import ModuleMap, Projection

if TYPE_CHECKING:
    from jlora.manager.mixture import LoRAMixture

# What adapters take on the device: identity of an adapter -> row of the pool -> blocks.
Needs = Mapping[str, Mapping[str, int]]


def pool_rows(modules: ModuleMap, config: LoRAConfig) -> tuple[Projection, ...]:
    """The rows of the table that have a place in the pool: those that the options reserve."""
    layers = [row for row in modules.projections if not row.experts or config.lora_expert_blocks]
    return (*layers, *(modules.wide_vocab_projections if config.enable_lora_embeddings else ()))


def row_blocks(row: Projection, config: LoRAConfig) -> int:
    """Rank blocks of a row of the pool."""
    return config.lora_expert_blocks if row.experts else config.pool_blocks


class BlockPool:
    """Free list of the rank blocks of one projection."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; the caller has looked at num_free."""
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Gives blocks back."""
        self._free += blocks


class SlotMap:
    """Which blocks of one projection each slot lists, as the kernels read it.

    blocks: int32 [slots, max_blocks]. counts: int32 [slots]. scales: float32 [slots, max_blocks].
    """

    def __init__(self, slots: int, max_blocks: int) -> None:
        self.blocks = np.zeros((slots, max_blocks), np.int32)
        self.counts = np.zeros(slots, np.int32)
        self.scales = np.ones((slots, max_blocks), np.float32)

    def set(self, slot: int, blocks: list[int], scales: list[float] | None = None) -> None:
        """The slot lists exactly these, each with its scale (1 when None)."""
        count = len(blocks)
        self.blocks[slot], self.scales[slot] = 0, 1
        self.blocks[slot, :count] = blocks
        self.scales[slot, :count] = scales if scales is not None else 1
        self.counts[slot] = count

    def get(self, slot: int) -> list[int]:
        """The blocks of a slot."""
        return self.blocks[slot, : self.counts[slot]].tolist()


class BlockWrite:
    """One rank block to be written: rows `first_rank` and on of an adapter's projection."""

    def __init__(
        self,
        lora: LoRAModel,
        modules: ModuleMap,
        projection: Projection,
        block: int,
        index: int,
        layer: int | None = None,
    ) -> None:
        """block: where in the pool; index: which block of the adapter, from 0.

        layer: the only one that is written; None: all.
        """
        self.lora, self.modules, self.projection = lora, modules, projection
        self.block, self.first_rank = block, index * LORA_BLOCK_RANK
        self.layer = layer

    @property
    def name(self) -> tuple[str, int, int | None]:
        """Which of its adapter's blocks it writes, wherever that is in the pool."""
        return self.projection.name, self.first_rank, self.layer

    @classmethod
    def all(
        cls, lora: LoRAModel, modules: ModuleMap, projection: Projection, blocks: list[int]
    ) -> list[BlockWrite]:
        """The writes of an adapter's blocks in a row; of experts, whose blocks are large, a layer
        at a time.
        """
        layers = range(modules.num_layers) if projection.experts else (None,)
        return [
            cls(lora, modules, projection, block, index, layer)
            for index, block in enumerate(blocks)
            for layer in layers
        ]

    def arrays(
        self, shards: int, empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the device needs to fill the block, in the adapter's own dtype.

        empty: makes arrays that may hold anything, of a shape and dtype.

        Returns a [layers, experts, parts, rank, d_in], b [layers, experts, stored width, rank]
        (rows placed for `shards` devices; the device transposes), and each part's scale [layers,
        experts, parts], float32. experts is 1 for a row that has none.
        """
        row, rank = self.projection, LORA_BLOCK_RANK
        packed = packed_layers(self.lora, self.modules, row, self.layer)
        starts = np.cumsum([0, *(part.width for part in row.parts)])
        dtype = staging_dtype(
            [part for layer in packed for one in layer for part in one.parts if part is not None]
        )
        count, experts, parts = len(packed), len(packed[0]), len(row.parts)
        a = empty((count, experts, parts, rank, row.d_in), dtype)
        b = empty((count, experts, int(starts[-1]), rank), dtype)
        scales = np.ones((count, experts, parts), np.float32)
        rows = slice(self.first_rank, self.first_rank + rank)
        for part in range(parts):
            places: list[tuple[int, int]] = []
            there: list[LoRALayerWeights] = []
            columns = slice(starts[part], starts[part + 1])
            for layer, expert in np.ndindex(count, experts):
                weights = packed[layer][expert].parts[part]
                if weights is None:
                    a[layer, expert, part], b[layer, expert, columns] = 0, 0
                else:
                    places.append((layer, expert))
                    there.append(weights)
                    scales[layer, expert, part] = weights.scaling
            _place([weights.lora_a[rows] for weights in there], places, a[:, :, part])
            _place([weights.lora_b[:, rows] for weights in there], places, b[:, :, columns])
        if shards > 1 or row.stored_width(1) > b.shape[2]:
            b = b[:, :, row.columns(shards)]
        return a, b, scales


def _place(matrices: list[np.ndarray], places: list[tuple[int, int]], into: np.ndarray) -> None:
    """Each matrix at the beginning of its place in the array, zeros after it.

    In few calls: those of a file are equally far apart in memory, if the layers are alike.
    """
    alike: dict[tuple, list[int]] = {}
    for index, matrix in enumerate(matrices):
        whose = index if matrix.base is None else id(matrix.base)
        alike.setdefault((whose, matrix.shape, matrix.strides, matrix.dtype), []).append(index)
    for (_, (rows, columns), *_), indices in alike.items():
        for run in _equally_far(indices, matrices):
            at = tuple(np.array([places[index] for index in run]).T)
            into[(*at, slice(rows), slice(columns))] = _side_by_side([matrices[i] for i in run])
            if rows < into.shape[-2]:
                into[(*at, slice(rows, None))] = 0
            if columns < into.shape[-1]:
                into[(*at, slice(rows), slice(columns, None))] = 0


def _address(matrix: np.ndarray) -> int:
    return matrix.__array_interface__["data"][0]


def _equally_far(indices: list[int], matrices: list[np.ndarray]) -> Iterable[list[int]]:
    """The indices in the order of their matrices in memory, parted where the distance changes."""
    where = {index: _address(matrices[index]) for index in indices}
    run: list[int] = []
    for index in sorted(indices, key=where.__getitem__):
        if len(run) > 1 and where[index] - where[run[-1]] != where[run[1]] - where[run[0]]:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _side_by_side(matrices: list[np.ndarray]) -> np.ndarray:
    """[matrices, rows, columns]: equally far apart in one piece of memory, they are not copied."""
    first = matrices[0]
    step = _address(matrices[1]) - _address(first) if len(matrices) > 1 else 0
    return np.lib.stride_tricks.as_strided(
        first, (len(matrices), *first.shape), (step, *first.strides), writeable=False
    )


def staging_dtype(layers: list[LoRALayerWeights]) -> np.dtype:
    """The dtype in which an adapter travels: its own when it has one, else float32."""
    dtypes = {tensor.dtype for layer in layers for tensor in (layer.lora_a, layer.lora_b)}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        if dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            return dtype
    return np.dtype(np.float32)


def packed_layers(
    lora: LoRAModel, modules: ModuleMap, projection: Projection, layer: int | None = None
) -> list[list[PackedLoRALayerWeights]]:
    """An adapter's weights of one projection, [layers][experts] (one expert where there are none).

    layer: only this one.
    """
    if not projection.per_layer:
        layers: Iterable[int] = (0,)
    else:
        layers = range(modules.num_layers) if layer is None else (layer,)
    parts = range(len(projection.parts))
    packed = []
    for at in layers:
        experts = [
            [lora.get_lora(modules.name(projection, part, at, expert)) for part in parts]
            for expert in range(projection.experts or 1)
        ]
        name = f"model.layers.{at}.{projection.module}"
        if projection.experts:
            packed.append(PackedLoRALayerWeights.pack_moe(name, experts))
        else:
            packed.append([PackedLoRALayerWeights.pack(f"{name}.{projection.name}", experts[0])])
    return packed


def blocks_needed(lora: LoRAModel, modules: ModuleMap) -> dict[str, int]:
    """Rank blocks an adapter takes in each projection; none where it changes nothing."""
    if lora.blocks_needed is None:
        rows = (*modules.projections, *modules.vocab_projections)
        ranks = dict.fromkeys((row.name for row in rows), 0)
        for module, weights in lora.loras.items():
            place = modules.place(module)
            assert place is not None  # the reader has looked
            name = place.projection.name
            ranks[name] = max(ranks[name], weights.rank)
        lora.blocks_needed = {
            name: -(-rank // LORA_BLOCK_RANK) for name, rank in ranks.items() if rank
        }
    return lora.blocks_needed


def most_blocks(adapter: LoRAModel | LoRAMixture, modules: ModuleMap) -> int:
    """The most rank blocks that an adapter takes in any projection."""
    taken: Counter[str] = Counter()
    for lora, _ in adapter.components:
        taken.update(blocks_needed(lora, modules))
    return max(taken.values(), default=0)
