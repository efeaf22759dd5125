"""The sweep: one knockout for every source, window, group of features and path, over many facts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from mambalens.engine import Asked, Engine
from mambalens.facts import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Features, Knockout, Path
from mambalens.prediction import Prediction, kl_divergence
from mambalens.prompts import Batch, Prompt, Skip, read_facts
from mambalens.roles import check_role

if TYPE_CHECKING:
    from mambalens.hooks import HookManager
    from mambalens.lens import Lens
    from mambalens.result import SweepResult

COLUMNS = (
    "fact_id", "model", "source", "target", "features", "path", "window_start", "window_size",
    "base_prob", "prob", "change_pct", "base_rank", "rank", "hit", "top_token", "kl",
)  # fmt: skip
"""Columns of a sweep's table. Probabilities and ranks (1 is the top) are those of the target's first token,
`change_pct` is 100 (prob - base_prob) / base_prob, `hit` whether that token is still the top one, `top_token` what is
on top, `kl` KL(base || knocked out) in nats."""


@dataclass(frozen=True)
class Plan:
    """What a sweep computes."""

    sources: tuple[str, ...] = ("subject", "relation", "last", "first")
    target: str = "last"
    window: int | Sequence[Sequence[int]] = 9
    features: tuple[Features, ...] = ("all",)
    paths: tuple[Path, ...] = ("main",)
    mixers: str | None = None
    """Only mixers of this kind; windows count the model's layers all the same."""
    names: tuple[str, ...] = field(init=False)
    """What the table calls the groups of features."""

    def __post_init__(self) -> None:
        for role in (*self.sources, self.target):
            check_role(role)
        if self.target == "each":
            raise MambalensError("target='each': 'each' is for sources; give a role such as 'last'.")
        for what, values in (("sources", self.sources), ("features", self.features), ("paths", self.paths)):
            if not values:
                raise MambalensError(f"{what} is empty: name at least one.")
        names = [_name(features, i) for i, features in enumerate(self.features)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise MambalensError(f"features has {twice!r} twice; the table could not tell them apart.")
        object.__setattr__(self, "names", tuple(names))

    def windows(self, n_layers: int) -> list[list[int]]:
        """The layers of every window."""
        if isinstance(self.window, int):
            if not 1 <= self.window <= n_layers:
                raise MambalensError(
                    f"window={self.window}, but the model has {n_layers} layers: give 1 to {n_layers}."
                )
            return [list(range(start, start + self.window)) for start in range(n_layers - self.window + 1)]
        windows = [[int(layer) for layer in layers] for layers in self.window]
        keys = [(min(layers, default=-1), len(layers)) for layers in windows]
        if not windows or not all(windows):
            raise MambalensError("window is a list with an empty window in it, or none at all.")
        if len(set(keys)) < len(keys):
            raise MambalensError(
                "Two windows have the same first layer and the same size; the table could not tell them apart."
            )
        return windows

    def check(self, hooks: HookManager) -> list[list[int]]:
        """The windows, after everything that a model can refuse has been tried on it, before any long work.

        Raises:
            MambalensError: for a window, group of features or path that the model does not have.
        """
        windows = self.windows(hooks.n_layers)
        for features in self.features:
            for path in self.paths:
                for layers in windows:
                    with hooks.apply(Knockout([0], [0], layers, features, path, self.mixers)):
                        pass
        return windows


def _name(features: Features, number: int) -> str:
    """What the table calls a group of features."""
    if isinstance(features, str | int):
        return features if isinstance(features, str) else f"feature {features}"
    return str(getattr(features, "name", f"selection {number}"))


def run(
    lens: Lens,
    facts: Facts,
    plan: Plan,
    batch_size: int | None = None,
    progress: bool = True,
    memory: int | str | None = None,
    replay: bool = True,
) -> SweepResult:
    """Run a plan.

    Args:
        lens: model and tokenizer.
        facts: facts to sweep.
        plan: what to knock out.
        batch_size: prompts a batch at most; fewer where the memory needs it.
        progress: show a progress bar.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        replay: answer knockouts by the replay engine (`mambalens.replay`) wherever it reproduces the model; otherwise
            by one hooked forward pass for every knockout.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    from mambalens.memory import budget
    from mambalens.result import SweepResult

    windows = plan.check(lens.hooks)
    room = budget(memory, lens.device)
    prompts, skipped = read_facts(facts, lens.tokenizer)
    prompts, empty_target = _split(prompts, plan.target)
    skipped += empty_target
    if not prompts:
        reasons = "; ".join(f"{skip.fact_id}: {skip.reason}" for skip in skipped[:3])
        raise MambalensError(f"None of the {len(facts)} facts can be used ({reasons or 'there are none'}).")
    groups = list(zip(plan.features, plan.names, strict=True))
    roles = len(plan.sources) + ("each" in plan.sources) * (max(len(prompt.ids) for prompt in prompts) - 1)
    combinations = len(groups) * len(plan.paths) * len(windows) * roles
    engine = Engine(lens, room, replay)
    most = functools.partial(engine.prompts_at_once, plan.sources)
    rows: list[tuple[Any, ...]] = []
    bar = tqdm(total=len(prompts) * combinations, desc=f"sweep {lens.name}", unit="prompt", disable=not progress)
    with bar:
        for batch in lens.batches(prompts, batch_size, most):
            targets = [prompt.positions(plan.target) for prompt in batch.prompts]
            sources = list(_sources(plan, batch, targets))
            skipped += [
                Skip(str(prompt.fact.id), role, f"the role {role!r} is empty")
                for role, positions in sources
                for prompt, found in zip(batch.prompts, positions, strict=True)
                if not found and not role.startswith("each:")
            ]
            knockouts = [
                Asked(layers, features, name, path, source, positions, plan.mixers)
                for layers, (features, name), path in product(windows, groups, plan.paths)
                for source, positions in sources
                if any(positions)
            ]
            answers = engine.answers(batch, knockouts, targets)
            base = Prediction.of(next(answers)[1], batch.targets)
            found: dict[int, list[tuple[Any, ...]]] = {}
            for number, logits in answers:
                now = Prediction.of(logits, batch.targets)
                knockout = knockouts[number]
                layers = knockout.layers
                labels = (
                    lens.name,
                    knockout.source,
                    plan.target,
                    knockout.name,
                    knockout.path,
                    min(layers),
                    len(layers),
                )
                found[number] = list(_rows(batch, knockout.positions, labels, base, now, lens.tokenizer))
                bar.update(len(batch.prompts))
            rows += [row for number in sorted(found) for row in found[number]]
            bar.update(len(batch.prompts) * (combinations - len(knockouts)))
    order = {fact.id: i for i, fact in enumerate(facts)}
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    # Batches are made by length; the table is in the order of the facts.
    table = table.sort_values("fact_id", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
    missing = pd.DataFrame(skipped, columns=list(Skip._fields))
    missing = missing.sort_values("fact_id", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
    config = {
        "model": lens.name,
        "n_layers": lens.n_layers,
        "kinds": lens.hooks.kinds,
        "facts": facts.name,
        "n_facts": len(facts),
        "sources": list(plan.sources),
        "target": plan.target,
        "window": plan.window if isinstance(plan.window, int) else windows,
        "features": list(plan.names),
        "paths": list(plan.paths),
        "mixers": plan.mixers,
        "dtype": str(lens.model.dtype).removeprefix("torch."),
    }
    return SweepResult(table, missing, facts.table, [config])


def _rows(
    batch: Batch,
    positions: list[list[int]],
    labels: tuple[Any, ...],
    base: Prediction,
    now: Prediction,
    tokenizer: Any,
) -> Iterator[tuple[Any, ...]]:
    """One knockout's rows of the table, in the order of `COLUMNS`; none for a prompt whose source is empty."""
    change = 100 * (now.prob - base.prob) / base.prob
    kl = kl_divergence(base.log_probs, now.log_probs)
    for i, prompt in enumerate(batch.prompts):
        if positions[i]:
            top = int(now.top[i])
            yield (
                prompt.fact.id, *labels, float(base.prob[i]), float(now.prob[i]), float(change[i]), int(base.rank[i]),
                int(now.rank[i]), top == prompt.target_id, tokenizer.decode([top]), float(kl[i]),
            )  # fmt: skip


def _split(prompts: list[Prompt], target: str) -> tuple[list[Prompt], list[Skip]]:
    """Prompts that have the target role, and those that do not."""
    usable = [prompt for prompt in prompts if prompt.positions(target)]
    empty = [prompt for prompt in prompts if not prompt.positions(target)]
    return usable, [Skip(str(prompt.fact.id), "", f"the target role {target!r} is empty") for prompt in empty]


def _sources(plan: Plan, batch: Batch, targets: list[list[int]]) -> Iterator[tuple[str, list[list[int]]]]:
    """Name and positions for every row, of every source; 'each' becomes one source for every position."""
    for role in plan.sources:
        if role != "each":
            yield role, [p.positions(role, t) for p, t in zip(batch.prompts, targets, strict=True)]
            continue
        for position in range(batch.ids.shape[1]):
            yield f"each:{position}", [[position] if position < len(p.ids) else [] for p in batch.prompts]
