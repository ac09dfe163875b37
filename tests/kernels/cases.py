"""The cases that the tests of every kernel backend share, with float64 oracles in numpy.

A case is a few numbers; `draw_lora`, `draw_attention` and so on make its inputs from a seed of its
own (its id), and the `check_*` functions run one operation of `jlora.kernels` and compare. What the
contracts call unspecified or unread is poisoned: with NaN where nothing may be read, with large
finite numbers where a backend may multiply it by zero.
"""

import pytest

from tests.kernels.attention_cases import (
    ATTENTION_CASES,
    WRITE_CASES,
    AttentionCase,
    AttentionInputs,
    WriteCase,
    attention_call,
    attention_oracle,
    check_attention,
    check_write_kv,
    draw_attention,
    draw_write,
    padded_pages,
    write_call,
)
from tests.kernels.compare import (
    DTYPES,
    NUMPY_DTYPE,
    TOLERANCE,
    Call,
    assert_close,
    assert_same_bits,
    run,
)
from tests.kernels.grouped_cases import (
    GROUPED_CASES,
    GroupedCase,
    check_grouped,
    draw_grouped,
    grouped_call,
    grouped_oracle,
)
from tests.kernels.lora_cases import (
    GATED_CASES,
    LORA_CASES,
    LoRACase,
    LoRAInputs,
    check_embedding,
    check_expand,
    check_gated,
    check_shrink,
    check_shrink_expand,
    draw_lora,
    embedding_call,
    expand_call,
    expand_oracle,
    gated_call,
    lora_call,
    shrink_call,
    shrink_oracle,
    used_blocks,
)
from tests.kernels.norm_cases import NORM_CASES, NormCase, check_norm, norm_call
from tests.kernels.rope_cases import ROPE_CASES, RopeCase, check_rope, rope_call

__all__ = [
    "ATTENTION_CASES",
    "DTYPES",
    "GATED_CASES",
    "GROUPED_CASES",
    "LORA_CASES",
    "NORM_CASES",
    "NUMPY_DTYPE",
    "READER_CHECKS",
    "ROPE_CASES",
    "TOLERANCE",
    "WRITE_CASES",
    "AttentionCase",
    "AttentionInputs",
    "Call",
    "GroupedCase",
    "LoRACase",
    "LoRAInputs",
    "NormCase",
    "RopeCase",
    "WriteCase",
    "assert_close",
    "assert_same_bits",
    "attention_call",
    "attention_oracle",
    "check_attention",
    "check_embedding",
    "check_expand",
    "check_gated",
    "check_grouped",
    "check_norm",
    "check_rope",
    "check_shrink",
    "check_shrink_expand",
    "check_write_kv",
    "draw_attention",
    "draw_grouped",
    "draw_lora",
    "draw_write",
    "embedding_call",
    "expand_call",
    "expand_oracle",
    "gated_call",
    "grouped_call",
    "grouped_oracle",
    "lora_call",
    "norm_call",
    "padded_pages",
    "rope_call",
    "run",
    "shrink_call",
    "shrink_oracle",
    "used_blocks",
    "write_call",
]

# The operations that read a projection's output or follow it: each check with each of its cases.
READER_CHECKS = [
    pytest.param(check, case, id=f"{check.__name__.removeprefix('check_')}-{case.id}")
    for check, every in (
        (check_gated, GATED_CASES),
        (check_rope, ROPE_CASES),
        (check_norm, NORM_CASES),
    )
    for case in every
]
