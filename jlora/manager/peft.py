"""The files of an adapter, as PEFT or a JAX trainer saved it: where they are, what is in them.

Tensors are read lazily: names, shapes and dtypes first, so that a file that does not fit costs
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from jlora.errors import AdapterError
from jlora.files import TOKENIZER_FILES, first_line, read_json
from jlora.manager.earlier import EarlierReads
from jlora.manager.orbax_adapter import LARGEST_CONFIG, orbax_file_names, orbax_folder, read_orbax
from jlora.manager.peft_config import PEFTHelper
from jlora.manager.peft_values import CONFIG_NAME
from jlora.manager.safetensors_file import DTYPES, SafetensorsFile
from jlora.orbax_files import OrbaxError

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# What is taken of a Hub repository besides the weights: the tokeniser may have tokens of its own.
HUB_FILES = (CONFIG_NAME, *TOKENIZER_FILES)


class TensorLike(Protocol):
    """An array, or a tensor of a file: its rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """A numpy dtype, or the name of one that numpy has not."""

    def __getitem__(self, rows: Any) -> Any:
        """An array of these rows; all of it for `...`."""


class _TorchTensor:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = {str(dtype): dtype for dtype in DTYPES.values()}.get(name, name)

    def __getitem__(self, rows: Any) -> np.ndarray:
        tensor = self._tensor[rows].detach().contiguous()
        if self.dtype == ml_dtypes.bfloat16:
            import torch

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()


def resolve_adapter_path(path: str, adapter: str = "adapter") -> Path:
    """The local folder of an adapter; a Hub repository is downloaded, or found in its cache."""
    folder = Path(os.path.expanduser(path))
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # not readable, or a name too long
        raise AdapterError(f"{adapter}: {path[:200]} cannot be read: {error.strerror}") from error
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise AdapterError(
            f"{adapter}: {path} is not a folder; lora_path must be a folder with {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}, or a Hub repository such as user/name"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=[*HUB_FILES, WEIGHTS_NAME]))
        if not (folder / WEIGHTS_NAME).exists():
            folder = Path(snapshot_download(path, allow_patterns=[*HUB_FILES, PICKLE_NAME]))
        return folder
    except Exception as error:
        raise AdapterError(
            f"{adapter}: {path} is neither a folder nor a Hub repository that can be read "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def is_orbax(folder: Path) -> bool:
    """Whether a folder's adapter is an Orbax checkpoint (PEFT's files win)."""
    return not (folder / CONFIG_NAME).exists() and orbax_folder(folder) is not None


def adapter_config(folder: Path, adapter: str) -> dict[str, Any]:
    """What adapter_config.json of a folder holds, or would hold, had PEFT saved it."""
    if is_orbax(folder):
        return read_orbax(folder, adapter)[0]
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(
            f"{adapter}: {folder} has no {CONFIG_NAME}, and is no Orbax checkpoint (of one step)"
        )
    try:
        return read_json(path, LARGEST_CONFIG)
    except ValueError as error:
        raise AdapterError(f"{adapter}: {error}") from error


def read_config(folder: Path, adapter: str) -> PEFTHelper:
    """The configuration of an adapter folder."""
    return PEFTHelper.from_dict(adapter_config(folder, adapter), adapter)


@contextlib.contextmanager
def open_adapter(
    folder: Path, adapter: str, earlier: EarlierReads | None = None, hashed: bool = False
) -> Iterator[tuple[PEFTHelper, Mapping[str, TensorLike]]]:
    """The configuration of an adapter folder and its tensors, to be read inside the context.

    earlier: what other reads have left. hashed: `content_name` will be asked for. What is in an
    Orbax checkpoint has the names and shapes with which PEFT would have saved it.
    """
    if is_orbax(folder):
        config, arrays = read_orbax(folder, adapter)
        helper = PEFTHelper.from_dict(config, adapter)
        try:
            yield helper, arrays
        except OrbaxError as error:
            raise AdapterError(f"{adapter}: {folder}: {error}") from error
        return
    helper = read_config(folder, adapter)
    safe, pickled = folder / WEIGHTS_NAME, folder / PICKLE_NAME
    if safe.is_file() or not pickled.is_file():
        if not safe.is_file():
            raise AdapterError(f"{adapter}: {folder} has no {WEIGHTS_NAME}")
        try:
            with SafetensorsFile(safe, earlier or EarlierReads(), hashed) as tensors:
                yield helper, tensors
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{adapter}: {safe} is not a readable safetensors file: {first_line(error)}"
            ) from error
    else:
        yield helper, _read_pickle(pickled, adapter)


def _read_pickle(path: Path, adapter: str) -> Mapping[str, TensorLike]:
    """Tensors of a file of torch.save; nothing else is unpickled, and nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        raise AdapterError(
            f"{adapter}: {path} needs torch to be read, which is not installed; install it, or "
            f"save the adapter as {WEIGHTS_NAME} (PEFT: save_pretrained)"
        )
    import torch

    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises what it likes
        raise AdapterError(
            f"{adapter}: {path} is not a readable file of tensors: {first_line(error)}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        for name, tensor in content.items()
    ):
        raise AdapterError(f"{adapter}: {path} holds something else than a table of tensors")
    return {name: _TorchTensor(tensor) for name, tensor in content.items()}


def _files_read(folder: Path) -> list[str]:
    """Names of the files that `open_adapter` reads."""
    if is_orbax(folder):
        return orbax_file_names(folder)
    pickled = not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file()
    return [CONFIG_NAME, PICKLE_NAME if pickled else WEIGHTS_NAME]


def file_fingerprint(folder: Path) -> str:
    """Changes when the adapter's files do: a digest of their names, sizes and times."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for name in sorted({*_files_read(folder), CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME}):
        try:
            stat = (folder / name).stat()
            digest.update(
                f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}".encode()
            )
        except OSError:
            digest.update(f"{name}:absent".encode())
    return digest.hexdigest()


def content_name(folder: Path, tensors: Mapping[str, TensorLike]) -> str:
    """Names an adapter by what its files hold, wherever they are and whenever they were written.

    tensors: of `open_adapter`, which have been read. Raises OSError.
    """
    digest = hashlib.sha256()
    for name in _files_read(folder):
        if isinstance(tensors, SafetensorsFile) and name == WEIGHTS_NAME:
            digest.update(f"{name}:{tensors.digest()}:".encode())
        elif (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name}:{found}:".encode())
        else:
            digest.update(f"{name}:absent:".encode())
    return f"files:{digest.hexdigest()}"


def as_array(value: Any, key: str, adapter: str) -> np.ndarray:
    """A tensor in memory as numpy sees it, perhaps the same memory."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{adapter}: tensor {key} is no array for numpy: {error}") from error
    if array.dtype.hasobject:
        raise AdapterError(f"{adapter}: tensor {key} is no array of numbers: {type(value)}")
    return array


def content_identity(tensors: Mapping[str, Any], config: Mapping[str, Any], adapter: str) -> str:
    """Names an adapter in memory by what it holds."""
    digest = hashlib.blake2b(repr(sorted(config.items(), key=str)).encode(), digest_size=16)
    for name in sorted(tensors):
        array = np.ascontiguousarray(as_array(tensors[name], name, adapter))
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return f"memory:{digest.hexdigest()}"
