"""Compiles for a real TPU on a machine without one: the compiler in libtpu needs only the CPU."""

from __future__ import annotations

import contextlib
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
AUTO = (AxisType.Auto,)  # the default differs between jax 0.10 and 0.11


def devices(chip: str):
    # Else a second process that loads libtpu on this machine (pytest-xdist, CI) is refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices


@contextlib.contextmanager
def target(chip: str):
    """Under it Pallas asks the described TPU, not the CPU, what it can do."""
    device = devices(chip)[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    mesh = AbstractMesh((1,), ("x",), AUTO, abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@contextlib.contextmanager
def _uncached():
    """JAX would store what is compiled without a device, and fail to read it back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_for(chip: str, function, *args, donate: tuple[int, ...] = ()):
    """The executable of `jax.jit(function)` for one device of the chip.

    args: pytrees of anything with shape and dtype; no values are needed.
    """
    mesh = Mesh(np.array(devices(chip)[:1]), ("x",), AUTO)
    sharding = NamedSharding(mesh, PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = jax.tree.map(described, args)
    with target(chip), _uncached():
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def size(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def makers(executable, leaf) -> set[str]:
    """The operations of the optimised program whose result is, or contains, an array like this."""
    name = {"bfloat16": "bf16", "float32": "f32"}[leaf.dtype.name]
    array = f"{name}[{','.join(map(str, leaf.shape))}]"
    instruction = re.compile(r"^\s*(?:ROOT )?%\S+ = (.+?) ([a-z][\w-]*)\(", re.MULTILINE)
    found = instruction.findall(executable.as_text())
    return {operation for result, operation in found if array in result}
