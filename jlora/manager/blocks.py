"""Rank blocks: who holds which on the device, and what is to be written into one."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jlora.config import LORA_BLOCK_RANK
from jlora.manager.lora_model import LoRALayerWeights, LoRAModel, PackedLoRALayerWeights
from jlora.projections import ModuleMap, Projection


class BlockPool:
    """Free list and reference counts of the rank blocks of one projection."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with one reference each; the caller has looked at num_free."""
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One reference more to each."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each; those without any are free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)


class SlotMap:
    """Which blocks of one projection each slot holds, as the kernels read it.

    blocks: int32 [slots, max_blocks]. counts: int32 [slots]. scales: float32 [slots, max_blocks].
    """

    def __init__(self, slots: int, max_blocks: int) -> None:
        self.blocks = np.zeros((slots, max_blocks), np.int32)
        self.counts = np.zeros(slots, np.int32)
        self.scales = np.ones((slots, max_blocks), np.float32)

    def set(self, slot: int, blocks: list[int]) -> None:
        """The slot holds exactly these, each with scale 1."""
        self.blocks[slot] = 0
        self.blocks[slot, : len(blocks)] = blocks
        self.counts[slot] = len(blocks)

    def get(self, slot: int) -> list[int]:
        """The blocks of a slot."""
        return self.blocks[slot, : self.counts[slot]].tolist()


class BlockWrite:
    """One rank block to be written: rows `first_rank` and on of an adapter's projection."""

    def __init__(
        self, lora: LoRAModel, modules: ModuleMap, projection: Projection, block: int, index: int
    ) -> None:
        """block: where in the pool; index: which block of the adapter, from 0."""
        self.lora, self.modules, self.projection = lora, modules, projection
        self.block, self.first_rank = block, index * LORA_BLOCK_RANK

    def arrays(self, shards: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the device needs to fill the block, in the adapter's own dtype.

        Returns a [layers, parts, rank, d_in], b [layers, stored width, rank] (rows placed for
        `shards` devices; the device transposes), and each part's scale [layers, parts], float32.
        """
        packed = packed_layers(self.lora, self.modules, self.projection)
        parts = self.projection.parts
        widths = [part.width for part in parts]
        starts = np.cumsum([0, *widths])
        layers = [part for layer in packed for part in layer.parts if part is not None]
        dtype = staging_dtype(layers)
        rank = LORA_BLOCK_RANK
        a = np.zeros((len(packed), len(parts), rank, self.projection.d_in), dtype)
        b = np.zeros((len(packed), int(starts[-1]), rank), dtype)
        scales = np.ones((len(packed), len(parts)), np.float32)
        rows = slice(self.first_rank, self.first_rank + rank)
        for index, layer in enumerate(packed):
            for part, weights in enumerate(layer.parts):
                if weights is None:
                    continue
                piece = weights.lora_a[rows]
                a[index, part, : len(piece)] = piece
                b[index, starts[part] : starts[part + 1], : len(piece)] = weights.lora_b[:, rows]
                scales[index, part] = weights.scaling
        if shards > 1:
            b = b[:, self.projection.columns(shards)]
        return a, b, scales


def staging_dtype(layers: list[LoRALayerWeights]) -> np.dtype:
    """The dtype in which an adapter travels: its own when it has one, else float32."""
    dtypes = {tensor.dtype for layer in layers for tensor in (layer.lora_a, layer.lora_b)}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        if dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            return dtype
    return np.dtype(np.float32)


def packed_layers(
    lora: LoRAModel, modules: ModuleMap, projection: Projection
) -> list[PackedLoRALayerWeights]:
    """An adapter's weights of one projection, layer by layer."""
    return [
        PackedLoRALayerWeights.pack(
            f"model.layers.{layer}.{projection.module}.{projection.name}",
            [
                lora.get_lora(modules.name(projection, part, layer))
                for part in range(len(projection.parts))
            ],
        )
        for layer in range(modules.num_layers)
    ]


def blocks_needed(lora: LoRAModel, modules: ModuleMap) -> dict[str, int]:
    """Rank blocks an adapter takes in each projection; 0 where it changes nothing."""
    if lora.blocks_needed is None:
        ranks = {
            row.name: max(layer.rank for layer in packed_layers(lora, modules, row))
            for row in modules.projections
        }
        lora.blocks_needed = {name: -(-rank // LORA_BLOCK_RANK) for name, rank in ranks.items()}
    return lora.blocks_needed
