"""The largest magnitude of an array, which is how NaN and infinity are found."""

from __future__ import annotations

import numpy as np


def largest(tensor: np.ndarray) -> float:
    """The largest magnitude; NaN or infinity when there is one."""
    if tensor.size == 0:
        return 0.0
    if tensor.dtype == np.float64:
        return float(np.abs(tensor).max())
    # As integers the numbers of one sign are ordered by magnitude: the largest signed one is the
    # largest positive number, the largest unsigned one the most negative, if there is any.
    size = tensor.dtype.itemsize
    positive, negative = (tensor.view(f"{kind}{size}").max() for kind in "iu")
    bits = max(int(positive), int(negative) & ((1 << (8 * size - 1)) - 1))
    return float(np.array(bits, f"u{size}").reshape(1).view(tensor.dtype)[0])
