"""A safetensors file whose tensors are read at once, into one piece of memory.

A library call a tensor would do, but an adapter has hundreds of them, and each call that lets
other threads run has to wait for its turn afterwards. The library checks the file, and reads the
tensors that may be dropped after a look.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.manager.magnitude import largest

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What is kept of a file shares memory; what may be dropped after a look must not keep it alive.
_KEPT = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
)
_LARGEST_HEADER = 1 << 24  # bytes; reading one keeps other threads waiting


class FileTensor:
    """A tensor of a file. span: its bytes in the memory that is shared; None: it has its own."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        self._file, self._name = file, name
        self._slice = file.checked.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = DTYPES.get(self._slice.get_dtype(), self._slice.get_dtype())
        self.span: slice | None = None

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Its rows; for `...` all of it, which may be a view of what tensors share."""
        if rows is not ...:
            return self._slice[rows]
        if self.span is None or not isinstance(self.dtype, np.dtype):  # the latter for mypy
            return self._file.checked.get_tensor(self._name)
        return self._file.memory[self.span].view(self.dtype).reshape(self.shape)

    @property
    def bound(self) -> float | None:
        """No number of it is larger in magnitude; None when that is not known of all at once."""
        return None if self.span is None else self._file.bound


class SafetensorsFile(Mapping[str, FileTensor]):
    """The tensors of a file, to be read inside its context."""

    def __init__(self, path: Path, empty: Callable[[int], np.ndarray]) -> None:
        """Reads names, shapes and dtypes. Raises SafetensorError or OSError.

        empty: gives so many bytes of memory that may hold anything, uint8.
        """
        self._empty, self._raw = empty, path.open("rb", buffering=0)
        self._runs: list[tuple[int, int]] = []  # where what is shared begins in the file, and ends
        try:
            size = int.from_bytes(self._raw.read(8), "little")
            if size > _LARGEST_HEADER:
                raise SafetensorError(f"its header has {size} bytes, above {_LARGEST_HEADER}")
            header = self._raw.read(size)
            self.checked = safe_open(path, "numpy")
            self._tensors = {name: FileTensor(self, name) for name in self.checked.keys()}  # noqa: SIM118
            self._share(json.loads(header), 8 + size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._raw.close()
            raise SafetensorError("it changes while it is read") from error
        except BaseException:
            self._raw.close()
            raise

    def _share(self, header: dict[str, Any], first: int) -> None:
        """Places the tensors that share memory. first: where the file's data begins."""
        self._size = 0
        kept = {
            name: header[name]["data_offsets"] for name in self._tensors if name.endswith(_KEPT)
        }
        for name, (start, end) in sorted(kept.items(), key=lambda item: item[1]):
            tensor = self._tensors[name]
            if not isinstance(tensor.dtype, np.dtype):
                continue
            if end - start != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise ValueError(f"{name} has another size")
            tensor.span = slice(self._size, self._size + end - start)
            self._size += end - start
            if self._runs and self._runs[-1][1] == first + start:
                self._runs[-1] = self._runs[-1][0], first + end
            else:
                self._runs.append((first + start, first + end))

    @functools.cached_property
    def memory(self) -> np.ndarray:
        """uint8: the tensors that share it, one after the other."""
        memory, at = self._empty(self._size), 0
        for start, end in self._runs:
            while start < end:
                count = os.preadv(self._raw.fileno(), [memory[at : at + end - start].data], start)
                if not count:
                    raise SafetensorError("it ends before its last tensor does")
                start, at = start + count, at + count
        return memory

    @functools.cached_property
    def bound(self) -> float | None:
        """The largest magnitude in `memory`; None when its tensors differ in dtype."""
        dtypes = {tensor.dtype for tensor in self._tensors.values() if tensor.span is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        return largest(self.memory.view(dtype)) if isinstance(dtype, np.dtype) else None

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> SafetensorsFile:
        self.checked.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()
        self._tensors.clear()  # they refer to this, which refers to the memory
        self.__dict__.pop("memory", None)
        self.checked.__exit__(kind, error, traceback)
