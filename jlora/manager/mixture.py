"""Several adapters as one, each with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.config import LoRAConfig
from jlora.errors import AdapterError
from jlora.manager.lora_model import LoRALayerWeights, LoRAModel
from jlora.manager.magnitude import largest
from jlora.manager.tensors import largest_held


@dataclass(frozen=True)
class LoRAMixture:
    """delta W = sum of weight * delta W of each component: what PEFT calls "cat".

    It has no numbers of its own: its slot lists the blocks of all components.
    """

    id: int
    components: tuple[tuple[LoRAModel, float], ...]
    identity: str

    @property
    def fingerprint(self) -> str:
        """Its identity, which tells of its components' content."""
        return self.identity

    @property
    def rank(self) -> int:
        """The ranks of the components together."""
        return sum(lora.rank for lora, _ in self.components)

    @property
    def nbytes(self) -> int:
        """Bytes of the components' tensors."""
        return sum(lora.nbytes for lora, _ in self.components)


Adapter = LoRAModel | LoRAMixture


def mix(
    mixture_id: int,
    components: Sequence[tuple[LoRAModel, float]],
    combination: str,
    name: str,
    config: LoRAConfig,
) -> Adapter:
    """The mixture of adapters; raises AdapterError for those that cannot be mixed."""
    for lora, _ in components:
        others = {
            "DoRA magnitudes": lora.has_magnitudes,
            "biases": lora.has_biases,
            "vocabulary rows (modules_to_save, trainable_token_indices)": bool(lora.vocab_rows),
            "invocation tokens (an activated LoRA)": bool(lora.invocation_tokens),
        }
        for what, found in others.items():
            if found:
                raise AdapterError(
                    f"{name}: component {lora.id} has {what}, which cannot be mixed; only plain "
                    "LoRA can"
                )
    parts = ";".join(f"{weight!r}*{lora.key}" for lora, weight in components)
    identity = f"{combination}({parts})"
    if combination == "cat":
        return LoRAMixture(mixture_id, tuple(components), identity)
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        lora = _linear(mixture_id, components, identity, name)
    for layer in lora.loras.values() if not config.allow_nonfinite_loras else ():
        # `not <=`, so that NaN does not pass.
        if not max(largest(layer.lora_a), largest(layer.lora_b)) <= largest_held(config):
            raise AdapterError(
                f"{name}: with these weights {layer.module_name} holds numbers that the adapter "
                "pool cannot hold"
            )
    return lora


def _linear(
    mixture_id: int, components: Sequence[tuple[LoRAModel, float]], identity: str, name: str
) -> LoRAModel:
    """PEFT's "linear": A and B are summed apart, A with sign(w s) sqrt|w s|, B with sqrt|w s|."""
    modules = dict.fromkeys(module for lora, _ in components for module in lora.loras)
    loras = {}
    for module in modules:
        having = [(lora.loras[module], w) for lora, w in components if module in lora.loras]
        ranks = sorted({one.rank for one, _ in having})
        if len(ranks) > 1:
            raise AdapterError(
                f"{name}: a linear mixture needs components of equal rank; {module} has the ranks "
                f"{', '.join(map(str, ranks))} (combination_type='cat' takes any)"
            )
        a, b = np.zeros(1, np.float32), np.zeros(1, np.float32)
        for one, weight in having:
            scale = np.float32(weight * one.scaling)
            root = np.sqrt(np.abs(scale))
            a = a + np.copysign(root, scale) * one.lora_a.astype(np.float32)
            b = b + root * one.lora_b.astype(np.float32)
        loras[module] = LoRALayerWeights(module, ranks[0], ranks[0], a, b, 1.0)
    return LoRAModel(
        mixture_id,
        max(one.rank for one in loras.values()),
        loras,
        identity,
        expert_blocks=max(lora.expert_blocks for lora, _ in components),
    )
