"""Reading what PEFT saved: the configuration, and the tensors with the module each belongs to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

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
            raise AdapterError(f"{adapter}: {CONFIG_NAME} holds a {type(config).__name__}, not a table")
        if config.get("peft_type", "LORA") != "LORA":
            raise AdapterError(
                f"{adapter}: peft_type is {config['peft_type']!r}; only LORA adapters are served"
            )
        for key in sorted(set(config) - _READ - _NEUTRAL):
            if config[key] not in (None, False, {}, []):
                raise AdapterError(
                    f"{adapter}: {key}={config[key]!r} in {CONFIG_NAME} is not supported"
                )
        if config.get("bias", "none") != "none":
            raise AdapterError(f"{adapter}: bias={config['bias']!r} is not supported, only 'none'")
        init = config.get("init_lora_weights", True)
        if not any(init is one or (isinstance(one, str) and init == one) for one in _PLAIN_INITS):
            raise AdapterError(
                f"{adapter}: init_lora_weights={init!r} changes the base weights; save the adapter "
                "with PEFT's path_initial_model_for_weight_conversion, which makes a plain one"
            )
        if "r" not in config:
            raise AdapterError(f"{adapter}: {CONFIG_NAME} has no r (the rank)")
        targets = config.get("target_modules")
        if not targets:
            raise AdapterError(f"{adapter}: {CONFIG_NAME} has no target_modules")
        return cls(
            r=_rank(config["r"], "r", adapter),
            lora_alpha=_number(config.get("lora_alpha", 8), "lora_alpha", adapter),
            target_modules=_names(targets, "target_modules", adapter),
            use_rslora=bool(config.get("use_rslora", False)),
            rank_pattern={
                key: _rank(value, f"rank_pattern[{key!r}]", adapter)
                for key, value in (config.get("rank_pattern") or {}).items()
            },
            alpha_pattern={
                key: _number(value, f"alpha_pattern[{key!r}]", adapter)
                for key, value in (config.get("alpha_pattern") or {}).items()
            },
            exclude_modules=_names(config.get("exclude_modules"), "exclude_modules", adapter),
            layers_to_transform=_names(
                config.get("layers_to_transform"), "layers_to_transform", adapter
            ),
            layers_pattern=_names(config.get("layers_pattern"), "layers_pattern", adapter),
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
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match:
                return int(match[1]) in ((layers,) if isinstance(layers, int) else layers)
        return False


def pattern_key(patterns: dict[str, Any], module: str) -> str:
    """The first key that matches the end of the module's name, else the name itself.

    PEFT's rule: a key is a regular expression for everything after some dot, so "q_proj" matches
    every q_proj, "layers.1" nothing that has a longer name, and "layers.1.*" layer 11 as well.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _named(names: str | tuple[str, ...] | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _rank(value: Any, key: str, adapter: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{adapter}: {key}={value!r} must be an integer of at least 1")
    return value


def _number(value: Any, key: str, adapter: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{adapter}: {key}={value!r} must be a finite number")
    return float(value)


def _names(value: Any, key: str, adapter: str) -> Any:
    """A string or an int as it is, a list as a tuple."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple, set)):
        return tuple(value)
    raise AdapterError(f"{adapter}: {key}={value!r} must be a string or a list")


def resolve_adapter_path(path: str, adapter: str = "adapter") -> Path:
    """The local folder of an adapter; a Hub repository is downloaded, or found in its cache."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
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
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'})"
        ) from error


def read_adapter(folder: Path, adapter: str) -> tuple[PEFTHelper, dict[str, np.ndarray]]:
    """The configuration of an adapter folder and its tensors, as memory-mapped numpy arrays."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{adapter}: {folder} has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise AdapterError(f"{adapter}: {path} is not readable JSON: {error}") from error
    helper = PEFTHelper.from_dict(config, adapter)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is not supported, save with safe_serialization=True" * pickled
        raise AdapterError(f"{adapter}: {folder} has no {WEIGHTS_NAME}{hint}")
    try:
        with safe_open(path, "numpy") as file:
            return helper, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{adapter}: {path} is not a readable safetensors file: {error}") from error


def file_identity(folder: Path) -> str:
    """Changes when the adapter's files do: a digest of their names, sizes and times."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            stat = (folder / name).stat()
            digest.update(f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}".encode())
        except OSError:
            digest.update(f"{name}:absent".encode())
    return digest.hexdigest()
