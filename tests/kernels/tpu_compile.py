"""Compiles for a real TPU on a machine without one: the compiler in libtpu needs only the CPU."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def devices(chip: str):
    return topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices


@contextlib.contextmanager
def target(chip: str):
    """Under it Pallas asks the described TPU, not the CPU, what it can do."""
    device = devices(chip)[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        yield


def compile_for(chip: str, function, *args, donate: tuple[int, ...] = ()):
    """The executable of `jax.jit(function)` for one device of the chip.

    args: pytrees of anything with shape and dtype; no values are needed.
    """
    mesh = Mesh(np.array(devices(chip)[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = jax.tree.map(described, args)
    with target(chip):
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()
