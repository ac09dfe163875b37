"""The table of a model's parameters: what fills each, how it is divided, how it is stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jlora.config import ModelConfig
from jlora.model.layers import AXIS
from jlora.model.vocabulary import stored_vocab
from jlora.projections import ModuleMap, Part, Piece, Projection, layer_norms

Path_ = tuple[Any, ...]
WHOLE = PartitionSpec()  # every device has all of it
_ALIGNMENT = 64
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor that fills rows `start : start + shape[0]` of a weight or an expert."""

    name: str
    start: int
    shape: tuple[int, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Weight:
    """One parameter of the model and what fills it.

    In Hugging Face's layout it is [rows, ...]; `rows_order` (None: as they come) lists the row
    of each stored one, `transposed` weights are stored [d_in, rows]; spec shards the stored one.
    Those of experts have one more axis in front.
    """

    path: Path_
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec
    rows_order: np.ndarray | None = None
    transposed: bool = False

    @property
    def rows_axis(self) -> int:
        """Which axis the rows are in Hugging Face's layout."""
        return len(self.shape) // 3

    @property
    def ordered_shape(self) -> tuple[int, ...]:
        """In Hugging Face's layout, with the rows that are stored."""
        rows = self.shape[self.rows_axis] if self.rows_order is None else len(self.rows_order)
        return (*self.shape[: self.rows_axis], rows, *self.shape[self.rows_axis + 1 :])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return swapped(self.ordered_shape) if self.transposed else self.ordered_shape

    def runs(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Which rows of Hugging Face's a range of stored rows is, as ranges.

        Each with where it lies in that range; one row for several places repeats there.
        """
        start, stop, _ = rows.indices(self.ordered_shape[self.rows_axis])
        if self.rows_order is None:
            yield slice(0, stop - start), slice(start, stop)
            return
        order = self.rows_order[start:stop]
        steps = np.diff(order)
        together = (steps == 0) | (steps == 1)
        cuts = ~together
        cuts[1:] |= together[:-1] & (steps[1:] != steps[:-1])
        edges = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(order)]
        for first, last in itertools.pairwise(edges):
            yield slice(first, last), slice(int(order[first]), int(order[last - 1]) + 1)

    def pieces(self, rows: slice) -> Iterator[tuple[Source, slice, slice]]:
        """What fills a range of stored rows: a tensor, where in the range, which of its rows."""
        for place, run in self.runs(rows):
            for source in self.sources:
                first = max(run.start, source.start)
                last = min(run.stop, source.start + source.shape[0])
                if first >= last:
                    continue
                at = slice(place.start + first - run.start, place.start + last - run.start)
                repeats = run.stop - run.start == 1
                mine = slice(first - source.start, last - source.start)
                yield source, place if repeats else at, mine


def swapped(axes: Any) -> Any:
    """A shape or PartitionSpec with its last two axes exchanged."""
    exchanged = (*axes[:-2], axes[-1], axes[-2])
    return PartitionSpec(*exchanged) if isinstance(axes, PartitionSpec) else exchanged


def empty_part(shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Memory for a part of an array, which holds anything.

    It is aligned so that a CPU device takes it over without a copy.
    """
    sizes = [len(range(*at.indices(size))) for at, size in zip(index, shape, strict=True)]
    nbytes = math.prod(sizes) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(sizes)


def weight_table(config: ModelConfig, shards: int) -> list[Weight]:
    """Every parameter of `Decoder(config, shards)`."""
    modules = ModuleMap(config)
    hidden, vocab = config.hidden_size, config.vocab_size
    order = None
    stored = stored_vocab(config, shards)
    if stored != vocab:  # what is past the vocabulary repeats the last row, and is cut off
        order = np.minimum(np.arange(stored), vocab - 1)

    def whole(path: Path_, name: str, *shape: int, spec: PartitionSpec = WHOLE) -> Weight:
        return Weight(path, (Source(name, 0, shape),), shape, spec, order if spec else None)

    vocab_spec = PartitionSpec(AXIS, None)
    table = [
        whole(("embed", "weight"), EMBED, vocab, hidden, spec=vocab_spec),
        whole(("norm", "weight"), "model.norm.weight", hidden),
    ]
    if not config.tie_word_embeddings:
        table.append(whole(("lm_head", "weight"), HEAD, vocab, hidden, spec=vocab_spec))
    for layer in range(config.num_layers):
        at, prefix = ("layers", layer), f"model.layers.{layer}"
        for place, name in layer_norms(config).items():
            table.append(whole((*at, f"{place}_norm", "weight"), f"{prefix}.{name}.weight", hidden))
        table += _qk_norm_weights(config, layer, shards)
        for row in modules.projections:
            table += _projection_weights(modules, row, layer, shards)
    return table


def _qk_norm_weights(config: ModelConfig, layer: int, shards: int) -> list[Weight]:
    table: list[Weight] = []
    if not config.qk_norm:
        return table
    for norm, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
        path = ("layers", layer, "attention", norm, "weight")
        name = f"model.layers.{layer}.self_attn.{norm}.weight"
        if config.qk_norm_whole:  # divided and copied as the columns that it norms
            width = heads * config.head_dim
            columns = Projection("", "", (Part("", (Piece(width, heads),)),), 0, "out")
            order = columns.columns(shards) if shards > 1 else None
            spec = PartitionSpec(AXIS)
            table.append(Weight(path, (Source(name, 0, (width,)),), (width,), spec, order))
        else:
            shape = (config.head_dim,)
            table.append(Weight(path, (Source(name, 0, shape),), shape, WHOLE))
    return table


def _projection_weights(
    modules: ModuleMap, row: Projection, layer: int, shards: int
) -> list[Weight]:
    weights, biases, rows = [], [], sum(part.width for part in row.parts)
    for expert in range(row.experts or 1):
        start, of = 0, expert if row.experts else None
        for index, part in enumerate(row.parts):
            name, shape = modules.name(row, index, layer, expert), (part.width, row.d_in)
            weights.append(Source(f"{name}.weight", start, shape, of))
            if part.bias:
                biases.append(Source(f"{name}.bias", start, (part.width,)))
            start += part.width
    order = row.columns(shards) if shards > 1 and row.shard == "out" else None
    d_in, out = (AXIS if row.shard == shard else None for shard in ("in", "out"))
    front = (row.experts,) if row.experts else ()
    spec_front = (AXIS if row.shard == "experts" else None,) if row.experts else ()
    shape, spec = (*front, rows, row.d_in), PartitionSpec(*spec_front, d_in, out)
    transposed = not row.output_first
    spec = spec if transposed else swapped(spec)
    at = ("layers", layer, "attention" if row.module == "self_attn" else "mlp", row.name)
    table = [Weight((*at, "weight"), tuple(weights), shape, spec, order, transposed)]
    if row.bias:
        spec = PartitionSpec(out) if out else WHOLE
        table.append(Weight((*at, "bias"), tuple(biases), (rows,), spec, order))
    return table
