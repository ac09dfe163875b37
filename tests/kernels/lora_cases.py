"""The cases of lora_shrink and lora_expand, their inputs, oracles and checks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import kernels
from tests.kernels.compare import (
    DTYPES,
    NUMPY_DTYPE,
    Call,
    assert_close,
    assert_same_bits,
    run,
    seeded,
)

VIRTUAL_EXPERTS = 128


@dataclasses.dataclass(frozen=True)
class LoRACase:
    """One step's tokens and one projection's adapters.

    ranks: rank of each slot's adapter, 0 where it does not touch this projection.
    order: "sorted" tokens, "grouped" (the same with some that have no adapter in between),
        "shuffled", "distinct" (token t has slot t), or "experts": the slots
        are those of `VIRTUAL_EXPERTS` experts, three adapters are in use, and tokens are sorted by
        expert, not by adapter.
    without: share of the tokens without an adapter.
    """

    id: str
    tokens: int
    ranks: tuple[int, ...]
    d_in: int = 128
    part_widths: tuple[int, ...] = (128,)
    dtype: str = "bfloat16"
    order: str = "shuffled"
    without: float = 0.0
    block_rank: int = 16
    layers: int = 1
    layer: int = 0
    traced_layer: bool = False
    splits: int = 2  # of the h given to expand
    big: bool = False


class LoRAInputs(NamedTuple):
    """Numpy arrays of a case, in the case's dtype."""

    token_slots: np.ndarray  # [tokens]
    slots: dict[str, np.ndarray]  # the fields of a SlotTable
    x: np.ndarray  # [tokens, d_in]
    a: np.ndarray  # [layers, blocks, parts, block_rank, d_in]
    y: np.ndarray  # [tokens, d_out]
    h: np.ndarray  # float32 [splits, tokens, max_blocks, parts, block_rank], NaN where unspecified
    b: np.ndarray  # [layers, blocks, block_rank, d_out]


def draw_lora(case: LoRACase) -> LoRAInputs:
    rng, dtype = seeded(case.id), NUMPY_DTYPE[case.dtype]
    slots, used_ranks = _draw_slots(rng, case)
    token_slots = _draw_token_slots(rng, case)
    blocks, parts, d_out = used_ranks.shape[0], len(case.part_widths), sum(case.part_widths)

    def pool(shape, scale):  # rows past a block's rank are zero, unused blocks hold garbage
        values = rng.standard_normal(shape, np.float32) * np.float32(scale)
        return values

    a = pool((case.layers, blocks, parts, case.block_rank, case.d_in), case.d_in**-0.5)
    b = pool((case.layers, blocks, case.block_rank, d_out), 0.25)
    row = np.arange(case.block_rank)
    empty = (row >= used_ranks[:, None]) & (used_ranks[:, None] >= 0)  # [blocks, block_rank]
    a[np.broadcast_to(empty[None, :, None], a.shape[:4])] = 0
    b[np.broadcast_to(empty[None], b.shape[:3])] = 0
    a[:, used_ranks < 0] *= 100
    b[:, used_ranks < 0] *= 100

    max_blocks = slots["blocks"].shape[1]
    h_shape = (case.splits, case.tokens, max_blocks, parts, case.block_rank)
    h = rng.standard_normal(h_shape, np.float32)
    h[:, ~used_blocks(token_slots, slots)] = np.nan
    x = rng.standard_normal((case.tokens, case.d_in), np.float32)
    y = rng.standard_normal((case.tokens, d_out), np.float32)
    return LoRAInputs(
        token_slots, slots, x.astype(dtype), a.astype(dtype), y.astype(dtype), h, b.astype(dtype)
    )


def _draw_slots(rng, case: LoRACase):
    """-> the slot table, and the rank used of each block of the pool (-1: no slot holds it)."""
    counts = np.array([-(-rank // case.block_rank) for rank in case.ranks], np.int32)
    max_blocks = int(counts.max(initial=0)) + 1
    pool = int(counts.sum()) + 3
    free = list(rng.permutation(pool))  # so that the blocks of a slot are scattered
    blocks = rng.integers(0, pool, (len(counts), max_blocks)).astype(np.int32)
    used = np.full(pool, -1)
    for slot, rank in enumerate(case.ranks):
        for j in range(counts[slot]):
            blocks[slot, j] = free.pop()
            used[blocks[slot, j]] = min(rank - j * case.block_rank, case.block_rank)
    scales = rng.uniform(0.25, 2.0, blocks.shape).astype(np.float32)
    return {"blocks": blocks, "counts": counts, "scales": scales}, used


def _draw_token_slots(rng, case: LoRACase) -> np.ndarray:
    if case.order == "distinct":
        token_slots = np.arange(case.tokens) % len(case.ranks)
    elif case.order == "experts":
        adapters = rng.choice(len(case.ranks) // VIRTUAL_EXPERTS, 3, replace=False)
        expert = np.sort(rng.integers(0, VIRTUAL_EXPERTS, case.tokens))
        token_slots = rng.choice(adapters, case.tokens) * VIRTUAL_EXPERTS + expert
    else:
        token_slots = rng.integers(0, len(case.ranks), case.tokens)
        token_slots = np.sort(token_slots) if case.order == "grouped" else token_slots
    bare = rng.permutation(case.tokens)[: round(case.without * case.tokens)]
    token_slots[bare] = kernels.NO_ADAPTER
    if case.order == "sorted":  # tokens without an adapter come last
        token_slots = token_slots[np.lexsort((token_slots, token_slots < 0))]
    return token_slots.astype(np.int32)


def used_blocks(token_slots: np.ndarray, slots: dict[str, np.ndarray]) -> np.ndarray:
    """[tokens, max_blocks]: which entries of h are specified."""
    rows = np.maximum(token_slots, 0)
    column = np.arange(slots["blocks"].shape[1])
    return (column < slots["counts"][rows][:, None]) & (token_slots >= 0)[:, None]


def _slot_blocks(case: LoRACase, inputs: LoRAInputs):
    """Yields (tokens of a slot, j, block, scale) for every block in use by some token."""
    for slot in np.unique(inputs.token_slots[inputs.token_slots >= 0]):
        at = np.flatnonzero(inputs.token_slots == slot)
        for j in range(inputs.slots["counts"][slot]):
            yield at, j, inputs.slots["blocks"][slot, j], float(inputs.slots["scales"][slot, j])


def shrink_oracle(case: LoRACase, inputs: LoRAInputs) -> np.ndarray:
    """h [tokens, max_blocks, parts, block_rank] in float64, zero where unspecified."""
    h = np.zeros(inputs.h.shape[1:])
    x, a = inputs.x.astype(np.float64), inputs.a[case.layer].astype(np.float64)
    for at, j, block, _ in _slot_blocks(case, inputs):
        h[at, j] = np.einsum("td,prd->tpr", x[at], a[block], optimize=True)
    return h


def expand_oracle(case: LoRACase, inputs: LoRAInputs, h: np.ndarray) -> np.ndarray:
    """y plus the delta, in float64, from h [tokens, max_blocks, parts, block_rank]."""
    y = inputs.y.astype(np.float64)
    ends = np.cumsum(case.part_widths)
    b = inputs.b[case.layer].astype(np.float64)
    for at, j, block, scale in _slot_blocks(case, inputs):
        for part, (end, width) in enumerate(zip(ends, case.part_widths, strict=True)):
            y[at, end - width : end] += scale * h[at, j, part] @ b[block, :, end - width : end]
    return y


def lora_call(case: LoRACase, inputs: LoRAInputs, function, *arrays) -> Call:
    """`function(layer, token_slots, slots, *arrays)`; the layer is traced if the case says so."""
    slots = kernels.SlotTable(**{name: jnp.asarray(v) for name, v in inputs.slots.items()})
    arguments = (inputs.token_slots, slots, *arrays)
    if case.traced_layer:
        return Call(function, (np.int32(case.layer), *arguments))
    return Call(lambda *arguments: function(case.layer, *arguments), arguments)


def routing_of(case: LoRACase, token_slots, implementation):
    """That tokens are grouped is said where it is so."""
    grouped = len(case.ranks) if case.order in ("sorted", "grouped") else None
    return kernels.lora_routing(token_slots, grouped, implementation=implementation)


def shrink_call(case: LoRACase, inputs: LoRAInputs, implementation, interpret=False) -> Call:
    def shrink(layer, token_slots, slots, x, a):
        routing = routing_of(case, token_slots, implementation)
        return kernels.lora_shrink(
            x, a, layer, routing, slots, implementation=implementation, interpret=interpret
        )

    return lora_call(case, inputs, shrink, inputs.x, inputs.a)


def expand_call(case: LoRACase, inputs: LoRAInputs, h, implementation, interpret=False) -> Call:
    def expand(layer, token_slots, slots, y, h, b):
        routing = routing_of(case, token_slots, implementation)
        delta = kernels.LoRADelta(h, b, layer, routing, slots)
        return kernels.lora_expand(
            y, delta, case.part_widths, implementation=implementation, interpret=interpret
        )

    return lora_call(case, inputs, expand, inputs.y, h, inputs.b)


def gated_call(
    case: LoRACase, inputs: LoRAInputs, implementation, interpret=False, activation=jax.nn.silu
) -> Call:
    """For cases of two equal parts."""

    def gated(layer, token_slots, slots, y, h, b):
        routing = routing_of(case, token_slots, implementation)
        delta = kernels.LoRADelta(h, b, layer, routing, slots)
        return kernels.gated(
            y, delta, activation, implementation=implementation, interpret=interpret
        )

    return lora_call(case, inputs, gated, inputs.y, inputs.h, inputs.b)


def check_shrink(case: LoRACase, implementation, interpret=False) -> None:
    inputs = draw_lora(case)
    out = np.asarray(run(shrink_call(case, inputs, implementation, interpret)))
    assert out.dtype == np.float32 and out.shape[1:] == inputs.h.shape[1:]
    used = used_blocks(inputs.token_slots, inputs.slots)
    out = out.astype(np.float64)[:, used].sum(axis=0)  # [entries, parts, block_rank]
    # Products of 16-bit operands are exact in float32, and so summed.
    assert_close(out, shrink_oracle(case, inputs)[used], "float32")


def check_expand(case: LoRACase, implementation, interpret=False) -> None:
    inputs = draw_lora(case)
    out = np.asarray(run(expand_call(case, inputs, inputs.h, implementation, interpret)))
    _check_expanded(case, inputs, out, np.nan_to_num(inputs.h.astype(np.float64).sum(axis=0)))


def check_shrink_expand(case: LoRACase, implementation, interpret=False) -> None:
    """The two together, with whatever shrink leaves in the entries that it does not specify."""
    inputs = draw_lora(case)
    h = run(shrink_call(case, inputs, implementation, interpret))
    out = np.asarray(run(expand_call(case, inputs, h, implementation, interpret)))
    _check_expanded(case, inputs, out, shrink_oracle(case, inputs))


def check_gated(case: LoRACase, implementation, interpret=False) -> None:
    inputs = draw_lora(case)
    out = np.asarray(run(gated_call(case, inputs, implementation, interpret)))
    h = np.nan_to_num(inputs.h.astype(np.float64).sum(axis=0))
    gate, up = np.split(expand_oracle(case, inputs, h), 2, axis=1)
    assert out.dtype == inputs.y.dtype
    assert_close(out, gate / (1 + np.exp(-gate)) * up, case.dtype)


def embedding_call(case: LoRACase, inputs: LoRAInputs) -> Call:
    """`lora_embedding_shrink` of random tokens, d_in being the vocabulary."""
    tokens = seeded(case.id).integers(0, case.d_in, case.tokens, np.int32)
    a = np.ascontiguousarray(inputs.a[case.layer, :, 0].swapaxes(1, 2))  # [blocks, vocab, rank]

    def shrink(layer, token_slots, slots, tokens, a):
        routing = kernels.lora_routing(token_slots, implementation="xla")
        return kernels.lora_embedding_shrink(tokens, a, routing, slots)

    return lora_call(case, inputs, shrink, tokens, a)


def check_embedding(case: LoRACase) -> None:
    """Against the shrink of one-hot rows, exactly, and expanded where the case has one part."""
    inputs = draw_lora(case)
    call = embedding_call(case, inputs)
    h, (*_, tokens, _) = np.asarray(run(call)), call.arguments
    one_hot = np.eye(case.d_in, dtype=inputs.x.dtype)[tokens]
    ref = shrink_oracle(case, inputs._replace(x=one_hot))[:, :, :1]
    assert h.dtype == np.float32
    np.testing.assert_array_equal(h[0], ref)
    if len(case.part_widths) == 1:
        out = np.asarray(run(expand_call(case, inputs, h, "xla")))
        _check_expanded(case, inputs, out, ref)


def _check_expanded(case: LoRACase, inputs: LoRAInputs, out: np.ndarray, h: np.ndarray) -> None:
    assert out.dtype == inputs.y.dtype
    bare = inputs.token_slots < 0
    assert_same_bits(out[bare], inputs.y[bare])
    assert_close(out[~bare], expand_oracle(case, inputs, h)[~bare], case.dtype)


_QKV, _MIXED_RANKS = (576, 192, 192), (8, 16, 64, 1, 32)
_EXPERT_RANKS = (16, 8, 0, 24, 16, 0, 4, 40) * VIRTUAL_EXPERTS  # of 8 adapters, 1,024 slots

LORA_CASES = [
    LoRACase("none", 24, (16, 8), without=1.0),
    LoRACase("one-token", 1, (16,), dtype="float32"),
    LoRACase("one-token-none", 1, (16,), without=1.0),
    *(
        LoRACase(f"{tokens}-tokens", tokens, (16, 32, 8), 72, (72,), DTYPES[tokens % 3])
        for tokens in (2, 7, 15, 16, 17, 31, 64)
    ),
    *(
        LoRACase(f"rank{rank}", 5, (rank, 8), 72, (72,), DTYPES[rank % 3], splits=1)
        for rank in (1, 2, 8, 15, 16, 17, 64, 100, 256)
    ),
    *(
        LoRACase(f"mixed-{order}-{dtype}", 40, _MIXED_RANKS, 1000, (72,), dtype, order, 0.2)
        for order in ("sorted", "shuffled")
        for dtype in DTYPES
    ),
    LoRACase("one-adapter", 20, (0, 24, 0), 576, (576,), order="sorted"),
    LoRACase("half-without", 20, (16, 48), 72, (1000,), "float32", without=0.5),
    LoRACase("absent-here", 12, (0, 16, 0, 0, 40), 72, (72,), without=0.25),
    LoRACase("only-absent", 6, (0, 0), 72, (72,)),
    LoRACase("distinct-qkv", 16, tuple(range(1, 49, 3)), 576, _QKV, order="distinct"),
    LoRACase("distinct-qkv-f32", 9, (4, 8, 16, 17, 33), 576, _QKV, "float32", "distinct"),
    LoRACase("gate-up", 33, _MIXED_RANKS, 576, (1536, 1536), order="sorted"),
    LoRACase("down", 9, _MIXED_RANKS, 1536, (576,), "float16", "sorted", splits=3),
    LoRACase("parts-uneven", 18, (16, 64), 72, (72, 1000, 8), "float32", without=0.1),
    LoRACase("layer-int", 6, (16, 20), layers=3, layer=2),
    LoRACase("layer-traced", 6, (16, 20), layers=3, layer=1, traced_layer=True),
    LoRACase("layer-traced-qkv", 17, (8, 40), 576, _QKV, layers=2, layer=1, traced_layer=True),
    LoRACase("many-slots", 24, (16,) * 128, 72, (72,), without=0.1),
    LoRACase("all-slots", 128, (8, 16) * 64, 128, (128,), order="distinct", big=True),
    *(
        LoRACase(f"experts-{rows}", rows, _EXPERT_RANKS, 72, (40, 40), order="experts", without=0.1)
        for rows in (40, 512)
    ),
    LoRACase("gate-up-gaps", 70, _MIXED_RANKS, 72, (40, 40), order="grouped", without=0.4),
    LoRACase("gate-up-large", 700, _MIXED_RANKS, 72, (512, 512), order="grouped", without=0.3),
    LoRACase("one-tile", 64, (16,) * 12, 136, (96, 24), order="sorted"),
    LoRACase("one-tile-gaps", 24, (40, 16, 0, 8), 576, _QKV, order="grouped", without=0.3),
    LoRACase("one-tile-f32", 30, (16, 24), 300, (1000,), "float32", "grouped", splits=3),
    LoRACase(
        "grouped-33-slots", 60, (16, 8, 0, 40, 24) * 6 + (3,) * 3, 72, (72, 72), order="grouped"
    ),
    LoRACase("grouped-8-slots", 8, (16, 8, 0, 40) * 2, 300, (72,), "float32", "grouped", 0.3),
    LoRACase("grouped-block8", 9, (4, 8, 20, 3), 72, _QKV, "float16", "grouped", block_rank=8),
    LoRACase("five-tiles", 300, (16, 8, 0, 40), 72, (72, 100), order="grouped", without=0.2),
    LoRACase("two-tiles", 129, (16, 8, 0, 40), 136, (72, 100), order="grouped", without=0.2),
    LoRACase("large-tiles", 1030, (16, 8, 24), 72, (72, 40), order="grouped", without=0.1),
    LoRACase("block8", 10, (4, 8, 20), 72, (72,), block_rank=8),
    LoRACase("block32", 10, (4, 32, 80), 72, (72,), block_rank=32),
    LoRACase("decode32-4k", 32, (16,) * 32, 4096, (4096, 1024, 1024), order="distinct", big=True),
    LoRACase("decode-8k-f32", 8, (16, 64), 8192, (2048,), "float32", "sorted", big=True),
    LoRACase("prefill512", 512, _MIXED_RANKS, 1536, (1536,), order="sorted", big=True),
    LoRACase("prefill512-shuffled", 512, _MIXED_RANKS, 576, _QKV, "float16", big=True),
    LoRACase(
        "512-tokens-128-slots",
        512,
        (*(1 + 37 * slot % 128 for slot in range(127)), 256),
        576,
        (1000,),
        without=0.1,
        layers=2,
        layer=1,
        big=True,
    ),
]
GATED_CASES = [
    case
    for case in LORA_CASES
    if len(case.part_widths) == 2 and case.part_widths[0] == case.part_widths[1]
] + [
    LoRACase("gated-none", 24, (16, 8), 72, (72, 72), without=1.0),
    LoRACase("gated-distinct-f32", 17, (4, 8, 0, 40), 72, (72, 72), "float32", "distinct"),
    LoRACase("gated-float16", 130, (16,) * 9, 72, (128, 128), "float16", "grouped", 0.2),
    LoRACase("gated-4k", 64, (16,) * 32, 128, (4096, 4096), order="grouped", without=0.1, big=True),
]
