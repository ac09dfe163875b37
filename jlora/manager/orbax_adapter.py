"""Adapters that JAX trainers saved with Orbax, as what PEFT would have saved: names and config.

Names are jlora's (`<module>.lora_a`, `<module>.lora_b`, or PEFT's), or those of Qwix, with the
modules of Tunix's models or of Hugging Face's (`<module>.w_lora_a`, `<module>.kernel_lora_b`).
docs/adapters.md describes both.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jlora.errors import AdapterError
from jlora.files import read_json
from jlora.orbax_files import OrbaxError, OrbaxFiles, StoredArray, is_orbax_checkpoint

ORBAX_CONFIG_NAME = "jlora_adapter.json"
# Where a checkpoint may lie in an adapter's folder: itself, jlora's layout, a step of Tunix's, of
# Orbax' CheckpointManager, and what its save_pytree makes.
_PLACES = (".", "adapter", "model_params", "default", "state", "pytree")
LARGEST_CONFIG = 1 << 25  # bytes of a configuration
_QWIX = re.compile(r"(?P<parameter>.+)_lora_(?P<which>[ab])")
_WEIGHTS = ("w", "kernel")  # what Tunix's and Flax' modules call the matrix that was adapted
# Modules of Tunix: the Hugging Face ones whose columns they hold, one after the other.
_TUNIX_MODULES = {
    "attn": ("self_attn",),
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


@dataclass(frozen=True)
class OrbaxTensor:
    """An array of a checkpoint in PEFT's shape; read when it is asked for.

    make: from what is stored.
    """

    stored: StoredArray
    shape: tuple[int, ...]
    make: Callable[[np.ndarray], np.ndarray]

    @property
    def dtype(self) -> Any:
        """A numpy dtype, or the name of one that numpy has not."""
        return self.stored.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.ascontiguousarray(self.make(self.stored[...])[rows])


def orbax_folder(folder: Path) -> Path | None:
    """The checkpoint of an adapter's folder, if it has one."""
    return next((folder / at for at in _PLACES if is_orbax_checkpoint(folder / at)), None)


def orbax_file_names(folder: Path) -> list[str]:
    """Of all files that such an adapter is made of, from its folder on."""
    checkpoint = orbax_folder(folder)
    if checkpoint is None:
        return []
    found = [
        os.path.relpath(os.path.join(above, name), folder)
        for above, _, names in os.walk(checkpoint)
        for name in names
    ]
    return sorted({ORBAX_CONFIG_NAME, *found})


def read_orbax(folder: Path, adapter: str) -> tuple[dict[str, Any], dict[str, OrbaxTensor]]:
    """What PEFT's adapter_config.json would hold, and the tensors by PEFT's names.

    Reads names and shapes only. Raises AdapterError for an array that has no such name.
    """
    checkpoint = orbax_folder(folder)
    assert checkpoint is not None  # the caller has looked
    given = _config(folder, adapter)
    try:
        arrays = OrbaxFiles(checkpoint)
    except OrbaxError as error:
        raise AdapterError(f"{adapter}: {error}") from error
    tensors: dict[str, OrbaxTensor] = {}
    for keys, array in arrays.items():
        for name, tensor in _placed(keys, array, adapter):
            if name in tensors:
                raise AdapterError(f"{adapter}: {name} is there twice, as {'.'.join(keys)} too")
            tensors[name] = tensor
    config = {**_from_arrays(given, tensors), **given}
    if "r" not in config:
        raise AdapterError(
            f"{adapter}: none of its arrays is a lora_a, from which its rank would follow; found "
            f"{sorted(tensors)[:10]}"
        )
    return config, tensors


def _config(folder: Path, adapter: str) -> dict[str, Any]:
    """What the trainer knew and the arrays do not say."""
    path = folder / ORBAX_CONFIG_NAME
    example = '{"lora_alpha": 16}'
    if not path.is_file():
        raise AdapterError(
            f"{adapter}: {folder} is an Orbax checkpoint without {ORBAX_CONFIG_NAME}, so its alpha "
            f"is not known; write that file, for instance {example}"
        )
    try:
        config = read_json(path, LARGEST_CONFIG)
    except ValueError as error:
        raise AdapterError(f"{adapter}: {error}") from error
    if not isinstance(config, dict) or "lora_alpha" not in config:
        raise AdapterError(
            f"{adapter}: {path} has no lora_alpha; expected, for instance, {example}"
        )
    return config


def _placed(
    keys: tuple[str, ...], array: StoredArray, adapter: str
) -> Iterator[tuple[str, OrbaxTensor]]:
    """The tensors that an array is, by PEFT's names: one, or one for each part of a fused module.

    array: of lora_a [..., rank], the input in one axis or several; of lora_b [rank, ...]; else as
    PEFT has it.
    """
    parts = ".".join(keys).removeprefix("params.").split(".")  # of a Linen module
    if parts[-1] in ("value", "raw_value"):  # of an NNX variable
        parts.pop()
    module, last = parts[:-1], parts[-1]
    qwix = _QWIX.fullmatch(last)
    if qwix is not None and qwix["parameter"] in _WEIGHTS:
        modules, which = _huggingface(module), qwix["which"]
    elif last in ("lora_a", "lora_b"):
        modules, which = [".".join(module)], last[-1]
    elif qwix is None:
        yield ".".join(parts), OrbaxTensor(array, array.shape, lambda value: value)
        return
    else:
        _refuse(keys, array, adapter, "only matrices of linear modules can have an adapter")
    if len(array.shape) < 2 or 0 in array.shape:
        _refuse(keys, array, adapter, "expected two axes or more")
    count = len(modules)
    if which == "b" and count > 1 and array.shape[1] != count:
        _refuse(keys, array, adapter, f"expected {count} in its second axis, for {modules}")
    for index, one in enumerate(modules):
        if which == "a":
            yield f"{one}.lora_A.weight", _lora_a(array)
        else:
            yield f"{one}.lora_B.weight", _lora_b(array, index, count)


def _lora_a(array: StoredArray) -> OrbaxTensor:
    """[rank, d_in] of [..., rank]."""
    rank, width = array.shape[-1], math.prod(array.shape[:-1])
    return OrbaxTensor(array, (rank, width), lambda value: value.reshape(width, rank).T)


def _lora_b(array: StoredArray, part: int, count: int) -> OrbaxTensor:
    """[d_out, rank] of one of `count` parts of [rank, ...]."""
    rank, width = array.shape[0], math.prod(array.shape[1:]) // count
    return OrbaxTensor(
        array, (width, rank), lambda value: value.reshape(rank, count, width)[:, part].T
    )


def _huggingface(module: list[str]) -> list[str]:
    """Hugging Face's names of a module of Tunix's models; others' names stay."""
    names = [_TUNIX_MODULES.get(one, (one,)) for one in module]
    if module[:1] == ["layers"]:
        names.insert(0, ("model",))
    count = max((len(one) for one in names), default=1)
    return [".".join(one[i % len(one)] for one in names) for i in range(count)]


def _refuse(keys: tuple[str, ...], array: StoredArray, adapter: str, why: str) -> NoReturn:
    raise AdapterError(
        f"{adapter}: array {'.'.join(keys)[:300]!r} {list(array.shape)} is not supported: {why}; "
        "expected <module>.lora_a and lora_b, those of Qwix (w_lora_a, kernel_lora_a, ...), or "
        "what PEFT saves"
    )


def _from_arrays(given: Mapping[str, Any], tensors: Mapping[str, OrbaxTensor]) -> dict[str, Any]:
    """The ranks and modules that the arrays have, for what the trainer did not say."""
    ranks = {
        name.removesuffix(end): tensor.shape[0]
        for name, tensor in tensors.items()
        for end in (".lora_A.weight", ".lora_embedding_A")
        if name.endswith(end) and tensor.shape
    }
    found: dict[str, Any] = {}
    if "target_modules" not in given and "target_parameters" not in given:
        found["target_modules"] = sorted(ranks)
    if "r" not in given and ranks:
        [(found["r"], _)] = Counter(ranks.values()).most_common(1)
        others = {name: rank for name, rank in sorted(ranks.items()) if rank != found["r"]}
        found["rank_pattern"] = {re.escape(name): rank for name, rank in others.items()}
    return found
