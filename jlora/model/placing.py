"""Arrays of the host on the devices of a mesh, whose other devices may be another host's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def place_on(value: Any, sharding: Sharding) -> Any:
    """A tree of numpy arrays as jax arrays, divided by a sharding.

    When it is over the devices of several hosts, each calls this with the same arrays and sends its
    own share. (device_put would have the hosts compare their arrays, by a collective that they all
    must reach at the same time: 1.5 ms a call on loopback, and never in a thread.)
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)

    def share(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(share, value)


def as_argument(value: Any, sharding: Sharding) -> Any:
    """A tree of small numpy arrays as a compiled function takes it whose argument is so divided.

    On one host as it is: the call places it in a tenth of the time of device_put (13 us an array,
    140 otherwise, on the CPU). Nobody may change the arrays afterwards.
    """
    return value if sharding.is_fully_addressable else place_on(value, sharding)
