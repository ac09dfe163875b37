"""A checkpoint of safetensors files: what it holds, and the parts of it that a device wants."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from jlora.config import ModelConfig
from jlora.model.weight_table import EMBED, HEAD, Weight, empty_part, swapped

# Buffers that old checkpoints hold and the model computes.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
# What Mixtral's checkpoints call the modules that the other families name alike.
_MIXTRAL = {
    "block_sparse_moe": "mlp",
    "w1.weight": "gate_proj.weight",
    "w2.weight": "down_proj.weight",
    "w3.weight": "up_proj.weight",
}
_FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_CHUNK = 1 << 26  # bytes of a tensor that a comparison looks at at a time


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file. dtype: by safetensors' name. offset: of its first byte."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part, copied from the file's pages; pages of other parts are not read."""
        dtype = np.dtype(_FLOATS[self.dtype])
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)[index]
        return np.memmap(self.path, dtype, "r", self.offset, self.shape)[index]


def find_checkpoint(model: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder or Hub repository, by its index when it has one."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{model}: no {', '.join(missing) or 'safetensors files'}")
    return files


def _header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a file, which the library has checked."""
    try:
        with safe_open(path, "numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return {
        name: FileTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


class SafetensorsCheckpoint:
    """Names and shapes are read at once, numbers when they are asked for."""

    def __init__(self, files: Iterable[Path], config: ModelConfig) -> None:
        self._config = config
        found = [
            (self._module_name(name), one) for path in files for name, one in _header(path).items()
        ]
        self._tensors, self._times = dict(found), Counter(name for name, _ in found)

    def _module_name(self, name: str) -> str:
        """A checkpoint's tensor by the name that it has in every family."""
        if self._config.model_type != "mixtral":
            return name
        return re.sub("|".join(_MIXTRAL), lambda match: _MIXTRAL[match[0]], name)

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor. Raises KeyError when there is none of this name."""
        return np.array(self._tensors[name][...])

    def faults(self, table: list[Weight]) -> list[str]:
        """Every missing, unknown, repeated and misshapen tensor."""
        wanted = {source.name: source for weight in table for source in weight.sources}
        faults = [f"{name} comes twice" for name, times in self._times.items() if times > 1]
        for name, tensor in self._tensors.items():
            shape, dtype = list(tensor.shape), _dtype_name(tensor.dtype)
            if name not in wanted:
                tied = name == HEAD and self._config.tie_word_embeddings
                if not tied and not _COMPUTED.fullmatch(name):
                    faults.append(f"unknown tensor {name} {shape}")
            elif tensor.shape != wanted[name].shape:
                faults.append(f"{name} has shape {shape}, expected {list(wanted[name].shape)}")
            elif tensor.dtype not in _FLOATS:
                faults.append(f"{name} is {dtype}, expected a floating point dtype")
        faults += [f"missing tensor {name}" for name in wanted if name not in self._tensors]
        if self._config.tie_word_embeddings and not self._same_ends():
            faults.append(
                f"{HEAD} differs from {EMBED}, but the model has tie_word_embeddings=True"
            )
        return faults

    def _same_ends(self) -> bool:
        """Whether the head of a tied model, if there is one, is the embedding."""
        one, other = self._tensors.get(EMBED), self._tensors.get(HEAD)
        if one is None or other is None:
            return True
        if one.shape != other.shape or not {one.dtype, other.dtype} <= _FLOATS.keys():
            return False
        rows = max(_CHUNK // (8 * max(one.shape[-1], 1)), 1)
        return all(
            np.array_equal(one[start : start + rows], other[start : start + rows])
            for start in range(0, one.shape[0], rows)
        )

    def array(self, weight: Weight, dtype: str, mesh: Mesh) -> jax.Array:
        """A weight on the devices: each gets its part of it, and transposes and casts that."""
        spec = swapped(weight.spec) if weight.transposed else weight.spec
        incoming = jax.make_array_from_callback(
            weight.ordered_shape,
            NamedSharding(mesh, spec),
            functools.partial(self._part, weight),
        )
        return _finish(
            incoming, weight.transposed, jnp.dtype(dtype), NamedSharding(mesh, weight.spec)
        )

    def _part(self, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
        """What one device holds of a weight, in Hugging Face's layout with the stored rows."""
        dtypes = {self._tensors[source.name].dtype for source in weight.sources}
        dtype = _FLOATS[dtypes.pop()] if len(dtypes) == 1 else np.float32
        if dtype == np.float64:  # which a device has not
            dtype = np.float32
        axis = weight.rows_axis
        part = empty_part(weight.ordered_shape, index, dtype)
        if sum(source.shape[0] for source in weight.sources) < weight.shape[0]:
            part[:] = 0  # a bias of some parts only
        experts = range(*index[0].indices(weight.ordered_shape[0]))  # where that is their axis
        for source, place, rows in weight.pieces(index[axis]):
            matrix = part
            if source.expert is not None:
                if source.expert not in experts:
                    continue
                matrix = part[source.expert - experts.start]
            matrix[place] = self._tensors[source.name][(rows, *index[axis + 1 :])]
        return part


def _dtype_name(name: str) -> str:
    """numpy's name of an integer dtype, else safetensors'."""
    return re.sub(r"^([IU])(\d+)$", lambda m: {"I": "int", "U": "uint"}[m[1]] + m[2], name)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _finish(value: jax.Array, transposed: bool, dtype: Any, sharding: Any) -> jax.Array:
    value = (jnp.swapaxes(value, -1, -2) if transposed else value).astype(dtype)
    return jax.lax.with_sharding_constraint(value, sharding)
