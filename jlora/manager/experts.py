"""Adapters of the experts of a layer that transformers holds as two arrays, as PEFT saves them.

PEFT wraps the module `experts` once for each array that target_parameters names, in the order in
which the module defines them, gate_up_proj before down_proj: the outer wrapper is `experts`, the
inner one `experts.base_layer`. In both, A [experts * rank, d_in] lists the experts one after the
other, and B [d_out, rank * experts] the experts of the first rank, then those of the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from jlora.manager.layers import canonical, check_allowed, check_rank
from jlora.manager.tensors import Source, Tensor
from jlora.manager.weights import LoRALayerWeights

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_FUSED = re.compile(r"(.+\.experts)((?:\.base_layer)*)")


@dataclass(frozen=True)
class Fused:
    """One array of all experts: its module in the file, and which array it is.

    experts: canonical name of the module ("model.layers.0.mlp.experts"). name: what PEFT's
    patterns match.
    """

    module: str
    experts: str
    name: str
    parameter: str
    count: int
    row: str

    def expert(self, index: int, part: str) -> str:
        """The module of one expert."""
        return f"{self.experts}.{index}.{part}"


def fused(source: Source, tensor: Tensor) -> Fused | None:
    """The array that a tensor's module adapts, None for a module that is no wrapper of experts."""
    match = _FUSED.fullmatch(tensor.module)
    if match is None:
        return None
    experts = canonical(source, match[1])
    if source.modules.place(f"{experts}.0.down_proj") is None:
        return None
    targeted = [one for one in _PARTS if source.helper.targets_parameter(f"{match[1]}.{one}")]
    depth = match[2].count(".base_layer")
    if depth >= len(targeted):
        source.fail(
            f"tensor {tensor.key} is of array {depth + 1} of the experts from the end, but "
            f"target_parameters={list(source.helper.target_parameters)} of its configuration "
            f"names {targeted or 'none'} of gate_up_proj, down_proj"
        )
    parameter = targeted[-1 - depth]
    place = source.modules.place(f"{experts}.0.{_PARTS[parameter][0]}")
    assert place is not None  # as of down_proj
    name = f"{match[1]}.{parameter}"
    count, row = place.projection.experts, place.projection.name
    return Fused(tensor.module, experts, name, parameter, count, row)


def check_fused(source: Source, array: Fused, tensors: dict[str, Tensor]) -> None:
    """Raises for tensors that are not a low-rank adapter of the array. Reads nothing."""
    rank = check_rank(source, source.helper.rank(array.name), array.name)
    names = [array.expert(0, part) for part in _PARTS[array.parameter]]
    for name in names:
        check_allowed(source, name)
    places = [place for place in map(source.modules.place, names) if place is not None]
    d_in, d_out = places[0].d_in, sum(place.d_out for place in places)
    shapes = {
        "lora_A": (rank * array.count, d_in),
        "lora_B": (d_out, rank * array.count),
    }
    for kind in shapes:
        if kind not in tensors:
            source.fail(f"module {array.module} has no {kind}.weight")
    for kind, tensor in tensors.items():
        if kind not in shapes:
            source.fail(f"tensor {tensor.key} does not belong to an adapter of {array.module}")
        why = f"{array.count} experts of {array.parameter}, rank {rank}, {d_in} in and {d_out} out"
        source.check(tensor, shapes[kind], why)


def read_fused(source: Source, array: Fused, tensors: dict[str, Tensor]) -> list[LoRALayerWeights]:
    """The adapter of each expert and part: views of the two arrays of the file."""
    helper, count = source.helper, array.count
    rank, scale = helper.rank(array.name), helper.scaling(array.name)
    alpha = helper.alpha(array.name)
    a = source.read(tensors["lora_A"]).reshape(count, rank, -1)  # [experts, rank, d_in]
    b = source.read(tensors["lora_B"], abs(scale)).reshape(
        -1, rank, count
    )  # [d_out, rank, experts]
    parts = _PARTS[array.parameter]
    halves = np.split(b, len(parts))
    ranks = [slice(0, rank)] * len(parts)
    if len(parts) == 2 and rank % 2 == 0:
        first, second = slice(0, rank // 2), slice(rank // 2, rank)
        # Two adapters that PEFT has made one of: neither part uses the other's ranks.
        if not halves[0][:, second].any() and not halves[1][:, first].any():
            ranks = [first, second]
    return [
        LoRALayerWeights(
            array.expert(expert, part),
            used.stop - used.start,
            alpha * (used.stop - used.start) / rank,
            a[expert, used],
            half[:, used, expert],
            scale,
        )
        for part, half, used in zip(parts, halves, ranks, strict=True)
        for expert in range(count)
    ]
