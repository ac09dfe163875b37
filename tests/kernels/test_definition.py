"""The definition in plain XLA against the float64 oracles."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import kernels
from tests.kernels import cases

by_id = operator.attrgetter("id")


@pytest.mark.parametrize("case", cases.LORA_CASES, ids=by_id)
@pytest.mark.parametrize("check", [cases.check_shrink, cases.check_expand])
def test_lora(case, check):
    check(case, "xla")


@pytest.mark.parametrize("case", cases.LORA_CASES, ids=by_id)
def test_embedding_shrink(case):
    cases.check_embedding(case)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_embedding_shrink_copies_nothing(dtype):
    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    slots = kernels.SlotTable(array(8, 4), array(8), array(8, 4, dtype="float32"))
    case = cases.LoRACase("vocabulary", 32, (16,), 1024, dtype=dtype)
    call = cases.embedding_call(case, cases.draw_lora(case))
    stored = kernels.storage_dtype(dtype, implementation="xla")
    shapes = (array(32), slots, array(32), array(16, 1024, 16, dtype=stored))
    memory = jax.jit(call.function).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * 16 * stored.itemsize / 2  # of 16 blocks


def test_shrink_then_expand():
    for case in cases.LORA_CASES[:12]:
        cases.check_shrink_expand(case, "xla")


@pytest.mark.parametrize(("check", "case"), cases.READER_CHECKS)
def test_readers(check, case):
    check(case, "xla")


@pytest.mark.parametrize("case", cases.ATTENTION_CASES, ids=by_id)
def test_attention(case):
    cases.check_attention(case, "xla")


@pytest.mark.parametrize("case", cases.WRITE_CASES, ids=by_id)
def test_write_kv(case):
    cases.check_write_kv(case, "xla")


@pytest.mark.parametrize("case", cases.GROUPED_CASES, ids=by_id)
def test_grouped_matmul(case):
    cases.check_grouped(case, "xla")


def test_grouped_matmul_reads_only_the_experts_in_use():
    """With weights as `storage_dtype` keeps them nothing the size of all experts is made."""
    (case,) = (case for case in cases.GROUPED_CASES if case.id == "decode-128-experts")
    x, w, sizes = cases.draw_grouped(case)
    stored = w.astype(kernels.storage_dtype(w.dtype, implementation="xla"))
    call = cases.grouped_call(case, "xla")
    compiled = jax.jit(call.function).lower(x, stored, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < stored.nbytes / 8
    cases.assert_close(compiled(x, stored, sizes), cases.grouped_oracle(x, w, sizes), case.dtype)


def test_what_an_adapter_holds_stays_with_its_tokens():
    """Infinity in one slot's block leaves the other tokens of the tile alone, to the bit."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 2, 1, 16, 8), (1, 2, 16, 8))
    )
    b[0, 0] = np.inf
    slots = kernels.SlotTable(jnp.array([[0], [1]]), jnp.array([1, 1]), jnp.ones((2, 1)))
    routing = kernels.lora_routing(jnp.array([0, 1, -1, 1]), implementation="xla")
    x, y = (rng.normal(size=(4, 8)).astype(np.float32) for _ in range(2))
    options = {"implementation": "xla"}
    h = kernels.lora_shrink(jnp.array(x), jnp.array(a), 0, routing, slots, **options)
    delta = kernels.LoRADelta(h, jnp.array(b), 0, routing, slots)
    out = kernels.lora_expand(jnp.array(y), delta, (8,), **options)
    assert not np.isfinite(out[0]).any()
    assert np.isfinite(out[1:]).all()
    assert (out[2] == y[2]).all()
