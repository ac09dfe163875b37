"""The part of PEFT's LoraConfig that defines what an adapter computes; anything else is refused."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

from jlora.errors import AdapterError
from jlora.manager.peft_values import (
    CONFIG_NAME,
    check_regex,
    compiled,
    flag,
    name_list,
    names,
    number,
    patterns,
    positive,
    short,
    token_ids,
)

# Keys of adapter_config.json that leave the served mathematics alone, whatever they hold.
_NEUTRAL = {
    "auto_mapping",
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
    "velora_config",  # of the backward pass only
}
_READ = {
    "alora_invocation_tokens",
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# Initialisations that leave the base weights as they were, so that the file defines the result.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_VOCABULARY = ("model.embed_tokens", "lm_head")
EMBED, HEAD = _VOCABULARY


@dataclass(frozen=True)
class PEFTHelper:
    """The part of PEFT's LoraConfig that defines what an adapter computes.

    base_model_name: the model it was trained on, as the file names it. bias: "none", "lora_only"
    or "all". saved_modules: which of the vocabulary's two modules the file holds as a whole.
    token_ids: (module, ids) of the rows that trainable_token_indices names; PEFT's plain list is
    of the input embedding. invocation_tokens: see LoRAModel.
    """

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    saved_modules: tuple[str, ...] = ()
    token_ids: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ensure_weight_tying: bool = False
    invocation_tokens: tuple[int, ...] = ()
    base_model_name: str | None = field(default=None, compare=False)

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
        targets = names(config.get("target_modules"), "target_modules", adapter) or ()
        parameters = name_list(config.get("target_parameters"), "target_parameters", adapter)
        if not targets and not parameters:
            raise AdapterError(f"{adapter}: {CONFIG_NAME} has no target_modules")
        base = config.get("base_model_name_or_path")
        helper = cls(
            r=positive(config["r"], "r", adapter),
            lora_alpha=number(config.get("lora_alpha", 8), "lora_alpha", adapter),
            target_modules=targets,
            target_parameters=parameters,
            exclude_modules=names(config.get("exclude_modules"), "exclude_modules", adapter),
            base_model_name=base if isinstance(base, str) and base else None,
            **_switches(config, adapter),
            **_patterns(config, adapter),
            **_layers(config, targets, adapter),
            **_beside_lora(config, adapter),
        )
        helper._refuse_combinations(adapter)
        return helper

    def rank(self, module: str) -> int:
        """The rank that PEFT gives the module (or the parameter, by its whole name)."""
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
            if self.target_modules.lower() == "all-linear":
                return module not in _VOCABULARY
            return compiled(self.target_modules).fullmatch(module) is not None
        if module in self.target_modules:
            return True
        return _named(self.target_modules, module) and self._in_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        """Whether target_parameters names the parameter ("model.layers.0.mlp.gate.weight")."""
        return bool(self.target_parameters) and _named(self.target_parameters, parameter)

    def adapted_name(self, module: str) -> str | None:
        """The name by which PEFT adapts a module, which its patterns match; None if it does not."""
        if self.targets(module):
            return module
        weight = f"{module}.weight"
        return weight if self.targets_parameter(weight) else None

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            match = compiled(_layer_regex(pattern)).match(module)
            if match:
                return int(match["index"]) in ((layers,) if isinstance(layers, int) else layers)
        return False

    def _refuse_combinations(self, adapter: str) -> None:
        """What PEFT refuses to make too."""
        switches = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "alora_invocation_tokens": bool(self.invocation_tokens),
            "target_parameters": bool(self.target_parameters),
        }
        for one, other in (
            ("use_dora", "lora_bias"),
            ("alora_invocation_tokens", "use_dora"),
            ("target_parameters", "use_dora"),
            ("target_parameters", "lora_bias"),
            ("target_parameters", "alora_invocation_tokens"),
        ):
            if switches[one] and switches[other]:
                raise AdapterError(f"{adapter}: {one} and {other} exclude each other, as in PEFT")


def other_base_model(name: str, model: str) -> bool:
    """Whether an adapter that names its base model (a path or a repository) means another one.

    The same last component is the same model: a copy in another folder.
    """
    return name.rstrip("/").rsplit("/", 1)[-1] != model.rstrip("/").rsplit("/", 1)[-1]


def pattern_key(patterns: dict[str, Any], module: str) -> str:
    """The first key that matches the end of the module's name, else the name itself.

    PEFT's rule: a key is a regular expression for everything after some dot, so "q_proj" matches
    every q_proj, "layers.1" nothing that has a longer name, and "layers.1.*" layer 11 as well.
    """
    for key in patterns:
        if compiled(_key_regex(key)).match(module):
            return key
    return module


def _key_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."


def _named(names: str | tuple[str, ...] | None, module: str) -> bool:
    """An expression for the whole name, or a list with the name or its end, from a dot on."""
    if isinstance(names, str):
        return compiled(names).fullmatch(module) is not None
    if not names:
        return False
    listed = _as_set(names)
    parts = module.split(".")
    return any(".".join(parts[start:]) in listed for start in range(len(parts)))


@functools.lru_cache(maxsize=256)
def _as_set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def _refuse_what_is_not_served(config: dict[str, Any], adapter: str) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(
            f"{adapter}: peft_type is {config['peft_type']!r}; only LORA adapters are served"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"{adapter}: task_type={config['task_type']!r} is not served, only CAUSAL_LM: heads "
            "of other tasks are not"
        )
    for key in sorted(set(config) - _READ - _NEUTRAL):
        value = config[key]
        if value is None or value is False or (value == [] and key == "layer_replication"):
            continue
        raise AdapterError(
            f"{adapter}: {key}={value!r} in {CONFIG_NAME} is not supported; an adapter without it "
            "(absent, null or false) can be served"
        )
    init = config.get("init_lora_weights", True)
    if not any(init is one or (isinstance(one, str) and init == one) for one in _PLAIN_INITS):
        raise AdapterError(
            f"{adapter}: init_lora_weights={init!r} may change the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain one"
        )


def _switches(config: dict[str, Any], adapter: str) -> dict[str, Any]:
    return {
        key: flag(config.get(key), key, adapter)
        for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
    }


def _patterns(config: dict[str, Any], adapter: str) -> dict[str, Any]:
    return {
        key: patterns(config.get(key), key, adapter, _key_regex, check)
        for key, check in (("rank_pattern", positive), ("alpha_pattern", number))
    }


def _layers(config: dict[str, Any], targets: Any, adapter: str) -> dict[str, Any]:
    """layers_to_transform and layers_pattern, refused where PEFT refuses them."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    listed = [layers] if isinstance(layers, int) else [] if layers is None else layers
    whole = isinstance(listed, (list, tuple)) and all(type(one) is int for one in listed)
    if not whole:
        raise AdapterError(
            f"{adapter}: layers_to_transform={layers!r} must be an integer or a list of integers"
        )
    regexes = names(pattern, "layers_pattern", adapter)
    for one in (regexes,) if isinstance(regexes, str) else regexes or ():
        check_regex(one, _layer_regex(one), "layers_pattern", adapter)
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        raise AdapterError(
            f"{adapter}: layers_to_transform and layers_pattern need a list of target_modules, "
            f"not {targets!r}"
        )
    if regexes and layers is None:
        raise AdapterError(f"{adapter}: layers_pattern={pattern!r} needs layers_to_transform")
    frozen = tuple(layers) if isinstance(layers, (list, tuple)) else layers
    return {"layers_to_transform": frozen, "layers_pattern": regexes}


def _beside_lora(config: dict[str, Any], adapter: str) -> dict[str, Any]:
    """What an adapter may have beside its low-rank matrices."""
    bias = config.get("bias", "none")
    if bias not in ("none", "lora_only", "all"):
        raise AdapterError(f"{adapter}: bias={bias!r} must be 'none', 'lora_only' or 'all'")
    invocation = token_ids(
        config.get("alora_invocation_tokens"), "alora_invocation_tokens", adapter
    )
    return {
        "bias": bias,
        "invocation_tokens": invocation,
        "saved_modules": _vocabulary(config.get("modules_to_save"), "modules_to_save", adapter),
        "token_ids": _token_rows(config.get("trainable_token_indices"), adapter),
    }


def _vocabulary(value: Any, key: str, adapter: str) -> tuple[str, ...]:
    """Which of embed_tokens and lm_head a list names; anything else is refused."""
    found: list[str] = []
    for name in name_list(value, key, adapter):
        modules = [one for one in _VOCABULARY if _named((name,), one)]
        if not modules:
            raise AdapterError(
                f"{adapter}: {key}={short(value)} names {name!r}; only embed_tokens and "
                "lm_head can be served"
            )
        found += [one for one in modules if one not in found]
    return tuple(found)


def _token_rows(value: Any, adapter: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    key = "trainable_token_indices"
    if value is None:
        return ()
    table = value if isinstance(value, dict) else {EMBED: value}
    modules = [module for name in table for module in _vocabulary([name], key, adapter)]
    rows = [token_ids(ids, key, adapter) for ids in table.values()]
    if len(set(modules)) < len(modules) or any(len(set(ids)) < len(ids) for ids in rows):
        raise AdapterError(f"{adapter}: {key}={short(value)} names a module or token twice")
    return tuple(zip(modules, rows, strict=True))
