"""What `mambalens flow` does: the flow of one prompt or many facts, kept in a folder, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambalens.cli import asked
from mambalens.cli.flow_files import Found
from mambalens.cli.programs import Say, known_or_all
from mambalens.defaults import ABLATION, METHODS
from mambalens.facts.fact import Fact
from mambalens.facts.roles import check_role
from mambalens.facts.sequence import Facts
from mambalens.flow.work import Flowing
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens
from mambalens.result import Flow
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
    keys: bool
    over: str | None
    over_where: tuple[str, ...]
    other: str | None
    other_subject: str | None
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
        if self.ablation != ABLATION and not (self.cuts or self.count or self.circuit is not None):
            raise MambalensError(
                f"--ablation {self.ablation} is of edges that are cut, and none is: give --certify, --sample, --routes "
                "or --circuit, or leave it out."
            )
        asked.ablation(
            self.ablation, self.keys, self.over, self.over_where, self.other, self.other_subject, self.single
        )
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

    @property
    def cuts(self) -> bool:
        """Whether edges are cut while the flow is found."""
        return bool(self.certify or self.sample) or self.method != METHODS[0]

    @property
    def count(self) -> int:
        """Routes of a fact that are looked for."""
        return self.routes if self.routes is not None else ROUTES if self.prompt is not None else 0

    @property
    def single(self) -> Fact | None:
        """The one prompt."""
        if self.prompt is None or self.subject is None or self.target is None:
            return None
        return Fact(self.prompt, self.subject, self.target)

    def put_in(self, facts: Facts) -> dict[str, Any]:
        """What stands in the place of what is cut, the same whatever of these facts is asked about."""
        found = asked.ablation(
            self.ablation, self.keys, self.over, self.over_where, self.other, self.other_subject, self.single
        )
        if self.ablation == "mean" and self.over is None:
            found["over"] = facts
        if self.ablation == "resample" and self.other is None:
            found["other"] = facts.pairs()
        return found

    def chosen(self) -> Facts:
        """The one prompt, or the facts that the model is asked.

        The prompt's id is the whole sentence, so that flows of several prompts can be put together.
        """
        fact = self.single
        if fact is None:
            return asked.facts(self.facts, self.where)
        return Facts([Fact(fact.prompt, fact.subject, fact.target, id=fact.prompt + fact.continuation)])


def find(settings: FlowSettings, model: str, out: Path, say: Say, progress: bool) -> tuple[Lens, Flow, dict[str, Any]]:
    """The flow, in its folder: what is there already is not computed again.

    Args:
        settings: what to do.
        model: the model's name.
        out: the folder.
        say: hears what happens.
        progress: show progress bars.

    Returns:
        The lens, the flow, and what stands in the place of what is cut.
    """
    facts = settings.chosen()
    lens = asked.lens(model, settings.dtype, settings.tokenizer)
    Flowing.asked(**settings.asked).check(lens.hooks)
    if settings.prompt is None:
        facts = known_or_all(
            lens, facts, settings.limit, settings.all_facts, settings.batch_size, say, progress, "the flow of"
        )
    tell("model", model=lens.name, facts=len(facts))
    put_in = settings.put_in(facts)
    flow = lens.flow(
        facts, batch_size=settings.batch_size, out=out, progress=progress, memory=settings.memory,
        block_size=settings.block_size, **settings.asked, **(put_in if settings.cuts else {}),
    )  # fmt: skip
    return lens, flow, put_in


def ask(settings: FlowSettings, flow: Flow, put_in: dict[str, Any], say: Say, progress: bool) -> Found:
    """What the settings ask of a flow: how far it can be trusted, its routes and circuits.

    Args:
        settings: what to do.
        flow: a flow that knows its model.
        put_in: what stands in the place of what is cut.
        say: hears what could not be answered.
        progress: show progress bars.
    """
    found = Found(flow)
    if flow.table.exact.notna().any():
        found = found._replace(agreement=flow.agreement(), certificate=flow.certificate())
    if settings.count:
        try:
            routes = flow.routes(settings.source, settings.count, progress, **put_in)
            found = found._replace(routes=routes)
            if len(routes) and not found.single:
                found = found._replace(
                    routes_by_piece=flow.routes_by_piece(settings.source, routes, progress, **put_in)
                )
        except MambalensError as error:
            say(f"No routes: {error}")
    if settings.circuit is not None:
        found = found._replace(circuit=flow.circuit(settings.circuit, progress, **put_in))
    return found
