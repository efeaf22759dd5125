"""Mamba-1's recurrence compiled for the CPU by numba: each position's decays are used where they are computed.

PyTorch's operations pass over memory for every exponential four times, which is most of their cost. Plain functions of
arrays in float32, each of one prompt; `native` calls them. Letters and recurrence as in `scan`.
"""

from __future__ import annotations

import numpy as np

from mambalens.hooks.numba_math import compiled, exp2


def _step(x, dt, rate, B, C, start, rows, y):  # type: ignore[no-untyped-def]
    """What the position of some rows reads of itself and of the state before it, `C . (exp2(dt rate) start)`.

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


step, scan, scan_and_states = compiled(_step), compiled(_scan), compiled(_scan_and_states)
