"""A safetensors file whose tensors are read at once, into one piece of memory.

A library call a tensor would do, but an adapter has hundreds of them, and each call that lets
other threads run has to wait for its turn afterwards. The library checks the file, and reads the
tensors that may be dropped after a look.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.manager.earlier import EarlierReads
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
_PIECE = 1 << 20  # bytes of a file that are held to be hashed
_LARGEST_HEADER = 1 << 24  # bytes; reading one keeps other threads waiting


@dataclass(frozen=True)
class Place:
    """A tensor by a file's header. span: its bytes in the memory that is shared; None: its own."""

    shape: tuple[int, ...]
    dtype: Any
    span: slice | None


@dataclass(frozen=True)
class Layout:
    """What a file's header says.

    runs: where in the file the tensors that share memory begin, and end. size: bytes of them all.
    plans: what the reader of adapters has found out of it, by configuration.
    """

    tensors: dict[str, Place]
    runs: list[tuple[int, int]]
    size: int
    plans: dict[str, Any] = field(default_factory=dict)


class FileTensor:
    """A tensor of a file."""

    __slots__ = ("_file", "_name", "dtype", "shape", "span")

    def __init__(self, file: SafetensorsFile, name: str, place: Place) -> None:
        self._file, self._name = file, name
        self.shape, self.dtype, self.span = place.shape, place.dtype, place.span

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Its rows; for `...` all of it, which may be a view of what tensors share."""
        if rows is not ...:
            return self._file.checked.get_slice(self._name)[rows]
        if self.span is None:
            return self._file.checked.get_tensor(self._name)
        return self._file.memory[self.span].view(self.dtype).reshape(self.shape)

    @property
    def bound(self) -> float | None:
        """No number of it is larger in magnitude; None when that is not known of all at once."""
        return None if self.span is None else self._file.bound


class SafetensorsFile(Mapping[str, FileTensor]):
    """The tensors of a file, to be read inside its context."""

    def __init__(self, path: Path, earlier: EarlierReads, hashed: bool = False) -> None:
        """Reads names, shapes and dtypes. Raises SafetensorError or OSError.

        hashed: `digest` will be asked for.
        """
        self._earlier, self._path, self._hashed = earlier, path, hashed
        # Not cached properties, which on Python 3.11 keep the threads of other files waiting.
        self._checked: Any = None
        self._memory: np.ndarray | None = None
        self._bound: tuple[float | None] | None = None
        self._digests: list[Future[bytes]] | None = None
        self._raw = path.open("rb", buffering=0)
        try:
            size = int.from_bytes(self._raw.read(8), "little")
            if size > _LARGEST_HEADER:
                raise SafetensorError(f"its header has {size} bytes, above {_LARGEST_HEADER}")
            self._header = self._raw.read(size)
            self._size = os.fstat(self._raw.fileno()).st_size
            self.layout: Layout = earlier.layout(self._header, self._size, self._read_layout)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._raw.close()
            raise SafetensorError("it changes while it is read") from error
        except BaseException:
            self._raw.close()
            raise

    @property
    def checked(self) -> Any:
        """The library's view of the file, which it checks."""
        if self._checked is None:
            self._checked = safe_open(self._path, "numpy")
        return self._checked

    def _read_layout(self) -> Layout:
        """Which tensors there are, and a place for those that share memory."""
        slices = {name: self.checked.get_slice(name) for name in self.checked.keys()}  # noqa: SIM118
        dtypes = {
            name: DTYPES.get(one.get_dtype(), one.get_dtype()) for name, one in slices.items()
        }
        table, first = json.loads(self._header), 8 + len(self._header)
        runs: list[tuple[int, int]] = []
        spans: dict[str, slice] = {}
        size = 0
        kept = {name: table[name]["data_offsets"] for name in slices if name.endswith(_KEPT)}
        for name, (start, end) in sorted(kept.items(), key=lambda item: item[1]):
            dtype = dtypes[name]
            if not isinstance(dtype, np.dtype):
                continue
            if end - start != math.prod(slices[name].get_shape()) * dtype.itemsize:
                raise ValueError(f"{name} has another size")
            spans[name] = slice(size, size + end - start)
            size += end - start
            if runs and runs[-1][1] == first + start:
                runs[-1] = runs[-1][0], first + end
            else:
                runs.append((first + start, first + end))
        places = {
            name: Place(tuple(one.get_shape()), dtypes[name], spans.get(name))
            for name, one in slices.items()
        }
        return Layout(places, runs, size)

    @property
    def memory(self) -> np.ndarray:
        """uint8: the tensors that share it, one after the other."""
        if self._memory is None:
            self._memory = self._read()
            if self._hashed:
                self._digests = self._earlier.digests(self._memory)
        return self._memory

    def _read(self) -> np.ndarray:
        memory, at = self._earlier.memory.empty(self.layout.size), 0
        for start, end in self.layout.runs:
            while start < end:
                count = os.preadv(self._raw.fileno(), [memory[at : at + end - start].data], start)
                if not count:
                    raise SafetensorError("it ends before its last tensor does")
                start, at = start + count, at + count
        return memory

    def digest(self) -> str:
        """A hash of all that is in the file. What was read of it is hashed as it was read.

        Begun when that was read, if `hashed` said so.
        """
        digest, at = hashlib.sha256(self._header), 8 + len(self._header)
        for start, end in (*self.layout.runs, (self._size, self._size)):
            while at < start:  # tensors with memory of their own
                piece = os.pread(self._raw.fileno(), min(start - at, _PIECE), at)
                if not piece:
                    raise SafetensorError("it ends before its last tensor does")
                digest.update(piece)
                at += len(piece)
            at = end
        memory = self.memory
        for one in self._digests or self._earlier.digests(memory):
            digest.update(one.result())
        return digest.hexdigest()

    @property
    def bound(self) -> float | None:
        """The largest magnitude in `memory`; None when its tensors differ in dtype."""
        if self._bound is None:
            dtypes = {one.dtype for one in self.layout.tensors.values() if one.span is not None}
            dtype = dtypes.pop() if len(dtypes) == 1 else None
            found = largest(self.memory.view(dtype)) if isinstance(dtype, np.dtype) else None
            self._bound = (found,)
        return self._bound[0]

    def __getitem__(self, name: str) -> FileTensor:
        return FileTensor(self, name, self.layout.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.tensors)

    def __len__(self) -> int:
        return len(self.layout.tensors)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()
        self._memory = self._checked = None  # who still has a tensor must not keep it all
