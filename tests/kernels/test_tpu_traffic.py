"""tpu_traffic against the kernels themselves: their copies counted, their index maps walked."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as shipped_kernel

from jlora import kernels
from jlora.kernels import attention_tpu, grouped_tpu, lora_tpu, tpu_traffic

BF16, TILE, COLUMNS = jnp.bfloat16, 16, 256
RNG = np.random.default_rng(0)
SLOTS = {  # the slot of each token
    "one": np.array([2]),
    "decode": np.array([0, 0, 1, 2, -1, 3, 3, 4]),
    "none": np.full(8, -1),
    "tiles": np.repeat([0, 1, 2, 3, 4, -1], 8),
    "shuffled": RNG.integers(-1, 5, 48),
}
COUNTS = np.array([1, 2, 0, 1, 2])


@pytest.fixture
def copied(monkeypatch):
    """The bytes that kernels copy while they are interpreted, by the copies' shapes."""
    total, make = [], pltpu.make_async_copy

    def counting(source, to, sem):
        copy, size = make(source, to, sem), int(np.prod(to.shape)) * jnp.dtype(to.dtype).itemsize
        start = copy.start

        def counted():
            jax.debug.callback(lambda: total.append(size))
            start()

        copy.start = counted
        return copy

    monkeypatch.setattr(pltpu, "make_async_copy", counting)

    def read() -> int:
        jax.effects_barrier()
        return sum(total)

    return read


def walked(monkeypatch, call) -> int:
    """Bytes of the blocks that the kernel of a call fetches and writes, by its own index maps."""
    seen = []

    def record(_, *, grid_spec, out_shape, **__):
        def kernel(*arguments):
            seen.append((grid_spec, jax.tree.leaves(arguments), out_shape))
            return jnp.zeros(out_shape.shape, out_shape.dtype)

        return kernel

    with monkeypatch.context() as patch, jax.disable_jit():
        patch.setattr(pl, "pallas_call", record)
        call()
    ((spec, leaves, out_shape),) = seen
    specs = jax.tree.leaves([*spec.in_specs, spec.out_specs])
    operands = [*leaves[len(leaves) - len(specs) + 1 :], out_shape]
    prefetched = [np.asarray(leaf) for leaf in leaves[: len(leaves) - len(specs) + 1]]
    if spec.num_scalar_prefetch == 2:  # gmm's are a pytree and an array
        prefetched = [prefetched[:-1], prefetched[-1]]
    total = 0
    for one, operand in zip(specs, operands, strict=True):
        if one.index_map is not None and one.block_shape is not None:
            last = None
            for step in itertools.product(*(range(int(size)) for size in spec.grid)):
                index = tuple(int(i) for i in one.index_map(*step, *prefetched))
                if index != last:
                    total += block_bytes(one.block_shape, index, operand)
                last = index
    return total


def block_bytes(block, index, operand) -> int:
    sizes = [
        min(have or 1, size - at * (have or 1))
        for have, at, size in zip(block, index, operand.shape, strict=True)
    ]
    return int(np.prod(sizes)) * jnp.dtype(operand.dtype).itemsize


def lora_inputs(slots: np.ndarray, d_in: int, widths: tuple[int, ...]):
    parts, blocks = len(widths), jnp.arange(2 * len(COUNTS), dtype=jnp.int32).reshape(-1, 2)
    table = kernels.SlotTable(blocks, jnp.asarray(COUNTS, jnp.int32), jnp.ones((5, 2)))
    routing = kernels.lora_routing(jnp.asarray(slots, jnp.int32), implementation="tpu")
    x, y = jnp.ones((len(slots), d_in), BF16), jnp.ones((len(slots), sum(widths)), BF16)
    a, b = jnp.ones((1, 10, parts, 16, d_in), BF16), jnp.ones((1, 10, 16, sum(widths)), BF16)
    h = jnp.ones((1, len(slots), 2, parts, 16), jnp.float32)
    return x, y, a, kernels.LoRADelta(h, b, 0, routing, table)


LORA = [("one", (128,)), ("decode", (384, 128, 128)), ("none", (128,)), ("tiles", (384, 128, 128))]


@pytest.mark.parametrize(("slots", "widths"), [*LORA, ("shuffled", (128,))])
def test_lora(slots, widths, copied, monkeypatch):
    monkeypatch.setattr(lora_tpu, "TOKEN_TILE", TILE)
    monkeypatch.setattr(lora_tpu, "COLUMN_TILE", COLUMNS)
    tokens = SLOTS[slots]
    x, y, a, delta = lora_inputs(tokens, 256, widths)

    def shrink():
        args = (x, a, 0, delta.routing, delta.slots)
        return lora_tpu.lora_shrink_tpu(*args, interpret=True)

    def expand():
        return lora_tpu.lora_expand_tpu(y, delta, widths, interpret=True)

    sizes = {"parts": len(widths), "max_blocks": 2}
    expected = tpu_traffic.shrink(tokens, COUNTS, d_in=256, **sizes)
    jax.block_until_ready(shrink())
    assert copied() == expected.pool
    assert walked(monkeypatch, shrink) == expected.blocks
    before, expected = copied(), tpu_traffic.expand(tokens, COUNTS, part_widths=widths, **sizes)
    jax.block_until_ready(expand())
    assert copied() - before == expected.pool
    assert walked(monkeypatch, expand) == expected.blocks


@pytest.mark.parametrize("sizes", [(8, 8), (0, 3, 0, 200, 53), (256,), (1,) * 40, (0, 0)])
@pytest.mark.parametrize("depth", [128, 384])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped(sizes, depth, transposed, monkeypatch):
    monkeypatch.setattr(grouped_tpu, "DEPTH_TILE", 128)
    monkeypatch.setattr(grouped_tpu, "WEIGHT_BYTES", 128 * 128 * 2)
    rows = max(-(-sum(sizes) // 128), 1) * 128
    x, w = jnp.ones((rows, depth), BF16), jnp.ones((len(sizes), depth, 256), BF16)
    groups = jnp.asarray(sizes, jnp.int32)
    w = jnp.swapaxes(w, 1, 2) if transposed else w
    multiply = functools.partial(grouped_tpu.grouped_matmul_tpu, transpose_rhs=transposed)
    moved = walked(monkeypatch, lambda: multiply(x, w, groups))
    expected = tpu_traffic.grouped(np.array(sizes), d_in=depth, d_out=256)
    assert moved == expected.pool + expected.blocks


def page_tables(q_lens, kv_lens, pages: int):
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    indices = np.arange(len(q_lens) * pages).reshape(len(q_lens), pages)
    return [jnp.asarray(x, jnp.int32) for x in (kv_lens, indices, starts, [len(q_lens)])]


@pytest.mark.parametrize(
    ("q_lens", "kv_lens"), [((1, 1, 1), (40, 64, 1)), ((8,), (8,)), ((5, 3, 24), (21, 3, 64))]
)
def test_attention(q_lens, kv_lens, copied, monkeypatch):
    """With the stand-ins of test_tpu.py for what the interpreter cannot follow."""

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(shipped_kernel.pltpu, "store", store)
    monkeypatch.setattr(attention_tpu, "BLOCK_KEYS", 32)
    shipped_kernel.ragged_paged_attention.clear_cache()
    page, tokens = (16, 4, 128), sum(q_lens)
    q = jnp.ones((tokens, 4, 128), BF16)
    tables = page_tables(q_lens, kv_lens, 4)
    pages = jnp.ones((4 * len(q_lens), *page), BF16)
    out = attention_tpu.ragged_paged_attention_tpu(
        q, pages, *tables, kv_heads=2, sm_scale=1.0, interpret=True
    )
    jax.block_until_ready(out)
    shipped_kernel.ragged_paged_attention.clear_cache()
    lens = np.array(q_lens), np.array(kv_lens)
    expected = tpu_traffic.attention(*lens, heads=4, page=page, max_pages=4)
    assert copied() == expected.pool
    assert expected.blocks == 2 * q.size * 2


def test_attention_reads_the_keys_for_each_block_of_queries(monkeypatch):
    """The interpreter forgets the buffer between grid steps, so this is worked out by hand."""
    monkeypatch.setattr(attention_tpu, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(attention_tpu, "BLOCK_KEYS", 32)
    lens = np.array([3, 0, 6]), np.array([33, 0, 70])  # in query blocks 0; 0, 1 and 2
    found = tpu_traffic.attention(*lens, heads=4, page=(16, 4, 128), max_pages=8)
    assert found.pool == (2 + 3 * 3) * 32 * 4 * 128 * 2


def test_write_kv(copied):
    page, new = (4, 4, 128), jnp.ones((6, 2, 128), BF16)
    at = jnp.asarray([0, 5, 9, 17, 2, 3], jnp.int32)
    pages = attention_tpu.write_kv_tpu(jnp.zeros((8, *page), BF16), new, new, at, interpret=True)
    jax.block_until_ready(pages)
    assert copied() == tpu_traffic.write_kv(6, page=page).pool


def test_few_adapters_are_read_where_one_hot_reads_all():
    slots, counts = np.repeat(np.arange(8), 4), np.ones(32, int)
    sizes = {"d_in": 4096, "parts": 1}
    kernel = tpu_traffic.shrink(slots, counts, **sizes) + tpu_traffic.expand(
        slots, counts, part_widths=(4096,), parts=1
    )
    einsum = tpu_traffic.one_hot(32, 32, d_out=4096, **sizes)
    assert kernel.pool * 4 == einsum.pool
    assert kernel.flops * 4 == einsum.flops
