"""Mamba-1's recurrence compiled for the CPU by numba: each position's decays are used where they are computed.

PyTorch's operations pass over memory for every exponential four times, which is most of their cost. Plain functions of
arrays in float32, each of one prompt; `native` calls them. Letters and recurrence as in `scan`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

FOLDED = {"contract"}
"""What the compiler may do to arithmetic: take a product and a sum together. No sum changes its order."""


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # Unwrapped: what checks shapes while the tests run does not compile.
    options = {"nogil": True, "fastmath": FOLDED, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(inspect.unwrap(function))
    except RuntimeError:  # nowhere to write
        return numba.njit(**options)(inspect.unwrap(function))


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
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return power * np.int32(exponent).view(np.float32)


exp2 = _compiled(_exp2, inline="always")


def _step(dt, rate, C, start, rows, y):  # type: ignore[no-untyped-def]
    """Adds to `y` of some rows what their position reads of the state before it, `C . (exp2(dt rate) start)`.

    Shapes: dt, y [rows, D]; rate, start [N, D]; C [rows, N]; rows: their numbers.
    """
    for row in rows:
        for n in range(len(rate)):
            read = C[row, n]
            for d in range(rate.shape[1]):
                y[row, d] += read * (exp2(dt[row, d] * rate[n, d]) * start[n, d])


def _scan(dtx, dt, rate, B, C, state, y):  # type: ignore[no-untyped-def]
    """The scan of one prompt: y from nothing, and `state` from what it is before to what it is behind.

    Shapes: dtx, dt, y [T, D]; rate, state [N, D]; B, C [T, N].
    """
    for t in range(len(dt)):
        for d in range(rate.shape[1]):
            y[t, d] = np.float32(0)
        for n in range(len(rate)):
            written, read = B[t, n], C[t, n]
            for d in range(rate.shape[1]):
                state[n, d] = exp2(dt[t, d] * rate[n, d]) * state[n, d] + dtx[t, d] * written
                y[t, d] += read * state[n, d]


def _scan_and_states(dtx, dt, rate, B, C, keep, states, y):  # type: ignore[no-untyped-def]
    """States of one prompt from the inputs that are kept, for several choices of these, and what the first reads.

    `states` are zero before. Where a position neither decays nor writes (padding), nothing is computed anew.

    Shapes: dtx, dt, y [T, D]; rate [N, D]; B, C [T, N]; keep [sets, T]; states [sets, N, D].
    """
    decay, written = np.empty(rate.shape[1], np.float32), np.empty(rate.shape[1], np.float32)
    for t in range(len(dt)):
        moves = False
        for d in range(rate.shape[1]):
            y[t, d] = np.float32(0)
            moves = moves or dt[t, d] != 0 or dtx[t, d] != 0
        for n in range(len(rate)):
            if moves:
                for d in range(rate.shape[1]):
                    decay[d] = exp2(dt[t, d] * rate[n, d])
                    written[d] = dtx[t, d] * B[t, n]
                for number in range(len(keep)):
                    kept = keep[number, t]
                    for d in range(rate.shape[1]):
                        states[number, n, d] = decay[d] * states[number, n, d] + kept * written[d]
            read = C[t, n]
            for d in range(rate.shape[1]):
                y[t, d] += read * states[0, n, d]


step, scan, scan_and_states = _compiled(_step), _compiled(_scan), _compiled(_scan_and_states)
