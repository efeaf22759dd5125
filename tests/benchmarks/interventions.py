"""What patches cost: `python tests/benchmarks/interventions.py` (random models, two cores).

heatmaps: 16 prompts of 15 tokens, each patched from another one at every position and in every layer: 360 patches of a
    24-layer model, one site. Seconds for one plain forward pass of the prompts, with logits behind their last tokens
    alone; for one such pass a patch (`hooked_s`: a hooked pass costs no less), of all prompts together and of one at a
    time as it is published (`hooked_alone_s`); and by replay, everything included: base pass of both prompts, a row
    that nothing is put into, the check against the model's own pass of one prompt, scores. Prompts that begin with the
    same tokens are not patched there (`same`: how many; 0, and 5 as facts in the same words have). `rows/plain` is how
    many tokens go through how many layers, in plain passes: below that replay cannot go where matrix products are all.
memory: how far memory rises, each in a fresh process.
"""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
import torch
from common import NAMES, PROMPTS, SHAPES, load, parser_of, peak_bytes, peak_in_fresh_process, report, run, seconds
from torch import Tensor

from mambalens.hooks import HookManager
from mambalens.interventions.walk import PatchReplay, Prompts, Spot
from mambalens.measures import log_odds
from mambalens.system.memory import budget

TIME, SAME = 15, (0, 5)
"""Tokens of a prompt, and those that both begin with."""


class Heatmap:
    """A token x layer heatmap of every prompt."""

    def __init__(self, model: Any, site: str, same: int, prompts: int = PROMPTS) -> None:
        self.model, self.hooks, self.site, self.count = model, HookManager(model), site, prompts
        ids = torch.randint(2, model.config.vocab_size, (2 * prompts, TIME))
        ids[prompts:, :same] = ids[:prompts, :same]
        self.prompts = Prompts(ids, torch.full((2 * prompts,), TIME - 1))
        self.spots = [Spot(i, prompts + i, (p,), (p,)) for i in range(prompts) for p in range(same, TIME)]
        self.windows = [[layer] for layer in range(self.hooks.n_layers)]
        self.targets = torch.zeros(2 * prompts, dtype=torch.long)

    def score(self, logits: Tensor, of: Tensor) -> Tensor:
        """Log-odds of an answer."""
        return log_odds(logits, self.targets[of])[:, None]

    def plain(self) -> None:
        """One forward pass of the prompts, with logits behind their last tokens alone."""
        self.model(self.prompts.ids[: self.count], use_cache=False, logits_to_keep=1)

    def alone(self) -> None:
        """The same of one prompt."""
        self.model(self.prompts.ids[:1], use_cache=False, logits_to_keep=1)

    def replayed(self) -> None:
        """The whole heatmap."""
        self.model(self.prompts.ids[:1], use_cache=False)
        memory = budget(None, self.prompts.ids.device)
        PatchReplay(self.hooks, self.site, self.windows, memory).scores(self.prompts, self.spots, self.score)

    def rows(self) -> float:
        """Tokens through layers of the rows and of the base pass, in plain passes."""
        lengths = [TIME - spot.positions[0] - (self.site == "state") for spot in self.spots]
        layers = self.hooks.n_layers
        return (sum(lengths) * layers * (layers + 1) / 2) / (self.count * TIME * layers) + 2


@torch.no_grad()
def heatmaps(names: list[str]) -> pd.DataFrame:
    """Heatmaps of models as people have them."""
    lines = []
    for name in names:
        model = load(SHAPES[name]())
        for site, same in (("residual", SAME[0]), ("residual", SAME[1]), ("state", SAME[1])):
            heatmap = Heatmap(model, site, same)
            patches = TIME * heatmap.hooks.n_layers
            plain, alone = seconds(heatmap.plain, 1), seconds(heatmap.alone, 1)
            started = time.perf_counter()
            heatmap.replayed()
            replay = time.perf_counter() - started
            line = {
                "model": NAMES[name],
                "site": site,
                "same": same,
                "patches": patches,
                "plain_s": plain,
                "hooked_s": patches * plain,
                "hooked_alone_s": patches * PROMPTS * alone,
                "replay_s": replay,
                "replay/plain": replay / plain,
                "rows/plain": heatmap.rows(),
                "hooked/replay": patches * plain / replay,
                "hooked_alone/replay": patches * PROMPTS * alone / replay,
                "backend": heatmap.hooks.backend,
            }
            lines.append(report(line))
    return pd.DataFrame(lines)


@torch.no_grad()
def memory(names: list[str]) -> pd.DataFrame:
    """How far memory rises, each in a fresh process."""
    lines = []
    for name in names:
        line = {
            "model": NAMES[name],
            "replay_peak_mb": peak_in_fresh_process(__file__, "replayed", name) / 1e6,
            "plain_peak_mb": peak_in_fresh_process(__file__, "plain", name) / 1e6,
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


@torch.no_grad()
def peak(part: str, name: str) -> float:
    """What `peak_in_fresh_process` runs there."""
    heatmap = Heatmap(load(SHAPES[name]()), "residual", SAME[1])
    return peak_bytes(heatmap.replayed if part == "replayed" else heatmap.plain)


PARTS = {"heatmaps": heatmaps, "memory": memory}


if __name__ == "__main__":
    run(parser_of(__doc__, PARTS).parse_args(), PARTS, peak)
