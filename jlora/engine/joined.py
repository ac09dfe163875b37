"""Small arrays as one, on their way to a device: each that goes there takes time."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def joined(arrays: Sequence[np.ndarray]) -> Int[np.ndarray, " numbers"]:
    """Arrays of int32 and float32 as one of int32."""
    return np.concatenate([one.reshape(-1).view(np.int32) for one in arrays])


def parted(
    joined: Int[Array, " numbers"], like: Sequence[Array | jax.ShapeDtypeStruct]
) -> list[Array]:
    """The opposite of `joined`, on the device. like: the shapes and dtypes of the arrays."""
    ends = np.cumsum([one.size for one in like])[:-1].tolist()
    return [
        jax.lax.bitcast_convert_type(part.reshape(one.shape), one.dtype)
        for part, one in zip(jnp.split(joined, ends), like, strict=True)
    ]
