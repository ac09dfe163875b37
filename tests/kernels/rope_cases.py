"""The cases of rope_and_write_kv, their inputs, oracle and check."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jlora import kernels
from tests.kernels.compare import NUMPY_DTYPE, Call, assert_close, assert_same_bits, run, seeded
from tests.kernels.lora_cases import LoRACase, draw_lora, expand_oracle, routing_of


@dataclasses.dataclass(frozen=True)
class RopeCase:
    """ranks: of each slot's adapter; None: no delta. parts: 1 where q, k and v share their A."""

    id: str
    tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ranks: tuple[int, ...] | None = None
    parts: int = 3
    order: str = "grouped"
    rotary_dim: int | None = None  # None: all of the head
    first_page: int = 0
    dtype: str = "bfloat16"
    big: bool = False

    @property
    def lora(self) -> LoRACase:
        """The projection whose output it is."""
        widths = tuple(n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads))
        widths = widths if self.parts == 3 else (sum(widths),)
        arguments = (self.tokens, self.ranks or (8,), 32, widths, self.dtype, self.order, 0.2)
        return LoRACase(self.id, *arguments)


ROPE_CASES = [
    RopeCase("one", 1),
    RopeCase("plain-float32", 17, dtype="float32"),
    RopeCase("first-page", 20, first_page=3),
    *(RopeCase(f"head-dim{d}", 9, 2, 1, d, (16, 8)) for d in (16, 80, 96, 128, 256)),
    *(RopeCase(f"kv{n}", 9, 2 * n, n, 16, (16, 24), dtype="float32") for n in (1, 3, 5)),
    RopeCase("one-part", 21, ranks=(16, 40, 0), parts=1, dtype="float32"),
    RopeCase("distinct-float16", 18, ranks=(8,) * 18, order="distinct", dtype="float16"),
    RopeCase("partial", 12, rotary_dim=48, ranks=(16, 8), first_page=1),
    RopeCase("five-tiles", 300, ranks=(16, 8, 0, 40), head_dim=16),
    RopeCase("8b", 64, 32, 8, 128, (16,) * 32, big=True),
]


def draw_rope(case: RopeCase):
    """-> the projection's inputs, cos, sin, kv_pages (of 7 pages of 64) and destinations."""
    rng, dtype = seeded(case.id), NUMPY_DTYPE[case.dtype]
    angles = rng.uniform(-np.pi, np.pi, (case.tokens, (case.rotary_dim or case.head_dim) // 2))
    cos, sin = (1.1 * f(angles).astype(np.float32) for f in (np.cos, np.sin))
    pages = rng.standard_normal((12, 64, 2 * case.kv_heads, case.head_dim), np.float32)
    pages[rng.integers(len(pages))] = np.nan  # kept or overwritten like any other
    destinations = rng.choice(7 * 64, case.tokens, replace=False).astype(np.int32)
    destinations[rng.permutation(case.tokens)[: case.tokens // 5]] = -1
    return draw_lora(case.lora), cos, sin, pages.astype(dtype), destinations


def rope_call(case: RopeCase, implementation, interpret=False) -> Call:
    inputs, *arrays = draw_rope(case)
    slots = kernels.SlotTable(**{name: jnp.asarray(v) for name, v in inputs.slots.items()})

    def turn_and_write(token_slots, slots, qkv, h, b, *arrays):
        routing = routing_of(case.lora, token_slots, implementation)
        delta = None if case.ranks is None else kernels.LoRADelta(h, b, 0, routing, slots)
        return kernels.rope_and_write_kv(
            qkv,
            delta,
            *arrays,
            case.first_page,
            heads=case.heads,
            kv_heads=case.kv_heads,
            in_float32=True,
            implementation=implementation,
            interpret=interpret,
        )

    arguments = (inputs.token_slots, slots, inputs.y, inputs.h, inputs.b, *arrays)
    return Call(turn_and_write, arguments)


def check_rope(case: RopeCase, implementation, interpret=False) -> None:
    """Of the plain layout of pages (TPU pads some)."""
    inputs, cos, sin, pages, at = draw_rope(case)
    q, kv = map(np.asarray, run(rope_call(case, implementation, interpret)))
    whole = inputs.y.astype(np.float64)
    if case.ranks is not None:
        h = np.nan_to_num(inputs.h.astype(np.float64).sum(axis=0))
        whole = expand_oracle(case.lora, inputs, h)
    whole = whole.reshape(case.tokens, -1, case.head_dim)
    turned, half = whole.copy(), cos.shape[1]
    first, second = whole[..., :half], whole[..., half : 2 * half]
    turned[..., :half] = first * cos[:, None] - second * sin[:, None]
    turned[..., half : 2 * half] = second * cos[:, None] + first * sin[:, None]

    assert q.dtype == inputs.y.dtype and kv.dtype == pages.dtype
    assert_close(q, turned[:, : case.heads], case.dtype)
    kv, pages = (p.reshape(-1, *p.shape[2:]) for p in (kv, pages))
    written = at[at >= 0] + case.first_page * 64
    assert_same_bits(*(np.delete(p, written, axis=0) for p in (kv, pages)))
    k_end = case.heads + case.kv_heads
    assert_close(kv[written][:, 0::2], turned[at >= 0, case.heads : k_end], case.dtype)
    assert_close(kv[written][:, 1::2], whole[at >= 0, k_end:], case.dtype)
