"""What sweeps of any size cost, reckoned from what was measured: `python tests/benchmarks/reckoning.py` (no model, a second;
with `--check`, Mamba-1 130M is measured with prompts of 15, 128 and 512 tokens, next to what is reckoned: a few minutes).

The unit is a token in a layer. A plain pass of a prompt of T tokens takes L layers of T; a knockout by a hooked pass takes
as many. Replay takes them once, and for every knockout one token from the window's first layer on. With every window of w
layers, W = L - w + 1, a source and a path:

    hooked    W * T * L
    replayed  T * L + L + W * (L + w) / 2        the base pass, the uncut row, the rows
    checked   2 * T * L a batch                  its shortest prompt in plain passes: as it is, and rounded otherwise

A batch has as many prompts as fill 4,096 tokens, so the check is next to nothing for short prompts, and most for long ones.
A token in a layer is as many multiply-adds as a Mamba-1 layer has weights. The head is added for every token of a plain pass,
and for every row. Seconds are of one core, at the rates that `sweep.py --part deep` found there: one for plain passes (Mamba's
scan is slow in torch), one for all that a sweep does. Facts cost the same each, so they multiply. Of a GPU nothing is
measured: hours there are for rates that are assumed, and named.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from common import facts_of, load, mamba1, report, seconds, tokenizer

from mambalens import Lens
from mambalens.model import BATCH_TOKENS

WINDOW, VOCABULARY, STATE = 9, 50280, 16
PROMPTS, TOKENS = 8, 15.0
"""Of the measured sweeps."""
PASSES = 2
"""Of a batch's check, where the first look accounts for the difference."""


class Measured(NamedTuple):
    """A line of `sweep.py --part deep`: seconds of one core."""

    layers: int
    width: int
    bytes: int
    """Of a weight."""
    plain_s: float
    sweep_s: float


MEASURED = {
    "790M": Measured(48, 1536, 4, 6.3, 8.6),
    "1.4B": Measured(48, 2048, 4, 9.8, 13.9),
    "2.8B": Measured(64, 2560, 2, 12.7, 16.2),
}
ASSUMED = {"multiply_adds": 100e12, "bytes": 2e12}
"""A GPU's, a second; assumed, not measured."""


def layer(width: int) -> float:
    """Weights of a Mamba-1 layer: in_proj, conv1d, x_proj, dt_proj, out_proj."""
    inner, rank = 2 * width, -(-width // 16)
    return width * 2 * inner + 4 * inner + inner * (rank + 2 * STATE) + rank * inner + inner * width


def plain(layers: int, width: int, tokens: float) -> float:
    """Multiply-adds of a plain pass of a prompt."""
    return tokens * (layers * layer(width) + VOCABULARY * width)


def replayed(layers: int, width: int, tokens: float, cuts: int = 1) -> float:
    """Multiply-adds of a replayed sweep of a prompt; cuts: sources times paths."""
    windows = layers - WINDOW + 1
    through = tokens * layers + layers + cuts * windows * (layers + WINDOW) / 2
    return through * layer(width) + (1 + cuts * windows) * VOCABULARY * width


def checks(facts: int, tokens: float) -> int:
    """Plain passes of a prompt that the checks of all batches take."""
    return PASSES * -(-facts // max(1, int(BATCH_TOKENS // tokens)))


class Rates(NamedTuple):
    """Multiply-adds a second of one core."""

    plain: float
    replayed: float


def rates(shape: str) -> Rates:
    """As a shape was measured."""
    m = MEASURED[shape]
    checked_s = checks(PROMPTS, TOKENS) / PROMPTS * m.plain_s
    return Rates(PROMPTS * plain(m.layers, m.width, TOKENS) / m.plain_s,
                 PROMPTS * replayed(m.layers, m.width, TOKENS) / (m.sweep_s - checked_s))  # fmt: skip


def cost(layers: int, width: int, tokens: float, facts: int, cuts: int, rate: Rates) -> dict[str, float]:
    """One line of a table."""
    windows = layers - WINDOW + 1
    one = plain(layers, width, tokens) / rate.plain
    sweep = replayed(layers, width, tokens, cuts) / rate.replayed + checks(facts, tokens) / facts * one
    hooked = cuts * windows * one
    return {
        "layers": layers,
        "width": width,
        "tokens": tokens,
        "facts": facts,
        "cuts": cuts,
        "knockouts": facts * cuts * windows,
        "plain_h": facts * one / 3600,
        "replayed_h": facts * sweep / 3600,
        "hooked_h": facts * hooked / 3600,
        "replayed/plain": sweep / one,
        "hooked/replayed": hooked / sweep,
        # What a prompt has in memory: its hidden states, the states before the target for each cut, and the rows.
        "mb_a_prompt": 4e-6 * (tokens * width + (cuts + 1) * 2 * width * STATE + (1 + cuts * windows) * width),
    }


def growth() -> pd.DataFrame:
    """One thing grows at a time, at the rates of the 1.4B shape (float32)."""
    rate = rates("1.4B")
    lines = [cost(layers, 1536, 15, 1000, 1, rate) for layers in (12, 24, 48, 64)]
    lines += [cost(48, width, 15, 1000, 1, rate) for width in (768, 1536, 2560)]
    lines += [cost(48, 1536, tokens, 1000, 1, rate) for tokens in (15, 128, 512, 2048)]
    lines += [cost(48, 1536, 15, facts, 1, rate) for facts in (10, 1000, 20000)]
    return pd.DataFrame(lines)


def counterfact() -> pd.DataFrame:
    """20,000 facts on Mamba-2.8B: one source, and 8 sources on 2 paths; cores as measured, a GPU as assumed."""
    lines = []
    for cuts in (1, 16):
        line = cost(64, 2560, 15, 20000, cuts, rates("2.8B"))
        adds = 20000 * replayed(64, 2560, 15, cuts) + checks(20000, 15) * plain(64, 2560, 15)
        weights = 2 * (64 * layer(2560) + VOCABULARY * 2560)
        line |= {
            "peta_multiply_adds": adds / 1e15,
            "gpu_replayed_h": adds / ASSUMED["multiply_adds"] / 3600,
            "gpu_hooked_h": line["knockouts"]
            * weights
            / ASSUMED["bytes"]
            / 3600,  # a pass of a prompt reads all weights
        }
        lines.append(line)
    return pd.DataFrame(lines)


@torch.no_grad()
def check() -> pd.DataFrame:
    """The shape of mamba-130m, measured and reckoned: seconds of one core, 512 tokens in all."""
    torch.set_num_threads(1)
    lens, lines = Lens(load(mamba1()), tokenizer(VOCABULARY), "mamba-130m"), []
    for tokens in (15, 128, 512):
        facts = facts_of([tokens] * (512 // tokens), VOCABULARY)
        ids = torch.from_numpy(np.array([lens.prompt(fact).ids for fact in facts]))
        sweep = cost(24, 768, tokens, len(facts), 1, rates("1.4B"))
        line = {
            "tokens": tokens,
            "facts": len(facts),
            "plain_cpu_s": seconds(lambda ids=ids: lens.model(ids, use_cache=False), 1, time.process_time),
            "plain_reckoned_s": 3600 * sweep["plain_h"],
            "sweep_cpu_s": seconds(
                lambda facts=facts: lens.sweep(facts, "subject", window=WINDOW, progress=False), 1, time.process_time
            ),
            "sweep_reckoned_s": 3600 * sweep["replayed_h"],
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure what can be measured in minutes, and compare")
    if parser.parse_args().check:
        print("\n" + check().to_string(index=False, float_format="{:.3g}".format))
        return
    for shape in MEASURED:
        rate = rates(shape)
        print(f"{shape}: {rate.plain / 1e9:.1f} and {rate.replayed / 1e9:.1f} thousand million multiply-adds a second")
    for table in (growth(), counterfact()):
        print("\n" + table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
