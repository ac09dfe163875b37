"""The GPU kernels: interpreted and lowered on the CPU, and the whole list on a GPU (`-m gpu`)."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jlora import kernels
from jlora.model.layers import ACTIVATIONS
from tests.kernels import cases

by_id = operator.attrgetter("id")


def _subset(every, *ids):
    return [case for case in every if case.id in ids]


LORA_SUBSET = _subset(
    cases.LORA_CASES,
    *("none", "17-tokens", "rank100", "mixed-shuffled-float16", "half-without", "distinct-qkv"),
    *("layer-traced-qkv", "parts-uneven", "only-absent", "many-slots", "block8", "block32"),
    *("experts-40", "one-tile", "one-tile-gaps", "one-tile-f32", "two-tiles", "five-tiles"),
    *("grouped-33-slots", "grouped-8-slots", "grouped-block8"),
)
ATTENTION_SUBSET = _subset(
    cases.ATTENTION_CASES,
    *("decode-padding", "padding", "chunk", "ragged-float16", "head-dim80", "head-dim256-kv8"),
    *("kv3-group3-float32", "window16", "soft-cap-window", "long-decode", "window-long"),
)
WRITE_SUBSET = _subset(cases.WRITE_CASES, "scattered-bfloat16", "cast", "one-skipped", "kv3")


# Large ones and those of a thousand slots take long to interpret.
QUICK_READERS = [
    param
    for param in cases.READER_CHECKS
    if not param.values[1].big and getattr(param.values[1], "order", "") != "experts"
]


@pytest.mark.parametrize("case", LORA_SUBSET, ids=by_id)
@pytest.mark.parametrize("check", [cases.check_shrink, cases.check_expand])
def test_lora_interpreted(case, check):
    check(case, "gpu", interpret=True)


def check_infinite_values_stay(interpret):
    """What an adapter holds that is not finite spoils its own tokens only."""
    case = cases.LoRACase("infinite", 20, (16, 16, 16), order="grouped", without=0.2)
    inputs = cases.draw_lora(case)
    spoilt = int(inputs.slots["blocks"][1, 0])
    inputs.b[:, spoilt, 3, 5], inputs.b[:, spoilt, 4, 70] = np.inf, np.nan
    out = cases.run(cases.expand_call(case, inputs, inputs.h, "gpu", interpret))
    finite = np.isfinite(np.asarray(out)).all(axis=1)
    np.testing.assert_array_equal(finite, inputs.token_slots != 1)


def test_infinite_values_stay_interpreted():
    check_infinite_values_stay(interpret=True)


@pytest.mark.parametrize(("check", "case"), QUICK_READERS)
def test_readers_interpreted(check, case):
    check(case, "gpu", interpret=True)


@pytest.mark.parametrize("case", ATTENTION_SUBSET, ids=by_id)
def test_attention_interpreted(case):
    cases.check_attention(case, "gpu", interpret=True)


@pytest.mark.parametrize("case", WRITE_SUBSET, ids=by_id)
def test_write_kv_interpreted(case):
    cases.check_write_kv(case, "gpu", interpret=True)


@pytest.mark.parametrize("case", cases.GROUPED_CASES, ids=by_id)
def test_grouped_matmul_interpreted(case):
    cases.check_grouped(case, "gpu", interpret=True)


def _shrink(case) -> cases.Call:
    return cases.shrink_call(case, cases.draw_lora(case), "gpu")


def _expand(case) -> cases.Call:
    inputs = cases.draw_lora(case)
    return cases.expand_call(case, inputs, inputs.h, "gpu")


def _gated(case) -> cases.Call:
    return cases.gated_call(case, cases.draw_lora(case), "gpu")


def _rope(case) -> cases.Call:
    return cases.rope_call(case, "gpu")


def _norm(case) -> cases.Call:
    return cases.norm_call(case, "gpu")


def _attention(case) -> cases.Call:
    return cases.attention_call(case, cases.draw_attention(case), "gpu")


def _write(case) -> cases.Call:
    return cases.write_call(case, "gpu")


def _grouped(case) -> cases.Call:
    return cases.grouped_call(case, "gpu")


EVERY_CALL = [
    *(pytest.param(_shrink, case, id=f"shrink-{case.id}") for case in cases.LORA_CASES),
    *(pytest.param(_expand, case, id=f"expand-{case.id}") for case in cases.LORA_CASES),
    *(pytest.param(_gated, case, id=f"gated-{case.id}") for case in cases.GATED_CASES),
    *(pytest.param(_rope, case, id=f"rope-{case.id}") for case in cases.ROPE_CASES),
    *(pytest.param(_norm, case, id=f"norm-{case.id}") for case in cases.NORM_CASES),
    *(pytest.param(_attention, case, id=f"attention-{case.id}") for case in cases.ATTENTION_CASES),
    *(pytest.param(_write, case, id=f"write-{case.id}") for case in cases.WRITE_CASES),
    *(pytest.param(_grouped, case, id=f"grouped-{case.id}") for case in cases.GROUPED_CASES),
]


def triton_kernels(call: cases.Call) -> int:
    """How many there are in the call as it is lowered for a GPU."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        traced = jax.jit(call.function).trace(*call.arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("@__gpu$xla.gpu.triton")


@pytest.mark.parametrize(("make_call", "case"), EVERY_CALL)
def test_lowers_to_triton(make_call, case):
    """Shapes, masks and primitives that Triton would refuse are refused without a GPU, too."""
    # A head that turns in part is written after expand; a row can be too wide for the kernel.
    kernels_of_call = {"partial": 2, "too-wide": 0}.get(case.id, 1)
    assert triton_kernels(make_call(case)) == kernels_of_call


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_lowers_to_triton(name):
    """One that Triton cannot compute is XLA's, after expand."""
    case = cases.GATED_CASES[0]
    inputs = cases.draw_lora(case)
    assert triton_kernels(cases.gated_call(case, inputs, "gpu", activation=ACTIVATIONS[name])) == 1


def test_block_rank_refused():
    case = cases.LoRACase("block12", 4, (12,), block_rank=12)
    for make_call in (_shrink, _expand):
        with pytest.raises(NotImplementedError, match="block rank 12"):
            cases.run(make_call(case))


# ------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.LORA_CASES, ids=by_id)
@pytest.mark.parametrize(
    "check",
    [cases.check_shrink, cases.check_expand, cases.check_shrink_expand],
)
def test_lora_compiled(case, check):
    check(case, "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "case"), cases.READER_CHECKS)
def test_readers_compiled(check, case):
    check(case, "gpu")


@pytest.mark.gpu
def test_infinite_values_stay():
    check_infinite_values_stay(interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.ATTENTION_CASES, ids=by_id)
def test_attention_compiled(case):
    cases.check_attention(case, "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.WRITE_CASES, ids=by_id)
def test_write_kv_compiled(case):
    cases.check_write_kv(case, "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.GROUPED_CASES, ids=by_id)
def test_grouped_matmul_compiled(case):
    cases.check_grouped(case, "gpu")


@pytest.mark.gpu
def test_same_bits_twice():
    for case in cases.LORA_CASES:
        inputs = cases.draw_lora(case)
        used = cases.used_blocks(inputs.token_slots, inputs.slots)
        h, again = (np.asarray(cases.run(_shrink(case)))[:, used] for _ in range(2))
        cases.assert_same_bits(h, again)
        cases.assert_same_bits(cases.run(_expand(case)), cases.run(_expand(case)))
    for make_call, every in (
        (_gated, cases.GATED_CASES),
        (_rope, cases.ROPE_CASES),
        (_norm, cases.NORM_CASES),
        (_attention, cases.ATTENTION_CASES),
        (_grouped, cases.GROUPED_CASES),
    ):
        for case in every:
            first, second = (cases.run(make_call(case)) for _ in range(2))
            jax.tree.map(cases.assert_same_bits, first, second)


LAYERS, TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, PAGES = 4, 32, 1024, 8, 2, 128, 512


def _step(kv_pages, x, a, b, slots, token_slots, batch):
    """A few layers of nothing but our kernels."""
    kv_lens, page_indices, cu_q_lens, num_seqs, destinations = batch
    routing = kernels.lora_routing(token_slots, implementation="gpu")

    def layer(index, carry):
        kv_pages, x = carry
        h = kernels.lora_shrink(x, a, index, routing, slots, implementation="gpu")
        delta = kernels.LoRADelta(h, b, index, routing, slots)
        y = kernels.lora_expand(x, delta, (WIDTH // 2, WIDTH // 2), implementation="gpu")
        q = y.reshape(TOKENS, HEADS, HEAD_DIM)
        k, v = q[:, :KV_HEADS], q[:, -KV_HEADS:]
        kv_pages = kernels.write_kv(kv_pages, k, v, destinations + index, implementation="gpu")
        out = kernels.ragged_paged_attention(
            q,
            kv_pages,
            kv_lens,
            page_indices,
            cu_q_lens,
            num_seqs,
            kv_heads=KV_HEADS,
            sm_scale=HEAD_DIM**-0.5,
            implementation="gpu",
        )
        return kv_pages, out.reshape(x.shape)

    return jax.lax.fori_loop(0, LAYERS, layer, (kv_pages, x))


@pytest.mark.gpu
def test_no_copies():
    """The KV cache is updated in place, the pool is read where it lies."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    blocks, slots = 64, 64
    kv_pages = array(PAGES, 16, 2 * KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    a = array(LAYERS, blocks, 2, 16, WIDTH, dtype=jnp.bfloat16)
    b = array(LAYERS, blocks, 16, WIDTH, dtype=jnp.bfloat16)
    x = array(TOKENS, WIDTH, dtype=jnp.bfloat16)
    table = kernels.SlotTable(array(slots, 2), array(slots), array(slots, 2, dtype=jnp.float32))
    batch = (
        array(TOKENS),
        array(TOKENS, 16),
        array(TOKENS + 1),
        array(1),
        array(TOKENS),
    )
    compiled = (
        jax.jit(_step, donate_argnums=0)
        .lower(kv_pages, x, a, b, table, array(TOKENS), batch)
        .compile()
    )
    memory = compiled.memory_analysis()
    kv_bytes = kv_pages.size * 2
    assert memory.alias_size_in_bytes >= kv_bytes
    # Activations, splits of h and of attention; one layer of A alone has 4 MiB.
    assert memory.temp_size_in_bytes < 3 * 2**20
