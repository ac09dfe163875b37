"""The arrays of the adapter pool on the devices, and what writes into them in place."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.engine.joined import joined
from jlora.engine.pool_functions import (
    layers_of,
    part_of,
    replace_all,
    replace_blocks,
    replace_magnitudes,
)
from jlora.engine.pool_layout import MATRIX, WHOLE, Held, pool_layout, staged_specs
from jlora.engine.staging import PlacedBlock, StagedBlock
from jlora.kernels import SlotTable
from jlora.manager import feature_rows, pool_rows
from jlora.model import (
    AXIS,
    AdapterState,
    LoadedModel,
    RowPool,
    TokenRows,
    as_argument,
    place_on,
)
from jlora.projections import HEAD, Feature, ModuleMap, Projection

STAGING_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class PoolArrays:
    """Allocates the pool and writes into it; `state` is what a step reads."""

    def __init__(
        self,
        modules: ModuleMap,
        config: LoRAConfig,
        dtype: jnp.dtype,
        mesh: Mesh,
        model: LoadedModel,
    ) -> None:
        """Allocates what the config reserves; no adapter is there.

        specs: how `state` is divided.
        """
        self._modules, self._config, self._mesh = modules, config, mesh
        self._shards, self._dtype, self._model = mesh.shape[AXIS], dtype, model
        self._executables: dict[tuple, jax.stages.Compiled] = {}
        kinds = defaultdict[tuple, list[str]](list)
        for row in pool_rows(modules, config):
            kinds[layers_of(row)].append(row.name)
        self._together = [tuple(names) for names in kinds.values()]  # rows that one call writes
        layout = pool_layout(modules, config, dtype, self._shards)
        self.specs: AdapterState = jax.tree.map(lambda held: held.spec, layout)
        self.state: AdapterState = jax.tree.map(self._filled, layout)

    def _filled(self, held: Held) -> Array:
        make = functools.partial(jnp.full, held.shape, held.value, held.dtype)
        return jax.jit(make, out_shardings=NamedSharding(self._mesh, held.spec))()

    def _put(self, value: Any, spec: PartitionSpec = WHOLE) -> Any:
        return place_on(value, NamedSharding(self._mesh, spec))

    @property
    def adapts_vocabulary(self) -> bool:
        """Whether adapters may change the logits other than by the hidden state."""
        state = self.state
        return HEAD in state.rows or bool(state.token_rows) or bool(state.full)

    def row(self, name: str) -> Projection:
        """A row of the projection table, also of the vocabulary."""
        every = (*pool_rows(self._modules, self._config), *self._modules.vocab_projections)
        return next(row for row in every if row.name == name)

    def compile(self) -> None:
        """Compiles the writes by writing zeros, while no adapter is there."""
        for dtype in STAGING_DTYPES:
            zeros = {
                row.name: PlacedBlock(row, 0, 0, *self._empty_block(row, dtype))
                for row in pool_rows(self._modules, self._config)
            }
            for names in dict.fromkeys([*self._together, *((name,) for name in zeros)]):
                self.write_blocks([zeros[name] for name in names])
        for row in feature_rows(self._modules, self._config):
            pool, width = self.state.rows[row.name], row.stored_width(self._shards)
            layers = self._modules.num_layers if row.per_layer else 1
            if pool.magnitude is not None:
                self._write_magnitudes(row, 0, np.ones((layers, width), np.float32))
            if pool.bias is not None:
                self._write_biases(row, 0, np.zeros((layers, width), np.float32))
        for name, own in self.state.token_rows.items():
            count, width = own.rows.shape[1:]
            ids = np.full(count, -1, np.int32)
            self._write_token_rows(name, 0, ids, np.zeros((count, width), np.float32))
        for name, full in self.state.full.items():
            self._write_matrix(name, 0, np.zeros(full.shape[1:], self._dtype))

    def block_shapes(self, row: Projection) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b of a block of a row on its way here, see BlockArrays."""
        layers = 1 if row.experts or not row.per_layer else self._modules.num_layers
        each = (layers, row.experts or 1)
        a = (*each, len(row.parts), LORA_BLOCK_RANK, row.d_in)
        return a, (*each, row.stored_width(self._shards), LORA_BLOCK_RANK)

    def _empty_block(self, row: Projection, dtype: np.dtype) -> StagedBlock:
        a, b = self.block_shapes(row)
        a_in, b_in = staged_specs(row, self._config.fully_sharded_loras)
        zeros = self._put(np.zeros(a, dtype), a_in), self._put(np.zeros(b, dtype), b_in)
        return *zeros, np.ones(a[:3], np.float32)

    def _run(
        self,
        key: tuple,
        make: Callable[[], Callable],
        donated: tuple[int, ...],
        specs: Any,
        *arguments: Any,
    ) -> Any:
        """Runs a function, made and compiled on first use, whose results are divided by specs.

        arguments: arrays on the devices, and small ones of the host that every device is to have.
        """
        whole = NamedSharding(self._mesh, WHOLE)
        arguments = tuple(
            as_argument(one, whole) if isinstance(one, np.ndarray) else one for one in arguments
        )
        if key not in self._executables:
            function = make()
            shardings = jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), specs)
            jitted = jax.jit(function, donate_argnums=donated, out_shardings=shardings)
            described = [
                jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole)
                if isinstance(one, np.ndarray)
                else one
                for one in arguments
            ]
            self._executables[key] = jitted.lower(*described).compile()
        return self._executables[key](*arguments)

    def _each_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function, called with one device's share of everything."""
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _set_row(self, name: str, **changes: Any) -> None:
        rows = {**self.state.rows, name: dataclasses.replace(self.state.rows[name], **changes)}
        self.state = dataclasses.replace(self.state, rows=rows)

    def write_blocks(self, blocks: Sequence[PlacedBlock]) -> None:
        """Writes blocks into different rows: in one call when they are all rows of their kind.

        Each call that writes takes most of a millisecond of a step.
        """
        names = tuple(one.row.name for one in blocks)
        dtypes = {one.a.dtype for one in blocks}
        if len(blocks) > 1 and (len(dtypes) > 1 or names not in self._together):
            for one in blocks:
                self.write_blocks([one])
            return
        small = []
        for one in blocks:
            small += [np.array([one.layer, one.block], np.int32), one.scales]
        pools = [self.state.rows[name] for name in names]
        specs = [(one.a, one.b) for one in (self.specs.rows[name] for name in names)]

        def make() -> Callable:
            function = functools.partial(
                replace_blocks,
                like=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in small],
                part_of=[part_of(one.row, self._shards) for one in blocks],
            )
            fully = self._config.fully_sharded_loras
            incoming = [staged_specs(one.row, fully) for one in blocks]
            return self._each_device(function, (specs, WHOLE, incoming), specs)

        written = self._run(
            ("blocks", names, *dtypes),
            make,
            (0,),
            specs,
            [(one.a, one.b) for one in pools],
            joined(small),
            [(one.a, one.b) for one in blocks],
        )
        rows = {
            name: dataclasses.replace(pool, a=a, b=b)
            for name, pool, (a, b) in zip(names, pools, written, strict=True)
        }
        self.state = dataclasses.replace(self.state, rows=self.state.rows | rows)

    def set_tables(self, tables: list[np.ndarray]) -> None:
        """tables: blocks, counts and scales of every row's slots, then the feature table."""
        old = jax.tree.leaves([row.slots for row in self.state.rows.values()])
        old.append(self.state.features)
        *placed, features = self._run(
            ("tables",), lambda: replace_all, (0,), [WHOLE] * len(old), old, joined(tables)
        )
        rows = {
            name: dataclasses.replace(row, slots=SlotTable(*placed[3 * at : 3 * at + 3]))
            for at, (name, row) in enumerate(self.state.rows.items())
        }
        self.state = dataclasses.replace(self.state, rows=rows, features=features)

    def write_feature(
        self, feature: Feature, name: str, at: int, values: tuple[np.ndarray, ...]
    ) -> None:
        """at: FeatureWrite.index. values: as `_feature_arrays` gives them."""
        row = self.row(name)
        match feature:
            case Feature.MAGNITUDE:
                self._write_magnitudes(row, at, *values)
            case Feature.BIAS:
                self._write_biases(row, at, *values)
            case Feature.EMBED_ROWS | Feature.HEAD_ROWS:
                self._write_token_rows(name, at, *values)
            case _:
                self._write_matrix(name, at, *values)

    def _write_biases(self, row: Projection, slot: int, values: np.ndarray) -> None:
        """values: float32 [layers, stored width]."""
        spec = self.specs.rows[row.name].bias
        new = self._run(
            ("bias", row.name),
            lambda: (
                lambda old, slot, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, slot, 0))
            ),
            (0,),
            spec,
            self.state.rows[row.name].bias,
            np.array(slot, np.int32),
            self._put(values, PartitionSpec(None, *spec[2:])),
        )
        self._set_row(row.name, bias=new)

    def _write_magnitudes(self, row: Projection, slot: int, values: np.ndarray) -> None:
        """values: float32 [layers, stored width], NaN where there is none; a layer a call."""
        name, specs = row.name, self.specs.rows[row.name]
        spec = specs.magnitude
        staged = self._put(values, PartitionSpec(None, *spec[2:]))

        def make() -> Callable:
            whole = RowPool(specs.a, specs.b, specs.slots)
            weight = self._model.weight(name, 0)[1]
            vocab = self._modules.config.vocab_size
            function = functools.partial(
                replace_magnitudes, row=row, shards=self._shards, vocab=vocab
            )
            all_specs = (spec, weight, whole, WHOLE, PartitionSpec(None, *spec[2:]))
            return self._each_device(function, all_specs, spec)

        for layer in range(len(values)):
            pool = self.state.rows[name]
            weight, _ = self._model.weight(name, layer)
            new = self._run(
                ("magnitude", name),
                make,
                (0,),
                spec,
                pool.magnitude,
                weight,
                dataclasses.replace(pool, magnitude=None, bias=None),
                np.array([layer, slot], np.int32),
                staged,
            )
            self._set_row(name, magnitude=new)

    def _write_token_rows(self, name: str, slot: int, ids: np.ndarray, rows: np.ndarray) -> None:
        """ids: int32 [rows], -1 past the last; rows: float32 [rows, hidden]."""

        def write(old: TokenRows, slot: Array, ids: Array, rows: Array) -> TokenRows:
            update = jax.lax.dynamic_update_slice
            return TokenRows(
                update(old.ids, ids[None], (slot, 0)),
                update(old.rows, rows[None].astype(old.rows.dtype), (slot, 0, 0)),
            )

        old = self.state.token_rows[name]
        arguments = np.array(slot, np.int32), ids, self._put(rows)
        new = self._run(
            ("rows", name), lambda: write, (0,), TokenRows(WHOLE, WHOLE), old, *arguments
        )
        tokens = {**self.state.token_rows, name: new}
        self.state = dataclasses.replace(self.state, token_rows=tokens)

    def _write_matrix(self, name: str, index: int, matrix: np.ndarray) -> None:
        """matrix: [stored vocabulary, hidden], in the pool's dtype."""
        new = self._run(
            ("matrix", name),
            lambda: lambda old, at, new: jax.lax.dynamic_update_slice(old, new[None], (at, 0, 0)),
            (0,),
            MATRIX,
            self.state.full[name],
            np.array(index, np.int32),
            self._put(matrix, PartitionSpec(AXIS, None)),
        )
        self.state = dataclasses.replace(self.state, full={**self.state.full, name: new})
