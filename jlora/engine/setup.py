"""What an engine is made of, from its arguments and its model."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import AxisType, Mesh

from jlora import kernels
from jlora.config import LORA_BLOCK_RANK, EngineArgs, LoRAConfig, ModelConfig
from jlora.engine import memory
from jlora.engine.programs import RunnerConfig
from jlora.kernels import Implementation
from jlora.manager import UNLIMITED, AdapterLoader, fitted
from jlora.model import AXIS, BaseWeights
from jlora.projections import ModuleMap

MAX_BATCHED_TOKENS = 2048
PAGE_SIZE = 32


def check_sizes(args: EngineArgs, model: ModelConfig) -> None:
    """Raises ValueError for sizes that the model or the engine cannot have."""
    positions = model.max_position_embeddings
    if (args.max_model_len or 0) > positions:
        raise ValueError(
            f"max_model_len={args.max_model_len} is above the {positions} positions of the model"
        )
    if (args.max_num_batched_tokens or args.max_num_seqs) < args.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens={args.max_num_batched_tokens} is below max_num_seqs="
            f"{args.max_num_seqs}: every running sequence needs a token a step"
        )


def runner_sizes(
    args: EngineArgs, model: ModelConfig, implementation: Implementation, staged: int = 0
) -> RunnerConfig:
    """The sizes, those left open chosen by the model and by the memory that is left now.

    staged: bytes that adapters take on their way to the pool.
    """
    page_size = args.block_size or PAGE_SIZE
    max_model_len = args.max_model_len or model.max_position_embeddings
    max_tokens = args.max_num_batched_tokens or max(MAX_BATCHED_TOKENS, args.max_num_seqs)
    shards = args.tensor_parallel_size
    pages = memory.num_kv_pages(
        args, model, page_size, max_model_len, max_tokens, shards, implementation, staged
    )
    return RunnerConfig(
        args.max_num_seqs,
        max_tokens,
        max_model_len,
        page_size,
        pages,
        args.max_logprobs,
        implementation,
        args.fully_sharded_loras,
    )


def lora_limits(args: EngineArgs, model: ModelConfig) -> LoRAConfig | None:
    """The limits, with the model's dtype for "auto", and with what lora_modules need."""
    config = args.lora_config()
    if config is None:
        return None
    if config.lora_dtype == "auto":
        config = dataclasses.replace(config, lora_dtype=model.dtype)
    if not args.lora_modules:
        return config
    modules = ModuleMap(model)
    base = None
    if args.load_format != "dummy":
        base = BaseWeights(model, args.model, args.revision, args.load_format)
    limits = dataclasses.replace(
        UNLIMITED,
        lora_dtype=config.lora_dtype,
        target_modules=config.target_modules,
        allow_nonfinite_loras=config.allow_nonfinite_loras,
    )
    loader = AdapterLoader(modules, limits, base)
    return fitted(config, (loader.load(request)[0] for request in args.lora_modules), modules)


def make_mesh(shards: int) -> Mesh:
    """Over the first devices; of several hosts over all that they have.

    Raises ValueError when there are fewer devices, or not as many over several hosts.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and shards != len(devices):
        raise ValueError(
            f"tensor_parallel_size={shards}, but {jax.process_count()} processes have "
            f"{len(devices)} {devices[0].platform} devices together, all of which are used; say "
            f"tensor_parallel_size={len(devices)}, or do not call jax.distributed.initialize"
        )
    if shards > len(devices):
        raise ValueError(
            f"tensor_parallel_size={shards}, but {len(devices)} {devices[0].platform} devices are "
            "visible"
        )
    return jax.make_mesh((shards,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:shards])


def choose_implementation(args: EngineArgs, model: ModelConfig) -> Implementation:
    name = args.kernel_implementation
    if name is None:
        return kernels.default_implementation()
    if name not in kernels.IMPLEMENTATIONS:
        raise ValueError(
            f"kernel_implementation={name!r} must be one of {', '.join(kernels.IMPLEMENTATIONS)}"
        )
    if name != "xla" and name != kernels.default_implementation():
        raise ValueError(
            f"kernel_implementation={name!r} does not run on {jax.default_backend()} devices"
        )
    return name


def memory_table(
    weights: int, adapters: int, kv: int, sizes: RunnerConfig, config: LoRAConfig | None
) -> str:
    """What the memory of a device goes to, in bytes, and how many adapters have room there."""
    rows = [("weights", weights, "")]
    if config is None:
        rows.append(("adapters", 0, "LoRA off"))
    else:
        each = {rank: -(-rank // LORA_BLOCK_RANK) for rank in (8, 16, 64)}
        fit = (
            f"{min(config.max_loras, config.pool_blocks // blocks)} of rank {rank}"
            for rank, blocks in each.items()
            if rank <= config.max_lora_rank
        )
        rows.append(
            (
                "adapters",
                adapters,
                f"{config.max_loras} slots, {config.pool_blocks} rank blocks a projection: "
                f"{', '.join(fit) or f'ranks up to {config.max_lora_rank}'}; "
                f"{config.host_capacity} on the host",
            )
        )
    rows.append(("KV cache", kv, f"{sizes.num_pages} pages of {sizes.page_size} tokens"))
    lines = [f"  {name:<9}{size / 1e6:>12.1f} MB  {note}".rstrip() for name, size, note in rows]
    return "\n".join(["memory of a device", *lines])
