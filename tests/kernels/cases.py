"""The cases that the tests of every kernel backend share, with float64 oracles in numpy.

A case is a few numbers; `draw_lora`, `draw_attention` and so on make its inputs from a seed of its
own (its id), and the `check_*` functions run one operation of `jlora.kernels` and compare. What the
contracts call unspecified or unread is poisoned: with NaN where nothing may be read, with large
finite numbers where a backend may multiply it by zero.
"""

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
    LORA_CASES,
    LoRACase,
    LoRAInputs,
    check_expand,
    check_shrink,
    check_shrink_expand,
    draw_lora,
    expand_call,
    expand_oracle,
    lora_call,
    shrink_call,
    shrink_oracle,
    used_blocks,
)

__all__ = [
    "ATTENTION_CASES",
    "DTYPES",
    "GROUPED_CASES",
    "LORA_CASES",
    "NUMPY_DTYPE",
    "TOLERANCE",
    "WRITE_CASES",
    "AttentionCase",
    "AttentionInputs",
    "Call",
    "GroupedCase",
    "LoRACase",
    "LoRAInputs",
    "WriteCase",
    "assert_close",
    "assert_same_bits",
    "attention_call",
    "attention_oracle",
    "check_attention",
    "check_expand",
    "check_grouped",
    "check_shrink",
    "check_shrink_expand",
    "check_write_kv",
    "draw_attention",
    "draw_grouped",
    "draw_lora",
    "draw_write",
    "expand_call",
    "expand_oracle",
    "grouped_call",
    "grouped_oracle",
    "lora_call",
    "padded_pages",
    "run",
    "shrink_call",
    "shrink_oracle",
    "used_blocks",
    "write_call",
]
