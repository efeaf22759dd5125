"""What patches cost: `OMP_NUM_THREADS=1 python tests/benchmarks/interventions.py` (random models).

heatmaps: 16 prompts of 15 tokens, each patched from another one at every position and in every layer: 360 patches of a
    24-layer model, one site. Seconds by one hooked pass a patch of all prompts together (`hooked_s`), and of one prompt
    at a time as it is published (`hooked_alone_s`); both are measured on `MEASURED` patches, and scaled to all; logits
    are made behind the last tokens alone. And by replay, everything included: base pass of both prompts, a row that
    nothing is put into, the check against the model's own pass of one prompt, scores. Prompts that begin with the same
    tokens are not patched there (`same`: how many; 0, and 5 as facts in the same words have), and behind two tokens
    that differ, the subject, such prompts go on with the same tokens too. `rows/plain` is how many tokens go through
    how many layers, in plain passes: below that replay cannot go where matrix products are all. Seconds are of the
    processor, so that other work on the machine does not count: with several threads they are all threads' together.
memory: how far memory rises, each in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from common import NAMES, PROMPTS, SHAPES, load, parser_of, peak_bytes, peak_in_fresh_process, report, run
from torch import Tensor

from mambalens.hooks import HookManager
from mambalens.interventions.groups import Prompts, Spot, begins_of
from mambalens.interventions.walk import PatchReplay
from mambalens.measures import log_odds
from mambalens.system.memory import budget

TIME, SUBJECT = 15, 2
"""Tokens of a prompt, and those of its subject."""
CASES = (("residual", 0), ("residual", 5), ("value", 5), ("state", 5))
"""Sites, and how many tokens both prompts begin with."""
MEASURED = 6
"""Hooked passes that are measured of all."""


class Heatmap:
    """A token x layer heatmap of every prompt."""

    def __init__(self, model: Any, site: str, same: int, prompts: int = PROMPTS) -> None:
        self.model, self.hooks, self.site, self.count = model, HookManager(model), site, prompts
        ids = torch.randint(2, model.config.vocab_size, (2 * prompts, TIME))
        if same:
            ids[prompts:, :same] = ids[:prompts, :same]
            ids[prompts:, same + SUBJECT :] = ids[:prompts, same + SUBJECT :]
        self.prompts = Prompts(ids, torch.full((2 * prompts,), TIME - 1))
        self.spots = [Spot(i, prompts + i, (p,), (p,)) for i in range(prompts) for p in range(same, TIME)]
        self.windows = [[layer] for layer in range(self.hooks.n_layers)]
        self.targets = torch.zeros(2 * prompts, dtype=torch.long)
        self.patches = TIME * self.hooks.n_layers

    def score(self, logits: Tensor, of: Tensor) -> Tensor:
        """Log-odds of an answer."""
        return log_odds(logits, self.targets[of])[:, None]

    def plain(self, count: int) -> None:
        """One forward pass of some prompts, with logits behind their last tokens alone."""
        logits = self.model(self.prompts.ids[:count], use_cache=False, logits_to_keep=1).logits[:, -1]
        self.score(logits, torch.arange(count))

    def hooked(self, count: int) -> float:
        """Seconds that hooked passes of some prompts take, one a patch: measured on some, scaled to all."""
        others: list[Tensor] = []
        ids = self.prompts.ids[self.count : self.count + count]
        with _before_layers(self.hooks.layers, lambda hidden: others.append(hidden.clone())):
            self.model(ids, use_cache=False)
        number = torch.linspace(0, self.patches - 1, MEASURED).long().tolist()
        taken = []
        for layer, position in (divmod(at, TIME) for at in [number[0], *number]):

            def put(hidden: Tensor, layer: int = layer, position: int = position) -> Tensor:
                hidden = hidden.clone()
                hidden[:, position] = others[layer][:, position]
                return hidden

            with _before_layers([self.hooks.layers[layer]], put):
                taken.append(seconds(lambda: self.plain(count)))
        return self.patches * sum(taken[1:]) / MEASURED  # the first only warms up

    def replayed(self) -> None:
        """The whole heatmap."""
        self.model(self.prompts.ids[:1], use_cache=False)
        memory = budget(None, self.prompts.ids.device)
        PatchReplay(self.hooks, self.site, self.windows, memory).scores(self.prompts, self.spots, self.score)

    def rows(self) -> float:
        """Tokens through layers of the rows and of the base pass, in plain passes."""
        layers = self.hooks.n_layers
        alike = begins_of(self.prompts, self.spots, [set(window) for window in self.windows], self.site, layers)
        through = sum(
            len(spots) * length * sum(layers - start for start in starts if start is not None)
            for (length, starts), spots in alike.items()
        )
        return through / (self.count * TIME * layers) + 2


@contextmanager
def _before_layers(layers: Any, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """While the block runs, plain PyTorch hooks see what goes into layers, and may change it."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        changed = change(args[0] if args else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {name: changed})

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, in all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.no_grad()
def heatmaps(names: list[str]) -> pd.DataFrame:
    """Heatmaps of models as people have them."""
    lines = []
    for name in names:
        model = load(SHAPES[name]())
        hooked: list[float] = []
        for site, same in CASES:
            heatmap = Heatmap(model, site, same)
            if not hooked:  # a hooked pass costs the same whatever it puts in
                hooked = [heatmap.hooked(heatmap.count), PROMPTS * heatmap.hooked(1)]
            heatmap.plain(heatmap.count)
            plain = seconds(lambda heatmap=heatmap: heatmap.plain(heatmap.count))
            replay = seconds(heatmap.replayed)
            line = {
                "model": NAMES[name],
                "site": site,
                "same": same,
                "patches": heatmap.patches,
                "plain_s": plain,
                "hooked_s": hooked[0],
                "hooked_alone_s": hooked[1],
                "replay_s": replay,
                "replay/plain": replay / plain,
                "rows/plain": heatmap.rows(),
                "hooked/replay": hooked[0] / replay,
                "hooked_alone/replay": hooked[1] / replay,
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
    heatmap = Heatmap(load(SHAPES[name]()), *CASES[1])
    return peak_bytes(heatmap.replayed if part == "replayed" else lambda: heatmap.plain(heatmap.count))


PARTS = {"heatmaps": heatmaps, "memory": memory}


if __name__ == "__main__":
    run(parser_of(__doc__, PARTS).parse_args(), PARTS, peak)
