"""The definition in plain XLA against the float64 oracles."""

import operator

import pytest

from tests.kernels import cases

by_id = operator.attrgetter("id")


@pytest.mark.parametrize("case", cases.LORA_CASES, ids=by_id)
@pytest.mark.parametrize("check", [cases.check_shrink, cases.check_expand])
def test_lora(case, check):
    check(case, "xla")


def test_shrink_then_expand():
    for case in cases.LORA_CASES[:12]:
        cases.check_shrink_expand(case, "xla")


@pytest.mark.parametrize("case", cases.ATTENTION_CASES, ids=by_id)
def test_attention(case):
    cases.check_attention(case, "xla")


@pytest.mark.parametrize("case", cases.WRITE_CASES, ids=by_id)
def test_write_kv(case):
    cases.check_write_kv(case, "xla")
