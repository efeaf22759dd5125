"""Activations, gates and a short convolution compiled for the CPU by numba: each number is read and written once.

PyTorch takes several passes over memory for them, or a slower exponential. Plain functions of arrays in float32, of
some rows each; `pointwise` calls them. Rows of an input may lie apart: every `stride` numbers one begins.
"""

from __future__ import annotations

import numpy as np

from mambalens.hooks.numba_math import compiled, exp


def _silu(x):  # type: ignore[no-untyped-def]
    return x / (np.float32(1) + exp(-x))


silu = compiled(_silu, inline="always")


def _softplus(x, y):  # type: ignore[no-untyped-def]
    """log(1 + e^x); shapes: x, y [rows, D]."""
    for row in range(len(y)):
        for d in range(y.shape[1]):
            power = exp(-abs(x[row, d]))
            # log(1 + power) = 2 artanh(ratio); the ratio is at most a third, and the series good to 3e-8.
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
    """X silu(gate); shapes: x, y [rows, D]; gate: rows of D, `stride` apart."""
    for row in range(len(y)):
        of_row = gate[row * stride : row * stride + y.shape[1]]
        for d in range(y.shape[1]):
            y[row, d] = x[row, d] * silu(of_row[d])


def _gelu(x, y):  # type: ignore[no-untyped-def]
    """X (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; shapes: x, y [rows, D]."""
    for row in range(len(y)):
        for d in range(y.shape[1]):
            one = x[row, d]
            of_tanh = np.float32(0.7978845608028654) * (one + np.float32(0.044715) * one * one * one)
            y[row, d] = one / (np.float32(1) + exp(np.float32(-2) * of_tanh))  # 1 + tanh(z) = 2 / (1 + e^(-2 z))


def _silu_conv(inner, stride, taps, bias, past, shared, begin, end, y):  # type: ignore[no-untyped-def]
    """A causal convolution of some sequences, channel by channel, and SiLU behind it.

    Shapes: inner: rows of D, `stride` apart, the positions of a sequence one below the other; taps [K, D], the nearest
    last; bias [D]; past [., K - 1, D]: what is before as many sequences as are `shared`; y [sequences, T, D], of which
    those from `begin` to `end` are made.
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


softplus, gated, gelu, silu_conv = compiled(_softplus), compiled(_gated), compiled(_gelu), compiled(_silu_conv)
