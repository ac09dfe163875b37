"""Arrays of an Orbax checkpoint: names, shapes and dtypes first, parts of them when asked for.

They are read by tensorstore, as Orbax itself does, so that neither jax nor the structure of what
was saved need be there. Nothing in a checkpoint is executed: it is JSON, and chunks of numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.files import first_line, read_json

METADATA_NAME = "_METADATA"
_CUSTOM_METADATA = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written
_LARGEST_METADATA = 1 << 27
_NODES = 1 << 26  # bytes of an OCDBT's tree that are kept
_FAILURES = (ValueError, OSError, RuntimeError, LookupError)  # of tensorstore


class OrbaxError(ValueError):
    """A checkpoint, or a part of it, that cannot be read."""


def is_orbax_checkpoint(folder: Path) -> bool:
    """Whether a folder is a whole Orbax checkpoint of arrays."""
    return (folder / METADATA_NAME).is_file() and _UNFINISHED not in folder.name


class StoredArray:
    """An array of a checkpoint, of which any part can be read."""

    def __init__(self, name: str, store: Any) -> None:
        """store: a tensorstore.TensorStore."""
        self._name, self._store = name, store
        self.shape = tuple(store.shape)
        chunk = store.chunk_layout.read_chunk.shape or self.shape
        if any(one > max(size, 1) for one, size in zip(chunk, self.shape, strict=True)):
            raise OrbaxError(f"array {name}: its chunks {list(chunk)} are larger than it is")

    @property
    def dtype(self) -> Any:
        """A numpy dtype; the name of one that numpy has not."""
        try:
            return np.dtype(self._store.dtype.numpy_dtype)
        except (TypeError, ValueError):
            return self._store.dtype.name

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part, read from the chunks that it lies in. Raises OrbaxError when one is missing."""
        try:
            return np.asarray(self._store[index].read().result())
        except _FAILURES as error:
            raise OrbaxError(f"array {self._name} cannot be read: {first_line(error)}") from error

    def read_into(self, parts: list[tuple[np.ndarray, Any]]) -> None:
        """Reads several parts, each into an array (repeated where that is wider)."""
        import tensorstore

        try:
            writes = [
                tensorstore.array(target).write(self._store[index]) for target, index in parts
            ]
            for write in writes:
                write.result()
        except _FAILURES as error:
            raise OrbaxError(f"array {self._name} cannot be read: {first_line(error)}") from error


class OrbaxFiles(Mapping[tuple[str, ...], StoredArray]):
    """The arrays of a checkpoint by their paths in what was saved: ("layers", "0", "weight")."""

    def __init__(self, folder: Path) -> None:
        """Reads what there is, no numbers. Raises OrbaxError for what is no checkpoint."""
        self.folder = folder
        metadata = _json(folder / METADATA_NAME)
        try:
            keys = {
                tuple(str(key["key"]) for key in entry["key_metadata"]): entry["value_metadata"]
                for entry in metadata["tree_metadata"].values()
            }
            empty = [path for path, value in keys.items() if value.get("skip_deserialize")]
            strings = [
                ".".join(path) for path, one in keys.items() if one.get("value_type") == "string"
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise OrbaxError(f"{folder / METADATA_NAME} is not Orbax's: {error!r}") from error
        if strings:
            raise OrbaxError(f"{folder} holds strings, expected arrays alone: {strings[:10]}")
        names = {path: ".".join(path) for path in keys if path not in empty}
        self._arrays = _open(folder, names, metadata)

    @functools.cached_property
    def custom_metadata(self) -> dict[str, Any]:
        """What whoever saved it had to say."""
        path = self.folder / _CUSTOM_METADATA
        found = _json(path).get("custom_metadata") if path.is_file() else None
        return found if isinstance(found, dict) else {}

    def __getitem__(self, path: tuple[str, ...]) -> StoredArray:
        return self._arrays[path]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, _LARGEST_METADATA)
    except ValueError as error:
        raise OrbaxError(str(error)) from error
    if not isinstance(found, dict):
        raise OrbaxError(f"{path} is not a JSON object")
    return found


def _open(
    folder: Path, names: dict[tuple[str, ...], str], metadata: dict[str, Any]
) -> dict[tuple[str, ...], StoredArray]:
    """Opens all arrays at the same time."""
    import tensorstore

    context = tensorstore.Context({"cache_pool#tree": {"total_bytes_limit": _NODES}})

    def spec(name: str) -> dict[str, Any]:
        files = {"driver": "file", "path": f"{folder.absolute()}/"}
        if metadata.get("use_ocdbt", True):
            tree = {"driver": "ocdbt", "base": files, "cache_pool": "cache_pool#tree"}
            store = {**tree, "path": f"{name}/"}
        else:
            store = {**files, "path": f"{folder.absolute()}/{name}/"}
        return {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": store,
            # Else a chunk that is lost would be read as zeros.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
        }

    opening = {
        path: tensorstore.open(spec(name), read=True, open=True, context=context)
        for path, name in names.items()
    }
    arrays, faults = {}, []
    for path, future in opening.items():
        try:
            arrays[path] = StoredArray(names[path], future.result())
        except _FAILURES as error:
            faults.append(f"{names[path]}: {first_line(error)}")
    if faults:
        listed = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise OrbaxError(f"{folder} holds arrays that cannot be read:\n  {listed}")
    return arrays
