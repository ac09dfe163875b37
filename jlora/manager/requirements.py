"""What an adapter needs of LoRAConfig, and whether it is reserved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jlora.config import LORA_BLOCK_RANK, LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.peft_config import EMBED, HEAD
from jlora.manager.weights import LoRALayerWeights
from jlora.projections import ModuleMap

if TYPE_CHECKING:
    from jlora.manager.lora_model import LoRAModel
    from jlora.manager.mixture import LoRAMixture

# Up to so many changed rows of the vocabulary are rows of a slot by default, above whole matrices.
TOKEN_ROWS_AT_MOST = 1024
_NO_LIMIT = 2**31 - 1

# Takes every adapter that can be read: to see what those given at the start need.
UNLIMITED = LoRAConfig(
    max_lora_rank=_NO_LIMIT,
    enable_lora_dora=True,
    enable_lora_bias=True,
    enable_lora_embeddings=True,
    max_lora_token_rows=_NO_LIMIT,
    max_lora_full_weights=1,
    lora_extra_vocab_size=_NO_LIMIT,
    lora_expert_blocks=_NO_LIMIT,
)


def expert_blocks(loras: Mapping[str, LoRALayerWeights], modules: ModuleMap) -> int:
    """Rank blocks that an adapter takes in the experts; one is of all experts in all layers."""
    ranks = [0]
    for name, layer in loras.items():
        place = modules.place(name)
        if place is not None and place.projection.experts:
            ranks.append(layer.rank)
    return -(-max(ranks) // LORA_BLOCK_RANK)


def needs(lora: LoRAModel) -> dict[str, int | bool]:
    """The least value of each option of LoRAConfig with which the adapter is served.

    Its rows of the vocabulary are counted as token rows; max_lora_full_weights=1 does as well.
    """
    layers = lora.loras.values()
    ids = [rows.ids for rows in lora.vocab_rows.values()]
    return {
        "max_lora_rank": max(lora.rank, 1),
        "enable_lora_dora": any(layer.magnitude is not None for layer in layers),
        "enable_lora_bias": bool(lora.biases) or any(layer.bias is not None for layer in layers),
        "enable_lora_embeddings": any(name in (EMBED, HEAD) for name in lora.loras),
        "max_lora_token_rows": max(map(len, ids), default=0),
        "lora_extra_vocab_size": lora.added_tokens,
        "lora_expert_blocks": lora.expert_blocks,
    }


def check_reserved(lora: LoRAModel, config: LoRAConfig, name: str) -> None:
    """Raises AdapterError, with the option to set, when the engine has not reserved something."""
    wanted, found = [], []
    for option, value in needs(lora).items():
        has = getattr(config, option)
        rows = option == "max_lora_token_rows"
        if value > has and not (rows and config.max_lora_full_weights):
            wanted.append(f"{option}={value}" + " (or max_lora_full_weights=1)" * rows)
            found.append(f"{option}={has}")
    if wanted:
        raise AdapterError(
            f"{name}: needs {', '.join(wanted)}, but the engine was started with {', '.join(found)}"
        )


def fitted(
    config: LoRAConfig, adapters: Iterable[LoRAModel | LoRAMixture], modules: ModuleMap
) -> LoRAConfig:
    """The config with what these adapters need besides."""
    from jlora.manager.blocks import most_blocks  # which knows LoRAModel, which knows this

    listed = list(adapters)
    parts = {lora.key: lora for adapter in listed for lora, _ in adapter.components}
    most = max((len(adapter.components) for adapter in listed), default=1)
    options = options_for(parts.values(), at_once=config.max_loras * most)
    together = max((most_blocks(adapter, modules) for adapter in listed), default=0)
    rank = max(config.max_lora_rank, options.get("max_lora_rank", 0))
    if together > -(-rank // LORA_BLOCK_RANK):
        options["max_lora_blocks"] = together
    larger = {
        name: value if getattr(config, name) is None else max(getattr(config, name), value)
        for name, value in options.items()
    }
    return dataclasses.replace(config, **larger)


def options_for(adapters: Iterable[LoRAModel], at_once: int | None = None) -> dict[str, Any]:
    """The smallest options of LoRAConfig with which the adapters can be served.

    at_once: so many of them in one step; None: all. More than TOKEN_ROWS_AT_MOST rows of the
    vocabulary are served as whole matrices.
    """
    options: dict[str, Any] = {}
    taken: dict[str, list[int]] = {"max_lora_full_weights": [], "lora_expert_blocks": []}
    for adapter in adapters:
        for option, value in needs(adapter).items():
            if option == "max_lora_token_rows" and value > TOKEN_ROWS_AT_MOST:
                taken["max_lora_full_weights"].append(1)
            elif option in taken:
                taken[option].append(value)
            else:
                options[option] = max(options.get(option, type(value)()), value)
    for option, counts in taken.items():
        if counts or option == "max_lora_full_weights":
            options[option] = sum(sorted(counts, reverse=True)[:at_once])
    return options
