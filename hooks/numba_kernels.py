"""What numba compiles for the CPU: Mamba-1's recurrence, activations, gates, a short convolution, exponentials.

PyTorch's operations pass over memory several times for most of them, or take longer for an exponential. Plain functions
of arrays in float32, which `native` and `pointwise` call; letters and recurrence as in `scan`. In one file: what numba
keeps on disk is made anew when the file of a function changes, not when that of another does which it calls.
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


scaled = _compiled(_scaled, inline="always")


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


exp2 = _compiled(_exp2, inline="always")


def _exp(x):  # type: ignore[no-untyped-def]
    """The exponential of x, that of -87 below it and of 88 above, to within two units in the last place."""
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


exp = _compiled(_exp, inline="always")


def _step(x, dt, rate, B, C, start, rows, y):  # type: ignore[no-untyped-def]
    """What the position of some rows of a prompt reads of itself and, `C . (exp2(dt rate) start)`, of the state before.

    Shapes: x, dt, y [rows, D]; rate, start [N, D]; B, C [rows, N]; rows: their numbers.
    """
    for row in rows:
        own = np.float32(0)
        for n in range(len(rate)):
            own += B[row, n] * C[row, n]
        for d in range(rate.shape[1]):
            y[row, d] = own * dt[row, d] * x[row, d]
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


def _silu(x):  # type: ignore[no-untyped-def]
    return x / (np.float32(1) + exp(-x))


silu = _compiled(_silu, inline="always")


def _softplus(x, y):  # type: ignore[no-untyped-def]
    """log(1 + e^x); shapes: x, y [rows, D]."""
    for row in range(len(y)):
        for d in range(y.shape[1]):
            power = exp(-abs(x[row, d]))
            # log(1 + power) = 2 artanh(ratio); the ratio is at most a third, and the series good to 1.4e-8.
            ratio = power / (np.float32(2) + power)
            square = ratio * ratio
            series = np.float32(1 / 13)
            series = series * square + np.float32(1 / 11)
            series = series * square + np.float32(1 / 9)
            series = series * square + np.float32(1 / 7)
            series = series * square + np.float32(1 / 5)
            series = series * square + np.float32(1 / 3)
            series = series * (square * ratio) + ratio
            y[row, d] = max(x[row, d], np.float32(0)) + np.float32(2) * series


def _gated(x, gate, stride, y):  # type: ignore[no-untyped-def]
    """A gate, x silu(gate); shapes: x, y [rows, D]; gate: rows of D, of which one begins every `stride` numbers."""
    for row in range(len(y)):
        of_row = gate[row * stride : row * stride + y.shape[1]]
        for d in range(y.shape[1]):
            y[row, d] = x[row, d] * silu(of_row[d])


def _gelu(x, y):  # type: ignore[no-untyped-def]
    """GELU with tanh, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; shapes: x, y [rows, D]."""
    for row in range(len(y)):
        for d in range(y.shape[1]):
            one = x[row, d]
            of_tanh = np.float32(0.7978845608028654) * (one + np.float32(0.044715) * one * one * one)
            y[row, d] = one / (np.float32(1) + exp(np.float32(-2) * of_tanh))  # 1 + tanh(z) = 2 / (1 + e^(-2 z))


def _silu_conv(inner, stride, taps, bias, past, shared, begin, end, y):  # type: ignore[no-untyped-def]
    """A causal convolution of some sequences, channel by channel, and SiLU behind it.

    Shapes: inner: rows of D, of which one begins every `stride` numbers, a sequence's positions in turn; taps [K, D],
    the nearest last; bias [D]; past [., K - 1, D]: what is before as many sequences as are `shared`; y
    [sequences, T, D], of which those from `begin` to `end` are made.
    """
    kernel, time, width = len(taps), y.shape[1], y.shape[2]
    first = np.empty((min(kernel - 1, time), width), np.float32)
    for sequence in range(begin, end):
        if sequence == begin or sequence % shared == 0:  # what the past adds is the same for those that share it
            before = past[sequence // shared]
            for t in range(len(first)):
                for d in range(width):
                    first[t, d] = bias[d]
                for k in range(t + 1, kernel):
                    for d in range(width):
                        first[t, d] += taps[kernel - 1 - k, d] * before[kernel - 1 + t - k, d]
        for t in range(time):
            here = y[sequence, t]
            start = first[t] if t < len(first) else bias
            for d in range(width):
                here[d] = start[d]
            for k in range(min(t, kernel - 1), -1, -1):
                at = (sequence * time + t - k) * stride
                read, tap = inner[at : at + width], taps[kernel - 1 - k]
                for d in range(width):
                    here[d] += tap[d] * read[d]
            for d in range(width):
                here[d] = silu(here[d])


softplus, gated, gelu, silu_conv = _compiled(_softplus), _compiled(_gated), _compiled(_gelu), _compiled(_silu_conv)
