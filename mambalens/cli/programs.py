"""What `mambalens sweep` does with its settings: models one after the other, or an estimate of what they take."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

from mambalens.cli import asked
from mambalens.cli.settings import SweepSettings
from mambalens.experiments.comparison import known_to_all
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Features
from mambalens.lens import Lens
from mambalens.result import SweepResult
from mambalens.sweep.ablation import Asked as Ablating
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run
from mambalens.system import processes
from mambalens.system.events import tell
from mambalens.system.memory import size_of

MEASURED = 32
"""Facts of the block that a dry run measures."""


class Part(NamedTuple):
    """One sweep of one model."""

    folder: Path
    plan: Plan
    ablating: Ablating
    """More about the plan's ablation."""


class Estimate(NamedTuple):
    """What a sweep will take, from a measured first block."""

    model: str
    facts: int
    """Facts that will be swept; estimated from a sample where only known ones are."""
    knockouts: int
    """Prompts with a knockout, over all facts."""
    seconds: float
    peak_bytes: int
    """How far the process's memory rose over the loaded model during the measured block."""


Load = Callable[[str], Lens]
Say = Callable[[str], None]


def sweep_all(
    settings: SweepSettings, facts: Facts, groups: tuple[Features, ...], load: Load, say: Say, progress: bool = True
) -> tuple[list[SweepResult], list[str]]:
    """Sweep every model; one that fails does not stop the others.

    Args:
        settings: what to do.
        facts: facts, filtered.
        groups: the features that `settings.features` name.
        load: gives a model's lens.
        say: hears what happens.
        progress: show progress bars.

    Returns:
        The results, and the models that failed.
    """
    say = say if processes.first() else lambda _: None
    progress = progress and processes.first()
    if settings.memory is not None:  # which a file may say too
        size_of(settings.memory)
    if settings.common:
        every = (load(model) for model in settings.model)
        facts = known_to_all(every, facts, settings.batch_size, progress, settings.subject_tokens)
        say(f"{len(facts)} facts are known to all {len(settings.model)} models")
        if not len(facts):
            raise MambalensError("No fact is answered right by every model: leave common out, or name others.")
        facts = facts.sample(settings.limit) if settings.limit else facts
    names: set[str] = set()

    def swept(model: str) -> list[SweepResult]:
        lens = load(model)
        if lens.name in names:
            raise MambalensError(f"Two of the models are called {lens.name!r}: sweep them in different folders.")
        names.add(lens.name)
        parts = list(parts_of(settings, groups, lens))
        for part in parts:
            part.plan.check(lens.hooks)
        mine = facts if settings.common else facts_of(settings, lens, facts, say, progress)
        tell("model", model=lens.name, facts=len(mine), sweeps=len(parts))
        return [
            SweepResult.of(
                run(lens, mine, part.plan, settings.batch_size, progress, settings.memory, True, part.folder,
                    settings.block_size, part.ablating)
            )
            for part in parts
        ]  # fmt: skip

    results, failed = [], []
    for model in settings.model:
        try:
            results += swept(model)
        except MambalensError as error:
            if len(settings.model) == 1:
                raise
            failed.append(model)
            tell("model failed", model=model, error=str(error))
            say(f"{model} failed, the others go on: {error}")
    if not results:
        raise MambalensError(f"None of {', '.join(settings.model)} could be swept.")
    return results, failed


def parts_of(settings: SweepSettings, groups: tuple[Features, ...], lens: Lens) -> Iterator[Part]:
    """A model's sweeps: one for every target, window and ablation, in folders of their own where there are several."""
    out = Path(settings.out)
    folder = out if len(settings.model) == 1 else out / lens.name
    combinations = list(product(settings.target, settings.window, settings.ablation))
    for target, window, ablation in combinations:
        paths = cast(Any, settings.path)
        plan = Plan(
            settings.source, target, window, groups, paths, settings.mixers, settings.measure, ablation, settings.keys
        )
        over = settings.over if ablation == "mean" else None
        where = settings.over_where if ablation == "mean" or settings.over is None else ()
        put_in = asked.ablation(ablation, settings.keys, over, where)
        ablating = Ablating.of(ablation, put_in["over"], put_in["other"], settings.keys)
        name = f"{target}-{window}" + (f"-{ablation}" if len(settings.ablation) > 1 else "")
        yield Part(folder if len(combinations) == 1 else folder / name, plan, ablating)


def facts_of(settings: SweepSettings, lens: Lens, facts: Facts, say: Say, progress: bool) -> Facts:
    """The facts that a model is swept over, chosen for it alone.

    Raises:
        MambalensError: if there is none.
    """
    if settings.subject_tokens is not None:
        facts = lens.with_short_subjects(facts, settings.subject_tokens)
        if not len(facts):
            raise MambalensError(f"No subject has at most {settings.subject_tokens} tokens of {lens.name}'s tokenizer.")
    return known_or_all(lens, facts, settings.limit, settings.all_facts, settings.batch_size, say, progress, "sweeping")


def known_or_all(
    lens: Lens, facts: Facts, limit: int | None, all_facts: bool, batch_size: int | None, say: Say, progress: bool,
    doing: str,
) -> Facts:  # fmt: skip
    """The facts that a model knows, or all of them where that is asked for.

    Args:
        lens: the model.
        facts: facts to choose from.
        limit: how many at most.
        all_facts: also those that it answers wrong.
        batch_size: prompts a batch.
        say: hears how many there are.
        progress: show a progress bar.
        doing: what is done with them, for the message.

    Raises:
        MambalensError: if it knows none.
    """
    if all_facts:
        return facts.sample(limit) if limit else facts
    known = lens.known(facts, batch_size, progress, limit)
    share = f"{len(known)} facts" if limit else f"the {len(known)} of {len(facts)} facts"
    say(f"{lens.name}: {doing} {share} that it knows")
    if not len(known):
        raise MambalensError(
            f"{lens.name} answers none of the {len(facts)} facts right: --all-facts takes them anyway."
        )
    return known


def estimate(settings: SweepSettings, facts: Facts, groups: tuple[Features, ...], load: Load) -> Iterator[Estimate]:
    """What the sweep of every model will take: a few facts are evaluated and swept, and the rest reckoned from them."""
    import psutil

    starting = time.time() - psutil.Process().create_time()  # imports and facts, once a process
    for model in settings.model:
        started = time.perf_counter()
        lens = load(model)
        loading = time.perf_counter() - started
        parts = list(parts_of(settings, groups, lens))
        tokens = settings.subject_tokens
        mine = facts if tokens is None else lens.with_short_subjects(facts, tokens)
        if not len(mine):
            raise MambalensError(f"No subject has at most {tokens} tokens of {lens.name}'s tokenizer.")
        sample, count = mine.sample(2 * MEASURED), float(len(mine))
        seconds, starting = starting + loading, 0.0
        if not settings.all_facts:
            lens.known(sample[:4], settings.batch_size, progress=False)  # what runs first runs slower
            started = time.perf_counter()
            known = lens.known(sample, settings.batch_size, progress=False)
            each, asked = (time.perf_counter() - started) / len(sample), count
            count *= len(known) / len(sample)
            if settings.limit and not settings.common and len(known):  # `known` looks at twice the limit at a time
                tries = math.ceil(len(sample) / len(known) / 2)
                asked = min(asked, tries * 2 * settings.limit)
            seconds += each * asked
            sample = known if len(known) else sample
        count = int(min(count, settings.limit or count))
        process, knockouts, peak = psutil.Process(), 0, 0
        for part in parts:
            part.plan.check(lens.hooks)
            block = sample[:MEASURED]
            # Few facts have no partners among themselves.
            ablating = part.ablating._replace(other=mine.pairs() if part.ablating.name == "resample" else None)
            measured = functools.partial(
                run, plan=part.plan, batch_size=settings.batch_size, progress=False, memory=settings.memory,
                asked=ablating,
            )  # fmt: skip
            measured(lens, block[: 2 if part.ablating.name == "zero" else MEASURED])
            before, started = process.memory_info().rss, time.perf_counter()
            table = measured(lens, block).table
            seconds += (time.perf_counter() - started) / len(block) * count
            peak = max(peak, process.memory_info().rss - before)
            knockouts += round(len(table) / len(block) * count)
        yield Estimate(lens.name, count, knockouts, seconds, peak)
