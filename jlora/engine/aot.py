"""Compiles a step for TPUs that are not there, and reads what the compiler made of it.

The compiler in libtpu needs only a CPU: arrays are described, devices come from a topology.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.config import LoRAConfig, ModelConfig
from jlora.engine.pool_layout import pool_layout
from jlora.engine.programs import RunnerConfig, StepArrays, StepPrograms
from jlora.model import AXIS, describe_model
from jlora.projections import ModuleMap

AUTO = (AxisType.Auto,)  # the default differs between jax 0.10 and 0.11
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{n}": n for kind in "usf" for n in (8, 16, 32, 64)}

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
_SCOPE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_SIZE = r"([\d.]+)([KMGT])"
_EXHAUSTED = re.compile(rf"(?:Used |\(){_SIZE}(?: of |\) exceeds available HBM \(){_SIZE}")


# ------------------------------------------------------------------------------- compiling


def tpu_mesh(topology: str, devices: int) -> Mesh:
    """A mesh over the first devices of a topology, such as "v6e:2x2"."""
    # Else a second process that loads libtpu on this machine is refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(topology, "tpu").devices
    return Mesh(np.array(found[:devices]), (AXIS,), axis_types=AUTO)


@contextlib.contextmanager
def target(mesh: Mesh) -> Iterator[None]:
    """Under it Pallas asks the described TPU, not the CPU, what it can do."""
    device = mesh.devices.flat[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    described = AbstractMesh((mesh.size,), mesh.axis_names, AUTO, abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(described):
        yield


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """JAX would store what is compiled without a device, and fail to read it back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def describe_step(
    model: ModelConfig, sizes: RunnerConfig, lora: LoRAConfig | None, mesh: Mesh
) -> tuple[StepPrograms, StepArrays]:
    """The functions of a step and what they work on. lora: None with LoRA off."""
    layout = specs = None
    if lora is not None:
        dtype = jnp.dtype(model.dtype if lora.lora_dtype == "auto" else lora.lora_dtype)
        layout = pool_layout(ModuleMap(model), lora, dtype, mesh.shape[AXIS])
        specs = jax.tree.map(lambda held: held.spec, layout)
    described = describe_model(model, mesh)
    programs = StepPrograms(described, model, sizes, mesh, specs)
    return programs, programs.describe(described, layout)


def compile_step(programs: StepPrograms, arrays: StepArrays, key: tuple) -> jax.stages.Compiled:
    """The executable of a key as in `StepPrograms.lower`."""
    with target(programs.mesh), uncached():
        return programs.lower(key, arrays).compile()


# --------------------------------------------------------------------------------- reading


class Instruction(NamedTuple):
    """A line of an optimised program.

    operation: of a custom call its target. scope: where it comes from, "jit(f)/.../primitive".
    """

    name: str
    result: str
    operation: str
    operands: str
    scope: str


def instructions(executable: jax.stages.Compiled) -> list[Instruction]:
    """Every instruction of every computation of an optimised program, for one device."""
    found = []
    for name, result, operation, rest in _INSTRUCTION.findall(executable.as_text() or ""):
        if operation == "custom-call" and (target := _TARGET.search(rest)):
            operation = target[1]
        scope = _SCOPE.search(rest)
        operands = rest.split(")", 1)[0]
        found.append(Instruction(name, result, operation, operands, scope[1] if scope else ""))
    return found


def kernels_of(program: list[Instruction]) -> collections.Counter[str]:
    """How often each Pallas kernel is called."""
    calls = [one for one in program if one.operation == "tpu_custom_call"]
    # A kernel without a name of its own (gmm) has that of the jit around it, or none at all.
    names = (re.search(r"([^/]+)/pallas_call", one.scope) for one in calls)
    return collections.Counter(
        name[1].removeprefix("jit(").removesuffix(")") if name else one.name.split(".")[0]
        for name, one in zip(names, calls, strict=True)
    )


def makers(program: list[Instruction], leaf: Any) -> set[str]:
    """The operations whose result is, or contains, an array like this."""
    kind = {"bfloat16": "bf16", "float32": "f32", "int32": "s32"}[jnp.dtype(leaf.dtype).name]
    array = f"{kind}[{','.join(map(str, leaf.shape))}]"
    return {one.operation for one in program if array in one.result}


def collectives_of(program: list[Instruction]) -> dict[str, tuple[int, int]]:
    """Of each kind of collective how many there are, and the bytes of their results."""
    found: dict[str, tuple[int, int]] = {}
    for one in program:
        kind = one.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = [array_bytes(*array) for array in _ARRAY.findall(one.result)]
            started = one.operation != kind and kind != "all-reduce"  # (operand, result, ...)
            count, size = found.get(kind, (0, 0))
            found[kind] = (count + 1, size + (max(sizes) if started else sum(sizes)))
    return found


def array_bytes(kind: str, shape: str) -> int:
    """Bytes of an array of the program's text, without what its layout pads."""
    return math.prod(int(size) for size in shape.split(",") if size) * BITS.get(kind, 0) // 8


def kernel_blocks(program: list[Instruction]) -> int:
    """Bytes of the activations that Pallas kernels take from HBM and leave there.

    What XLA keeps in VMEM between two kernels costs none. Of the rest, arrays of two or three axes
    are activations; those with more are pools and KV pages, and parameters are weights: what
    kernels read of those is not seen here.
    """
    weights = {one.name for one in program if one.operation == "parameter"}
    results = {one.name: one.result for one in program}
    total = 0
    for one in program:
        if one.operation == "tpu_custom_call":
            names = set(re.findall(r"%([\w.-]+)", one.operands)) - weights
            for result in (one.result, *(results.get(name, "") for name in names)):
                found = _ARRAY.findall(result)
                if len(found) == 1 and "S(1)" not in result and found[0][0] in ("bf16", "f32"):
                    matrix = found[0][1].count(",") in (1, 2)
                    total += array_bytes(*found[0]) if matrix else 0
    return total


def step_bytes(executable: jax.stages.Compiled) -> int:
    """HBM of one device that running it takes besides its arguments."""
    memory: Any = executable.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def local_bytes(arrays: Any) -> int:
    """Bytes of described arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


def exhausted_bytes(error: Exception) -> tuple[int, int] | None:
    """The need and the limit in the compiler's words that a program does not fit into HBM."""
    found = _EXHAUSTED.search(str(error))
    if found is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    need, limit = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
    return int(need), int(limit)


def hbm_limit(mesh: Mesh) -> int:
    """HBM of one device that the compiler gives to a program; it says so of one that is too big."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    huge = jax.ShapeDtypeStruct((mesh.size, 2**40), jnp.int8, sharding=sharding)
    try:
        with target(mesh), uncached():
            jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := exhausted_bytes(error)) is not None:
            return found[1]
        raise
    raise RuntimeError("the compiler took a terabyte for HBM that is there")
