"""What `mambalens flow` does: the flow of one prompt or many facts, kept in a folder, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambalens.cli import asked
from mambalens.cli.flow_files import Found
from mambalens.cli.programs import Say, known_or_all
from mambalens.defaults import ABLATION
from mambalens.facts.fact import Fact
from mambalens.facts.roles import check_role
from mambalens.facts.sequence import Facts
from mambalens.flow.work import Flowing
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens
from mambalens.result import Flow
from mambalens.sweep.ablation import Asked as Ablating
from mambalens.system.events import tell

ROUTES = 3
"""Routes that are looked for in a single prompt where nothing is said; over many facts, none."""


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """A flow as the command line asks for it; the options are described there."""

    prompt: str | None
    subject: str | None
    target: str | None
    facts: str
    where: tuple[str, ...]
    limit: int
    all_facts: bool
    path: tuple[str, ...]
    features: str
    measure: str
    points: int
    method: str
    certify: int
    sample: int
    seed: int
    routes: int | None
    source: str
    circuit: float | None
    ablation: str
    batch_size: int | None
    block_size: int
    memory: str | None
    dtype: str
    tokenizer: str | None

    def __post_init__(self) -> None:
        of_one = {"prompt": self.prompt, "subject": self.subject, "target": self.target}
        missing = [f"--{name}" for name, value in of_one.items() if value is None]
        if 0 < len(missing) < len(of_one):
            raise MambalensError(f"A prompt has a subject and a target: give {' and '.join(missing)} too.")
        if self.circuit is not None and not 0 < self.circuit <= 1:
            raise MambalensError(
                f"--circuit {self.circuit:g}: give the share of the answer to keep, more than 0 and at most 1."
            )
        if self.ablation != ABLATION and self.circuit is None:
            raise MambalensError(
                f"--ablation {self.ablation} is of the edges that --circuit cuts: give --circuit too, or leave it out."
            )
        if self.ablation != ABLATION and self.prompt is not None:
            raise MambalensError(
                f"--ablation {self.ablation} puts in values of other facts, and --prompt is one alone: leave one out."
            )
        Ablating.of(self.ablation)
        check_role(self.source)
        Flowing.asked(**self.asked)

    @property
    def asked(self) -> dict[str, Any]:
        """What `Lens.flow` is asked for."""
        return {
            "paths": self.path, "features": asked.features(self.features), "measure": self.measure,
            "points": self.points, "method": self.method, "certify": self.certify, "sample": self.sample,
            "seed": self.seed,
        }  # fmt: skip

    def chosen(self) -> Facts:
        """The one prompt, or the facts that the model is asked.

        The prompt's id is the whole sentence, so that flows of several prompts can be put together.
        """
        if self.prompt is None or self.subject is None or self.target is None:
            return asked.facts(self.facts, self.where)
        fact = Fact(self.prompt, self.subject, self.target)
        return Facts([Fact(self.prompt, self.subject, self.target, id=self.prompt + fact.continuation)])


def find(settings: FlowSettings, model: str, out: Path, say: Say, progress: bool) -> tuple[Lens, Flow]:
    """The flow, in its folder: what is there already is not computed again.

    Args:
        settings: what to do.
        model: the model's name.
        out: the folder.
        say: hears what happens.
        progress: show progress bars.
    """
    facts = settings.chosen()
    lens = asked.lens(model, settings.dtype, settings.tokenizer)
    Flowing.asked(**settings.asked).check(lens.hooks)
    if settings.prompt is None:
        facts = known_or_all(
            lens, facts, settings.limit, settings.all_facts, settings.batch_size, say, progress, "the flow of"
        )
    tell("model", model=lens.name, facts=len(facts))
    flow = lens.flow(
        facts, batch_size=settings.batch_size, out=out, progress=progress, memory=settings.memory,
        block_size=settings.block_size, **settings.asked,
    )  # fmt: skip
    return lens, flow


def ask(settings: FlowSettings, flow: Flow, say: Say, progress: bool) -> Found:
    """What the settings ask of a flow: how far it can be trusted, its routes and circuits.

    Args:
        settings: what to do.
        flow: a flow that knows its model.
        say: hears what could not be answered.
        progress: show progress bars.
    """
    found = Found(flow)
    if flow.table.exact.notna().any():
        found = found._replace(agreement=flow.agreement(), certificate=flow.certificate())
    count = settings.routes if settings.routes is not None else ROUTES if settings.prompt is not None else 0
    if count:
        try:
            routes = flow.routes(settings.source, count, progress)
            found = found._replace(routes=routes)
            if len(routes) and not found.single:
                found = found._replace(routes_by_piece=flow.routes_by_piece(settings.source, routes, progress))
        except MambalensError as error:
            say(f"No routes: {error}")
    if settings.circuit is not None:
        found = found._replace(circuit=flow.circuit(settings.circuit, progress, settings.ablation))
    return found
