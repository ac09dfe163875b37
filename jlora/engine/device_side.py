"""What every host has of an engine: weights, adapter pool and runner, made from the arguments."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora import kernels
from jlora.config import EngineArgs, LoRAConfig, ModelConfig, resolve_dtype
from jlora.engine.adapter_pool import AdapterPool
from jlora.engine.hosts import Follower, Leader
from jlora.engine.pool_layout import pool_bytes, staged_bytes
from jlora.engine.programs import RunnerConfig, StepPrograms
from jlora.engine.runner import ModelRunner
from jlora.engine.setup import (
    check_sizes,
    choose_implementation,
    make_mesh,
    memory_table,
    runner_sizes,
)
from jlora.kernels import Implementation
from jlora.model import AXIS, BaseWeights, load_hf_config, load_model, model_config
from jlora.projections import ModuleMap, check_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """What an engine will be. lora: its limits, None with LoRA off."""

    args: EngineArgs
    model: ModelConfig
    lora: LoRAConfig | None
    mesh: Mesh
    implementation: Implementation

    @property
    def pool_dtype(self) -> jnp.dtype:
        """Of the adapter pool."""
        assert self.lora is not None  # only asked for with LoRA on
        return kernels.storage_dtype(self.lora.lora_dtype, implementation=self.implementation)


def read_model_config(args: EngineArgs) -> ModelConfig:
    """The model's, checked against the number of devices."""
    model = model_config(load_hf_config(args.model, args.revision), args.dtype)
    model = dataclasses.replace(model, expert_parallel=args.enable_expert_parallel)
    check_shards(model, args.tensor_parallel_size, args.fully_sharded_loras)
    return model


def describe(args: EngineArgs, model: ModelConfig, lora: LoRAConfig | None) -> Described:
    """Raises ValueError for what cannot be. model: of `read_model_config`."""
    mesh = make_mesh(args.tensor_parallel_size)
    implementation = choose_implementation(args, model)
    if lora is not None:
        model = dataclasses.replace(model, extra_vocab_size=lora.lora_extra_vocab_size)
    check_sizes(args, model)
    if implementation == "tpu" and args.allow_nonfinite_loras:
        raise NotImplementedError(
            "allow_nonfinite_loras=True is not supported on TPU: its kernels multiply tokens "
            "of one tile with the blocks of each other's adapters, and 0 * NaN is NaN"
        )
    return Described(args, model, lora, mesh, implementation)


_OWN = ("lora_modules", "lora_resolvers")  # options that only the first host reads


def _terms(args: EngineArgs, model: ModelConfig) -> dict[str, str]:
    """What must be the same on all hosts."""
    options = {one.name: getattr(args, one.name) for one in dataclasses.fields(args)}
    options["dtype"], options["lora_dtype"] = (
        resolve_dtype(options[name], name, auto="auto") for name in ("dtype", "lora_dtype")
    )
    config = {f"config of the model, {name}": value for name, value in vars(model).items()}
    every = {**options, **config, "version of jax": jax.__version__}
    as_lists = ((name, list(v) if isinstance(v, tuple) else v) for name, v in every.items())
    return {name: repr(value) for name, value in as_lists if name not in _OWN}


def require_same(hosts: Leader, args: EngineArgs, model: ModelConfig, lora: Any) -> None:
    """Tells the other hosts what to make. Raises ValueError that names what one would have else."""
    limits = None if lora is None else dataclasses.asdict(lora)
    answers = hosts.ask("terms", [_terms(args, model), limits])
    faults = [f"{name}: {fault}" for name, fault in answers.items() if fault is not None]
    if faults:
        raise ValueError(f"all hosts must have the same; {'; '.join(faults)}")


def told_limits(hosts: Follower, args: EngineArgs, model: ModelConfig) -> LoRAConfig | None:
    """The other side of `require_same`: the adapter limits of the first host."""
    theirs, limits = hosts.next_step().arguments
    own = _terms(args, model)
    differ = [
        f"{name}={own.get(name)}, not {value}"
        for name, value in theirs.items()
        if own.get(name) != value
    ]
    fault = ", ".join(differ) or None
    hosts.answer(fault)
    if fault is not None:
        raise ValueError(f"all hosts must have the same as the first; here {fault}")
    return None if limits is None else LoRAConfig(**limits)


@dataclass
class DeviceSide:
    """modules: names of the model's modules. base: its checkpoint, for adapters that need it."""

    modules: ModuleMap
    base: BaseWeights
    runner: ModelRunner


def make_device_side(
    what: Described, hosts: Leader | Follower | None, progress: bool
) -> DeviceSide:
    """Loads the weights and allocates everything; compiles nothing.

    hosts: the others, which do the same.
    """
    args, model, mesh = what.args, what.model, what.mesh
    modules, shards = ModuleMap(model), args.tensor_parallel_size
    seed = args.seed if args.load_format == "dummy" else None
    weights = load_model(
        model,
        args.model,
        mesh,
        revision=args.revision,
        load_format=args.load_format,
        dummy_seed=seed,
        progress=progress,
    )
    made_up = None if seed is None else weights
    base = BaseWeights(model, args.model, args.revision, args.load_format, made_up)
    pool, staged, leader = None, 0, hosts if isinstance(hosts, Leader) else None
    if what.lora is not None:
        dtype = what.pool_dtype
        pool = AdapterPool(modules, what.lora, dtype, mesh, weights, base, leader)
        staged = staged_bytes(modules, what.lora, dtype, shards)
    jax.block_until_ready(weights.params)
    sizes = runner_sizes(args, model, what.implementation, staged)
    if hosts is not None:  # each has its own memory, and all have the same pages
        sizes = dataclasses.replace(sizes, num_pages=hosts.least(sizes.num_pages))
    programs = StepPrograms(weights, model, sizes, mesh, None if pool is None else pool.specs)
    runner = ModelRunner(weights.params, programs, pool, leader)
    _log_memory(what, modules, weights.params, sizes, runner)
    return DeviceSide(modules, base, runner)


def _log_memory(
    what: Described, modules: ModuleMap, params: Any, sizes: RunnerConfig, runner: ModelRunner
) -> None:
    shards, adapters = what.mesh.shape[AXIS], 0
    if what.lora is not None:
        adapters = pool_bytes(modules, what.lora, what.pool_dtype, shards)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // shards
    kv = runner.kv.nbytes // shards
    logger.info("%s", memory_table(weights, adapters, kv, sizes, what.lora))
