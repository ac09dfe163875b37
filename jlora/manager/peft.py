"""Reading what PEFT saved: the configuration, and the tensors with the module each belongs to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_LARGEST = float(np.finfo(np.float32).max)
# Keys of adapter_config.json that leave the served mathematics alone, whatever they hold.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # these initialise only; init_lora_weights tells whether they were used
    "eva_config",
    "fan_in_fan_out",  # about GPT-2's Conv1D; PEFT turns it off for nn.Linear
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora, which is refused
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Keys that PEFT takes as off when their list is empty; an empty value of others may switch them on.
_OFF_WHEN_EMPTY = {"layer_replication", "modules_to_save", "target_parameters"}
# Initialisations that leave the base weights as they were, so that the file defines the result.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PEFTHelper:
    """The part of PEFT's LoraConfig that defines what an adapter computes."""

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any], adapter: str = "adapter") -> PEFTHelper:
        """Checks a parsed adapter_config.json; every key must be understood or neutral."""
        if not isinstance(config, dict):
            raise AdapterError(
                f"{adapter}: {CONFIG_NAME} holds a {type(config).__name__}, expected a table"
            )
        _refuse_what_is_not_served(config, adapter)
        if "r" not in config:
            raise AdapterError(f"{adapter}: {CONFIG_NAME} has no r (the rank)")
        targets = _names(config.get("target_modules"), "target_modules", adapter)
        if not targets:
            raise AdapterError(f"{adapter}: {CONFIG_NAME} has no target_modules")
        return cls(
            r=_rank(config["r"], "r", adapter),
            lora_alpha=_number(config.get("lora_alpha", 8), "lora_alpha", adapter),
            target_modules=targets,
            use_rslora=_flag(config.get("use_rslora"), "use_rslora", adapter),
            rank_pattern=_patterns(config.get("rank_pattern"), "rank_pattern", adapter, _rank),
            alpha_pattern=_patterns(config.get("alpha_pattern"), "alpha_pattern", adapter, _number),
            exclude_modules=_names(config.get("exclude_modules"), "exclude_modules", adapter),
            **_layers(config, targets, adapter),
        )

    def rank(self, module: str) -> int:
        """The rank that PEFT gives the module."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        """The lora_alpha that PEFT gives the module."""
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the module."""
        if _named(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            all_linear = self.target_modules.lower() == "all-linear"
            return all_linear or re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _named(self.target_modules, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            match = re.match(_layer_regex(pattern), module)
            if match:
                return int(match["index"]) in ((layers,) if isinstance(layers, int) else layers)
        return False


def pattern_key(patterns: dict[str, Any], module: str) -> str:
    """The first key that matches the end of the module's name, else the name itself.

    PEFT's rule: a key is a regular expression for everything after some dot, so "q_proj" matches
    every q_proj, "layers.1" nothing that has a longer name, and "layers.1.*" layer 11 as well.
    """
    return next((key for key in patterns if re.match(_key_regex(key), module)), module)


def _key_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."


def _named(names: str | tuple[str, ...] | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _refuse_what_is_not_served(config: dict[str, Any], adapter: str) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(
            f"{adapter}: peft_type is {config['peft_type']!r}; only LORA adapters are served"
        )
    for key in sorted(set(config) - _READ - _NEUTRAL):
        value = config[key]
        if value is None or value is False or (value == [] and key in _OFF_WHEN_EMPTY):
            continue
        raise AdapterError(
            f"{adapter}: {key}={value!r} in {CONFIG_NAME} is not supported; an adapter without it "
            "(absent, null or false) can be served"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{adapter}: bias={config['bias']!r} is not supported, only 'none'")
    init = config.get("init_lora_weights", True)
    if not any(init is one or (isinstance(one, str) and init == one) for one in _PLAIN_INITS):
        raise AdapterError(
            f"{adapter}: init_lora_weights={init!r} may change the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain one"
        )


def _layers(config: dict[str, Any], targets: Any, adapter: str) -> dict[str, Any]:
    """layers_to_transform and layers_pattern, refused where PEFT refuses them."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    listed = [layers] if isinstance(layers, int) else [] if layers is None else layers
    whole = isinstance(listed, (list, tuple)) and all(type(one) is int for one in listed)
    if not whole:
        raise AdapterError(
            f"{adapter}: layers_to_transform={layers!r} must be an integer or a list of integers"
        )
    patterns = _names(pattern, "layers_pattern", adapter)
    for one in (patterns,) if isinstance(patterns, str) else patterns or ():
        _check_regex(one, _layer_regex(one), "layers_pattern", adapter)
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        raise AdapterError(
            f"{adapter}: layers_to_transform and layers_pattern need a list of target_modules, "
            f"not {targets!r}"
        )
    if patterns and layers is None:
        raise AdapterError(f"{adapter}: layers_pattern={pattern!r} needs layers_to_transform")
    frozen = tuple(layers) if isinstance(layers, (list, tuple)) else layers
    return {"layers_to_transform": frozen, "layers_pattern": patterns}


def _patterns(value: Any, key: str, adapter: str, check: Callable[[Any, str, str], Any]) -> dict:
    """A table of regular expressions and values."""
    if value is not None and not isinstance(value, dict):
        raise AdapterError(f"{adapter}: {key}={value!r} must be a table of modules and numbers")
    for pattern in value or {}:
        _check_regex(pattern, _key_regex(pattern), key, adapter)
    return {
        pattern: check(one, f"{key}[{pattern!r}]", adapter)
        for pattern, one in (value or {}).items()
    }


def _check_regex(shown: str, regex: str, key: str, adapter: str) -> None:
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{adapter}: {key} holds {shown!r}, which is not a regular expression: {error}"
        ) from error


def _flag(value: Any, key: str, adapter: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{adapter}: {key}={value!r} must be true or false")
    return bool(value)


def _rank(value: Any, key: str, adapter: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{adapter}: {key}={value!r} must be an integer of at least 1")
    return value


def _number(value: Any, key: str, adapter: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= _LARGEST:
        raise AdapterError(f"{adapter}: {key}={value!r} must be a finite number (in float32)")
    return float(value)


def _names(value: Any, key: str, adapter: str) -> str | tuple[str, ...] | None:
    """A regular expression as it is, a list of names as a tuple."""
    if value is None:
        return None
    if isinstance(value, str):
        _check_regex(value, value, key, adapter)
        return value
    listed = isinstance(value, (list, tuple, set))
    if not listed or not all(isinstance(name, str) and name for name in value):
        raise AdapterError(f"{adapter}: {key}={value!r} must be a string or a list of strings")
    return tuple(value)


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
        return Path(snapshot_download(path, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:
        raise AdapterError(
            f"{adapter}: {path} is neither a folder nor a Hub repository that can be read "
            f"({type(error).__name__}: {(str(error) or 'no details').splitlines()[0]})"
        ) from error


def read_config(folder: Path, adapter: str) -> PEFTHelper:
    """The configuration of an adapter folder."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{adapter}: {folder} has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{adapter}: {path} is not readable JSON: {error}") from error
    return PEFTHelper.from_dict(config, adapter)


def read_adapter(folder: Path, adapter: str) -> tuple[PEFTHelper, dict[str, np.ndarray]]:
    """The configuration of an adapter folder and its tensors; the files may change afterwards."""
    helper = read_config(folder, adapter)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is not supported, save with safe_serialization=True" * pickled
        raise AdapterError(f"{adapter}: {folder} has no {WEIGHTS_NAME}{hint}")
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            return helper, {name: _tensor(file, name, adapter) for name in names}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{adapter}: {path} is not a readable safetensors file: {error}"
        ) from error


def _tensor(file: Any, name: str, adapter: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError, ValueError) as error:  # a dtype that numpy has not
        raise AdapterError(
            f"{adapter}: tensor {name} is {file.get_slice(name).get_dtype()}, expected a floating "
            "point dtype (float32, float16 or bfloat16)"
        ) from error


def file_identity(folder: Path) -> str:
    """Changes when the adapter's files do: a digest of their names, sizes and times."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            stat = (folder / name).stat()
            digest.update(
                f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}".encode()
            )
        except OSError:
            digest.update(f"{name}:absent".encode())
    return digest.hexdigest()


def content_identity(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Names an adapter in memory by what it holds."""
    digest = hashlib.blake2b(repr(sorted(config.items(), key=str)).encode(), digest_size=16)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return f"memory:{digest.hexdigest()}"


def largest_rank(path: str) -> int:
    """The largest rank that the configuration of an adapter folder or Hub repository names."""
    adapter = f"adapter {path}"
    helper = read_config(resolve_adapter_path(path, adapter), adapter)
    return max(helper.r, *helper.rank_pattern.values(), 0)
