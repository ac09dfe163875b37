"""How much of the device's memory the KV cache gets, and what keeps the rest of it in order."""

from __future__ import annotations

import logging
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jlora import kernels
from jlora.config import EngineArgs, ModelConfig
from jlora.kernels import Implementation

logger = logging.getLogger(__name__)
CPU_KV_BYTES = 1 << 30  # a CPU has no memory of its own to fill
MARGIN_BYTES = 256 << 20  # for what the compiler and the allocator need besides
# Bytes of the gaps for small arrays and how many there are of each, 34 MiB in all: for what a step
# is told, what it answers, and new sequences.
GAPS = {256 << power: 16 if power <= 8 else 4 for power in range(15)}


def reserve_fraction(fraction: float) -> None:
    """Tells JAX how much of a GPU to take; warns when it has taken its share already."""
    from jax._src import xla_bridge  # nothing public tells

    if xla_bridge.backends_are_initialized():
        if jax.default_backend() == "gpu" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
            warnings.warn(
                "JAX is running already, so gpu_memory_utilization cannot set its memory; sizes "
                "come from the limit that it has",
                stacklevel=3,
            )
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.3f}")


def keep_gaps(device: jax.Device) -> list[jax.Array]:
    """Free memory in small pieces, for small arrays, while one keeps what this returns (34 MiB).

    JAX gives an array the smallest free piece that holds it. If all are large, the batch of a step
    takes a few kB of what the step before had for its temporaries, and those of the next step are
    elsewhere; but a GPU replays graphs of addresses, see StepArrays.
    """
    walls = []
    for size, count in GAPS.items():
        arrays = [jax.device_put(np.zeros(size, np.uint8), device) for _ in range(2 * count)]
        # Between every two that go one stays, wherever they were put: else the gaps would join.
        jax.block_until_ready(arrays).sort(key=lambda array: array.unsafe_buffer_pointer())
        walls += arrays[1::2]
        for gap in arrays[::2]:
            gap.delete()
    return walls


def page_bytes(
    model: ModelConfig, page_size: int, shards: int, implementation: Implementation
) -> int:
    """Bytes of one page over all layers, on one device."""
    shape = kernels.kv_page_shape(
        page_size,
        max(model.num_kv_heads // shards, 1),
        model.head_dim,
        jnp.dtype(model.dtype),
        implementation=implementation,
    )
    size, heads, head_dim = shape
    kept = kernels.storage_dtype(model.dtype, implementation=implementation)
    return size * heads * head_dim * kept.itemsize * model.num_layers


def step_bytes(model: ModelConfig, tokens: int, seqs: int, shards: int) -> int:
    """An upper estimate of a step's temporaries: the widest activations, and logits to sort."""
    itemsize, hidden = jnp.dtype(model.dtype).itemsize, model.hidden_size
    if model.num_experts:  # a row for each expert of a token, its products in float32 at first
        width = model.moe_intermediate_size // (1 if model.expert_parallel else shards)
        row = 4 * width * (itemsize + 4) + 2 * hidden * itemsize
        token = model.num_experts_per_tok * (row + 3 * hidden * 4) + 6 * hidden * itemsize
    else:
        token = (4 * model.intermediate_size // shards + 6 * hidden) * itemsize
    return tokens * token + 6 * seqs * model.total_vocab * 4 + MARGIN_BYTES


def autotuning_bytes(model: ModelConfig, shards: int) -> int:
    """What compiling takes on a GPU: XLA tries a matmul out on a weight of its own."""
    widest = max(model.total_vocab, 0 if model.num_experts else 2 * model.intermediate_size)
    return model.hidden_size * widest // shards * jnp.dtype(model.dtype).itemsize


def num_kv_pages(
    args: EngineArgs,
    model: ModelConfig,
    page_size: int,
    max_model_len: int,
    max_tokens: int,
    shards: int,
    implementation: Implementation,
    staged: int = 0,
) -> int:
    """Pages that fit; at most what max_num_seqs sequences of max_model_len could ever use.

    staged: bytes that adapters take on their way to the pool. Raises ValueError when not even one
    sequence of max_model_len fits.
    """
    each = page_bytes(model, page_size, shards, implementation)
    per_sequence = -(-max_model_len // page_size)
    useful = per_sequence * args.max_num_seqs
    if args.num_gpu_blocks_override is not None:
        pages = args.num_gpu_blocks_override
    else:
        pages = min(_budget(args, model, max_tokens, shards, staged) // each, useful)
    if pages < per_sequence:
        raise ValueError(
            f"the KV cache has room for {pages * page_size} tokens ({pages * each / 1e6:.0f} MB), "
            f"fewer than max_model_len={max_model_len}; lower max_model_len or raise "
            "kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return pages


def _budget(args: EngineArgs, model: ModelConfig, max_tokens: int, shards: int, staged: int) -> int:
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_KV_BYTES
    seqs = min(args.max_num_seqs, max_tokens)
    left = stats["bytes_limit"] - stats["bytes_in_use"] - staged
    if device.platform == "gpu":
        left -= autotuning_bytes(model, shards)
        left -= sum(2 * size * count for size, count in GAPS.items())  # and what is between them
    return max(left - step_bytes(model, max_tokens, seqs, shards), 0)
