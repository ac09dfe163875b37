"""Arrays in, arrays out: LoRA and expert matmuls, paged attention; a definition, two backends."""

from jlora.kernels.attention import token_sequences
from jlora.kernels.dispatch import (
    IMPLEMENTATIONS,
    Implementation,
    default_implementation,
    grouped_matmul,
    kv_page_shape,
    lora_embedding_shrink,
    lora_expand,
    lora_matmul,
    lora_routing,
    lora_shrink,
    ragged_paged_attention,
    storage_dtype,
    write_kv,
)
from jlora.kernels.lora import NO_ADAPTER, LoRARouting, SlotTable, dot_precision

__all__ = [
    "IMPLEMENTATIONS",
    "NO_ADAPTER",
    "Implementation",
    "LoRARouting",
    "SlotTable",
    "default_implementation",
    "dot_precision",
    "grouped_matmul",
    "kv_page_shape",
    "lora_embedding_shrink",
    "lora_expand",
    "lora_matmul",
    "lora_routing",
    "lora_shrink",
    "ragged_paged_attention",
    "storage_dtype",
    "token_sequences",
    "write_kv",
]
