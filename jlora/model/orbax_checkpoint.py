"""A model's packed weights as an Orbax checkpoint, which any number of devices can read.

Under `weights/` of a folder lie the arrays of `weight_table(config, 1)` as they are stored:
fused, experts together, in the model's dtype, by their paths in `LoadedModel.params`; transposed
but for the experts' gate and up. Devices pick their rows and columns of them, so nothing depends
on how many there are.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jlora.config import ModelConfig
from jlora.model.weight_table import Weight, empty_part, swapped, weight_table
from jlora.orbax_files import OrbaxFiles, is_orbax_checkpoint

FOLDER = "weights"
LAYOUT = 2  # changes whenever these arrays would mean something else


def has_orbax_weights(folder: Path) -> bool:
    """Whether a model's folder holds a whole conversion."""
    return is_orbax_checkpoint(folder / FOLDER)


class OrbaxCheckpoint:
    """Names, shapes and dtypes are read at once, numbers when they are asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """folder: the model's, with `weights/` in it."""
        if not has_orbax_weights(folder):
            raise FileNotFoundError(
                f"{folder}: no whole Orbax checkpoint in {FOLDER}/ (jlora convert makes one)"
            )
        self._config, self._files = config, OrbaxFiles(folder / FOLDER)

    def faults(self, table: list[Weight]) -> list[str]:
        """Another layout, and every missing, unknown and misshapen array."""
        dtype, found = np.dtype(self._config.dtype), self._files.custom_metadata
        faults = []
        if found.get("jlora_layout") != LAYOUT:
            faults.append(
                f"its layout is {found.get('jlora_layout')!r}, expected {LAYOUT}: "
                "make it again by this version's jlora convert"
            )
        wanted = {keys_of(weight): weight for weight in table}
        for keys, array in self._files.items():
            name = ".".join(keys)
            if keys not in wanted:
                faults.append(f"unknown array {name} {list(array.shape)}")
                continue
            shape = _shape(wanted[keys])
            if array.shape != shape:
                faults.append(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
            if array.dtype != dtype:
                faults.append(
                    f"{name} is {array.dtype}, expected {dtype} (jlora convert --dtype {dtype})"
                )
        missing = [".".join(keys) for keys in wanted if keys not in self._files]
        return faults + [f"missing array {name}" for name in missing]

    def array(self, weight: Weight, dtype: str, mesh: Mesh) -> jax.Array:
        """A weight on the devices, each of which gets its part of it. dtype: as it is stored."""
        return jax.make_array_from_callback(
            weight.stored_shape,
            NamedSharding(mesh, weight.spec),
            functools.partial(self._part, weight),
        )

    def _part(self, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
        """What one device holds of a weight."""
        array = self._files[keys_of(weight)]
        axis = len(index) - 1 if weight.transposed else weight.rows_axis
        parts = [
            ((slice(None),) * axis + (place,), (*index[:axis], rows, *index[axis + 1 :]))
            for place, rows in weight.runs(index[axis])
        ]
        part = empty_part(weight.stored_shape, index, array.dtype)
        array.read_into([(part[place], source) for place, source in parts])
        return part

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by Hugging Face's name, in its layout. Raises KeyError for an unknown one."""
        weight, source = self._sources[name]
        rows = slice(source.start, source.start + source.shape[0])
        expert = () if source.expert is None else (source.expert,)
        if not weight.transposed:
            return self._files[keys_of(weight)][(*expert, rows)]
        return np.ascontiguousarray(self._files[keys_of(weight)][(*expert, slice(None), rows)].T)

    @functools.cached_property
    def _sources(self) -> dict[str, Any]:
        table = weight_table(self._config, 1)
        return {source.name: (weight, source) for weight in table for source in weight.sources}


def keys_of(weight: Weight) -> tuple[str, ...]:
    """Where a weight is in the checkpoint."""
    return tuple(str(key) for key in weight.path)


def _shape(weight: Weight) -> tuple[int, ...]:
    """As it is stored without copies of rows."""
    return swapped(weight.shape) if weight.transposed else weight.shape
