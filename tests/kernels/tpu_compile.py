"""Compiles for a real TPU on a machine without one: the compiler in libtpu needs only the CPU."""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.engine import aot

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def compile_for(chip: str, function, *args, donate: tuple[int, ...] = ()):
    """The executable of `jax.jit(function)` for one device of the chip.

    args: pytrees of anything with shape and dtype; no values are needed.
    """
    mesh = aot.tpu_mesh(TOPOLOGIES[chip], 1)
    sharding = NamedSharding(mesh, PartitionSpec())

    def described(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = jax.tree.map(described, args)
    with aot.target(mesh), aot.uncached():
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def size(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def makers(executable, leaf) -> set[str]:
    """The operations of the optimised program whose result is, or contains, an array like this."""
    return aot.makers(aot.instructions(executable), leaf)
