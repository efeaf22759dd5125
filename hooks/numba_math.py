"""Exponentials in float32 for what numba compiles: the processor takes as many at once as its vectors hold.

`native` says where compiled code runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

FOLDED = {"contract"}
"""What the compiler may do to arithmetic: take a product and a sum together. No sum changes its order."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A plain function of arrays, compiled when it runs first and kept on disk."""
    # Unwrapped: what checks shapes while the tests run does not compile.
    options = {"nogil": True, "fastmath": FOLDED, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(inspect.unwrap(function))
    except RuntimeError:  # nowhere to write
        return numba.njit(**options)(inspect.unwrap(function))


def _scaled(power, whole):  # type: ignore[no-untyped-def]
    """`power` times 2 to a whole number from -126 to 127."""
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return power * np.int32(exponent).view(np.float32)


scaled = compiled(_scaled, inline="always")


def _exp2(x):  # type: ignore[no-untyped-def]
    """2 to the power of x <= 0, to within a unit in the last place; at least the smallest normal number."""
    x = max(x, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole  # at most a half; its power by the polynomial of Cephes' exp2f, good to 1.6e-8
    power = np.float32(1.535336188319500e-4)
    power = power * part + np.float32(1.339887440266574e-3)
    power = power * part + np.float32(9.618437357674640e-3)
    power = power * part + np.float32(5.550332471162809e-2)
    power = power * part + np.float32(2.402264791363012e-1)
    power = power * part + np.float32(6.931472028550421e-1)
    power = power * part + np.float32(1)
    return scaled(power, whole)


exp2 = compiled(_exp2, inline="always")


def _exp(x):  # type: ignore[no-untyped-def]
    """E to the power of x, of -87 below it and of 88 above, to within two units in the last place."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # Less `whole` logarithms of 2, in two parts, the first of which loses nothing; at most half of one is left, and
    # its power is by the polynomial of Cephes' expf.
    part = x - whole * np.float32(0.693359375)
    part = part - whole * np.float32(-2.12194440e-4)
    power = np.float32(1.9875691500e-4)
    power = power * part + np.float32(1.3981999507e-3)
    power = power * part + np.float32(8.3334519073e-3)
    power = power * part + np.float32(4.1665795894e-2)
    power = power * part + np.float32(1.6666665459e-1)
    power = power * part + np.float32(5.0000001201e-1)
    power = power * (part * part) + part + np.float32(1)
    return scaled(power, whole)


exp = compiled(_exp, inline="always")
