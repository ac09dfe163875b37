"""From the tensors of a file to the parts of an adapter; every tensor has a place or is refused."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jlora.manager.experts import Fused, check_fused, fused, read_fused
from jlora.manager.layers import (
    LORA_KINDS,
    Layer,
    LayerPlan,
    canonical,
    check_allowed,
    check_layer,
    place_of,
    plan_layer,
)
from jlora.manager.peft import TensorLike
from jlora.manager.peft_config import EMBED, HEAD
from jlora.manager.safetensors_file import SafetensorsFile
from jlora.manager.tensors import Modules, Source, Tensor, by_module
from jlora.manager.vocabulary import VOCAB_KINDS, VocabularyReader
from jlora.manager.weights import LoRALayerWeights, VocabRows

_MATCHING_SECONDS = 20  # for all patterns of a configuration on all modules of a file
_PLANS = 8  # configurations of files with the same header


@dataclass(frozen=True)
class Parts:
    """What an adapter file holds; see LoRAModel."""

    loras: dict[str, LoRALayerWeights]
    biases: dict[str, np.ndarray]
    vocab_rows: dict[str, VocabRows]
    added_tokens: int
    tensor_counts: dict[str, int]


def read_parts(source: Source, tensors: Mapping[str, TensorLike]) -> Parts:
    """Checks names, shapes and dtypes of all tensors, and then reads them.

    Of files that hold nothing but low-rank matrices of layers the checks hold for all that have the
    same header and configuration.
    """
    if not isinstance(tensors, SafetensorsFile):
        return _read_first(source, tensors)[0]
    plans: dict[str, _Plan] = tensors.layout.plans
    configuration = repr(dataclasses.replace(source.helper, base_model_name=None))
    plan = plans.get(configuration)
    if plan is not None:
        read = (layer.read(source, tensors) for layer in plan.layers)
        return Parts({one.module_name: one for one in read}, {}, {}, 0, dict(plan.counts))
    parts, plan = _read_first(source, tensors)
    if plan is not None:
        plans[configuration] = plan
        for oldest in list(plans)[:-_PLANS]:
            plans.pop(oldest, None)  # another thread may have been faster
    return parts


@dataclass(frozen=True)
class _Plan:
    layers: list[LayerPlan]
    counts: Counter[str]


def _read_first(source: Source, tensors: Mapping[str, TensorLike]) -> tuple[Parts, _Plan | None]:
    """Checks and reads; also what holds for all files with this header and configuration."""
    modules = by_module(tensors, source.adapter)
    vocabulary = VocabularyReader(source, modules)
    groups = _groups(source, modules)
    matched = _match(source, groups.layers)
    for layer in matched:
        check_layer(source, layer, vocabulary.added)
    for array, tensors_of_array in groups.fused:
        check_fused(source, array, tensors_of_array)
    for tensor in groups.biases:
        _check_bias(source, tensor)
    vocabulary.check()
    loras: dict[str, LoRALayerWeights] = {}
    layers = [LayerPlan.of(source, layer) for layer in matched]
    read = [layer.read(source, tensors) for layer in layers]
    for array, tensors_of_array in groups.fused:
        read += read_fused(source, array, tensors_of_array)
    for one in read:
        if one.module_name in loras:
            source.fail(f"module {one.module_name} is there under two names")
        loras[one.module_name] = one
    _tie(source, loras)
    rows = vocabulary.read()
    biases = {canonical(source, bias.module): source.read(bias) for bias in groups.biases}
    _refuse_combinations(source, loras, rows, biases)
    parts = Parts(loras, biases, rows, vocabulary.added, dict(groups.counts))
    only_layers = _only_layers(source, modules) and not groups.fused
    return parts, _Plan(layers, groups.counts) if only_layers else None


def _only_layers(source: Source, modules: Modules) -> bool:
    """Whether nothing but layers can come of such a file, whatever numbers are in it."""
    kinds = {kind for tensors in modules.values() for kind in tensors}
    helper = source.helper
    vocabulary = modules.keys() & {EMBED, HEAD} or helper.saved_modules or helper.token_ids
    return kinds <= set(LORA_KINDS) and not vocabulary


def _match(source: Source, layers: list[dict[str, Tensor]]) -> list[Layer]:
    """Matches the configuration's patterns, for a limited time."""
    start, planned = time.monotonic(), []
    for tensors in layers:
        planned.append(plan_layer(source, tensors))
        if time.monotonic() - start > _MATCHING_SECONDS:
            source.fail(
                f"the patterns of its configuration take more than {_MATCHING_SECONDS} s to match"
            )
    return planned


@dataclass
class _Groups:
    layers: list[dict[str, Tensor]]
    fused: list[tuple[Fused, dict[str, Tensor]]]
    biases: list[Tensor]
    counts: Counter[str]


def _groups(source: Source, modules: Modules) -> _Groups:
    """Which tensors are of low-rank adapters, and which are biases; counts every tensor."""
    groups = _Groups([], [], [], Counter())
    for module, tensors in modules.items():
        array = fused(source, next(iter(tensors.values())))
        if array is not None:
            groups.fused.append((array, tensors))
            groups.counts[array.row] += len(tensors)
            continue
        layer = {kind: one for kind, one in tensors.items() if kind in LORA_KINDS}
        for kind, tensor in tensors.items():
            row = place_of(source, tensor).projection
            is_bias = kind in ("bias", "base_layer.bias")
            if is_bias:
                groups.biases.append(tensor)
            elif kind in VOCAB_KINDS and module not in (EMBED, HEAD):
                source.fail(
                    f"tensor {tensor.key} is not supported: whole weights only of embed_tokens "
                    "and lm_head"
                )
            groups.counts["bias" if is_bias else row.name] += 1
        if layer:
            groups.layers.append(layer)
    return groups


def _check_bias(source: Source, tensor: Tensor) -> None:
    """A bias that the module has instead of the base's."""
    place, helper = place_of(source, tensor), source.helper
    if not place.projection.parts[place.part].bias:
        source.fail(f"tensor {tensor.key} is a bias, but {tensor.module} has none in the model")
    targeted = helper.adapted_name(tensor.module) is not None
    if targeted != (tensor.kind == "base_layer.bias") or helper.bias == "none":
        source.fail(
            f"tensor {tensor.key} does not fit bias={helper.bias!r} of its configuration; PEFT "
            "saves <module>.base_layer.bias of modules with an adapter ('lora_only', 'all'), and "
            "<module>.bias of others ('all')"
        )
    if not targeted and helper.bias != "all":
        source.fail(f"tensor {tensor.key} is of a module without an adapter, but bias is not 'all'")
    source.check(tensor, (place.d_out,), f"{place.d_out} out by the model")


def _tie(source: Source, loras: dict[str, LoRALayerWeights]) -> None:
    """With ensure_weight_tying the two modules of a tied vocabulary have one adapter, transposed.

    PEFT gives them the same memory, so that either is enough in a file.
    """
    helper, have = source.helper, [name for name in (EMBED, HEAD) if name in loras]
    if not (source.tied and helper.ensure_weight_tying and have):
        return
    if helper.saved_modules:
        source.fail(
            f"an adapter of {have[0]} beside modules_to_save of a tied model with "
            "ensure_weight_tying is not supported"
        )
    one = loras[have[0]]
    a, b = one.lora_b.T, one.lora_a.T
    if len(have) == 2:
        other = loras[HEAD]
        if not (np.array_equal(other.lora_a, a) and np.array_equal(other.lora_b, b)):
            source.fail(
                "lora_A and lora_B of lm_head are not those of embed_tokens, transposed, which "
                "ensure_weight_tying demands of a tied model"
            )
        return
    name = HEAD if have[0] == EMBED else EMBED
    check_allowed(source, name)
    if helper.use_dora:
        source.fail(f"{name} has no lora_magnitude_vector")
    loras[name] = LoRALayerWeights(name, one.rank, helper.alpha(name), a, b, helper.scaling(name))


def _refuse_combinations(
    source: Source,
    loras: dict[str, LoRALayerWeights],
    rows: dict[str, VocabRows],
    biases: dict[str, np.ndarray],
) -> None:
    """What PEFT does not make, nobody can mean, or is not served."""
    if source.helper.invocation_tokens:
        if EMBED in loras:
            source.fail("alora_invocation_tokens exclude an adapter of embed_tokens, as in PEFT")
        if rows or biases:  # which act before the invocation too, and without one
            source.fail(
                "alora_invocation_tokens beside rows of embed_tokens and lm_head (modules_to_save, "
                "trainable_token_indices, added tokens) or biases of its own is not supported"
            )
        vocab = source.modules.config.vocab_size
        for token in source.helper.invocation_tokens:
            if token >= vocab:
                source.fail(f"alora_invocation_tokens hold {token}, expected less than {vocab}")
    for module in (EMBED, HEAD):
        layer = loras.get(module)
        changed = module.rsplit(".", 1)[-1] in rows
        if layer is not None and layer.magnitude is not None and changed:
            source.fail(
                f"DoRA of {module} beside rows of {module} that are not the base's is not supported"
            )
