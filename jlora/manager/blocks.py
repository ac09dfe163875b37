"""Rank blocks: who holds which on the device, and what is to be written into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    ) -> BlockArrays:
        """What the device needs to fill the block; see `block_arrays`."""
        index = self.first_rank // LORA_BLOCK_RANK
        places = self.lora, self.modules, self.projection, self.layer
        return next(block_arrays(*places, [index], shards, empty))


# a [layers, experts, parts, rank, d_in], b [layers, experts, stored width, rank] (rows placed for
# the devices; the device transposes), both in the adapter's own dtype, and each part's scale
# [layers, experts, parts], float32. experts is 1 for a row that has none.
BlockArrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def block_arrays(
    lora: LoRAModel,
    modules: ModuleMap,
    row: Projection,
    layer: int | None,
    indices: Iterable[int],
    shards: int,
    empty: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty,
) -> Iterator[BlockArrays]:
    """What the device needs to fill blocks of a row: those of the adapter's with these indices.

    layer: the only one that they hold; None: all. empty: makes arrays that may hold anything, of a
    shape and dtype.
    """
    packed, rank = packed_layers(lora, modules, row, layer), LORA_BLOCK_RANK
    starts = np.cumsum([0, *(part.width for part in row.parts)])
    dtype = staging_dtype(
        [part for layer in packed for one in layer for part in one.parts if part is not None]
    )
    each = len(packed), len(packed[0])
    scales = np.ones((*each, len(row.parts)), np.float32)
    parts: list[_Part] = []
    for part in range(len(row.parts)):
        weights = {at: packed[at[0]][at[1]].parts[part] for at in np.ndindex(each)}
        there = {at: one for at, one in weights.items() if one is not None}
        for at, one in there.items():
            scales[(*at, part)] = one.scaling
        parts.append(_Part.of(there, absent=[at for at in weights if at not in there]))
    order = row.columns(shards)
    moves = not np.array_equal(order, np.arange(starts[-1]))
    for index in indices:
        ranks = slice(index * rank, (index + 1) * rank)
        a = empty((*each, len(row.parts), rank, row.d_in), dtype)
        stored = empty((*each, row.stored_width(shards), rank), dtype)
        b = np.empty((*each, int(starts[-1]), rank), dtype) if moves else stored
        for part, gathered in enumerate(parts):
            gathered.fill(a[:, :, part], b[:, :, starts[part] : starts[part + 1]], ranks)
        if moves:
            stored[:] = b[:, :, order]
        yield a, stored, scales


_Places = tuple[np.ndarray, np.ndarray]  # layers and experts
_Run = tuple[_Places, np.ndarray]  # and the matrices of them all


@dataclass(frozen=True)
class _Part:
    """Where the A and B of a projection's part are in memory, and which layers have none."""

    absent: list[tuple[int, int]]
    a: list[_Run]
    b: list[_Run]

    @classmethod
    def of(
        cls, layers: dict[tuple[int, int], LoRALayerWeights], absent: list[tuple[int, int]]
    ) -> _Part:
        """layers, absent: by layer and expert."""
        each_a = {at: one.lora_a for at, one in layers.items()}
        each_b = {at: one.lora_b for at, one in layers.items()}
        return cls(absent, list(_runs(each_a)), list(_runs(each_b)))

    def fill(self, a: np.ndarray, b: np.ndarray, ranks: slice) -> None:
        """Fills a block: a [layers, experts, rank, d_in], b [layers, experts, d_out, rank]."""
        for place in self.absent:
            a[place] = b[place] = 0
        for places, matrices in self.a:
            _place(matrices[:, ranks], places, a)
        for places, matrices in self.b:
            _place(matrices[:, :, ranks], places, b)


def _runs(matrices: dict[tuple[int, int], np.ndarray]) -> Iterator[_Run]:
    """Matrices by place, those together that can be copied in one call.

    Those of a file are equally far apart in memory, if the layers are alike.
    """
    alike: dict[tuple, list[tuple[int, int]]] = {}
    for place, matrix in matrices.items():
        whose = place if matrix.base is None else id(matrix.base)
        alike.setdefault((whose, matrix.shape, matrix.strides, matrix.dtype), []).append(place)
    for places in alike.values():
        for run in _equally_far(places, matrices):
            layers, experts = np.array(run).T
            yield (layers, experts), _side_by_side([matrices[place] for place in run])


def _place(matrices: np.ndarray, places: _Places, into: np.ndarray) -> None:
    """Each matrix at the beginning of its place in the array, zeros after it."""
    rows, columns = matrices.shape[1:]
    together = matrices.strides[-1] == matrices.itemsize and matrices.dtype == into.dtype
    if together and columns:
        _in_pieces(into[..., :rows, :columns])[places] = _in_pieces(matrices)
    else:
        into[..., :rows, :columns][places] = matrices
    if rows < into.shape[-2]:
        into[..., rows:, :][places] = 0
    if columns < into.shape[-1]:
        rest = _in_pieces(into[..., :rows, columns:])
        rest[places] = np.zeros((), rest.dtype)


def _in_pieces(array: np.ndarray) -> np.ndarray:
    """[..., 1]: each row as one piece of memory, which numpy copies up to three times as fast."""
    return array.view(np.dtype((np.void, array.shape[-1] * array.itemsize)))


def _address(matrix: np.ndarray) -> int:
    return matrix.__array_interface__["data"][0]


def _equally_far(
    places: list[tuple[int, int]], matrices: dict[tuple[int, int], np.ndarray]
) -> Iterator[list[tuple[int, int]]]:
    """The places in the order of their matrices in memory, parted where the distance changes."""
    where = {place: _address(matrices[place]) for place in places}
    run: list[tuple[int, int]] = []
    for place in sorted(places, key=where.__getitem__):
        if len(run) > 1 and where[place] - where[run[-1]] != where[run[1]] - where[run[0]]:
            yield run
            run = []
        run.append(place)
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
