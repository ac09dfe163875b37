"""Arrays in, arrays out: LoRA and expert matmuls, paged attention; a definition, two backends."""

from jlora.kernels.attention import token_sequences
from jlora.kernels.dispatch import (
    IMPLEMENTATIONS,
    Implementation,
    add_and_norm,
    default_implementation,
    gated,
    grouped_matmul,
    kv_page_shape,
    lora_embedding_shrink,
    lora_expand,
    lora_routing,
    lora_shrink,
    ragged_paged_attention,
    rope_and_write_kv,
    storage_dtype,
    write_kv,
)
from jlora.kernels.lora import NO_ADAPTER, LoRADelta, LoRARouting, SlotTable, dot_precision
from jlora.kernels.norm import NormRule, rms_norm
from jlora.kernels.rope import apply_rope

__all__ = [
    "IMPLEMENTATIONS",
    "NO_ADAPTER",
    "Implementation",
    "LoRADelta",
    "LoRARouting",
    "NormRule",
    "SlotTable",
    "add_and_norm",
    "apply_rope",
    "default_implementation",
    "dot_precision",
    "gated",
    "grouped_matmul",
    "kv_page_shape",
    "lora_embedding_shrink",
    "lora_expand",
    "lora_routing",
    "lora_shrink",
    "ragged_paged_attention",
    "rms_norm",
    "rope_and_write_kv",
    "storage_dtype",
    "token_sequences",
    "write_kv",
]
