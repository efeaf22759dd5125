"""Ablations of facts: means and other prompts' values in sweeps equal hooked passes with values put together by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mambalens import Fact, Lens, MambalensError, SweepResult, load_facts
from mambalens.cli.app import app
from mambalens.facts.pairs import aligned
from mambalens.facts.pieces import piece_of
from mambalens.facts.sequence import Facts
from mambalens.hooks import Values
from mambalens.hooks.values import Written

FACTS = load_facts("atlas").where(relation=["capital", "currency"]).sample(8)
MODELS = ("atlas-mamba1", "atlas-gpt-neox")


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {name: Lens.load(name) for name in MODELS}


def alone(lens: Lens, fact: Fact) -> tuple[Any, torch.Tensor]:
    prompt = lens.prompt(fact)
    return prompt, torch.tensor([prompt.ids])


def mean_by_hand(lens: Lens, facts: Facts, fact: Fact) -> Values:
    """The means of all facts at every position of one, prompt by prompt and position by position."""
    pieces = piece_of(lens.prompt(fact))
    asked = [alone(lens, one) for one in facts]
    columns = {name: [[i for i, piece in enumerate(piece_of(p)) if piece == name] for p, _ in asked] for name in pieces}
    runs = values_of_each(lens, facts)
    of = {}
    for mixer in lens.hooks.mixers:
        parts: list[torch.Tensor | None] = []
        for part in (0, 1):
            each = [run.of[mixer][part] for run in runs]
            means = (
                {
                    name: torch.cat([one[0, at] for one, at in zip(each, of_piece, strict=True)]).mean(0)
                    for name, of_piece in columns.items()
                }
                if each[0] is not None
                else {}
            )
            parts.append(torch.stack([means[name] for name in pieces])[None] if means else None)
        of[mixer] = Written(*parts)
    return Values(of)


@cache
def values_of_each(lens: Lens, facts: Facts) -> list[Values]:
    return [lens.hooks.values(alone(lens, fact)[1]) for fact in facts]


def other_by_hand(lens: Lens, fact: Fact, other: Fact) -> Values:
    """What another prompt hands on, at the positions that are aligned with one's."""
    (prompt, _), (theirs, ids) = alone(lens, fact), alone(lens, other)
    values = lens.hooks.values(ids)
    return values.each(lambda part: part[:, aligned(prompt, theirs)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_a_sweep_equals_hooked_passes_one_by_one(lenses: dict[str, Lens], name: str, ablation: str) -> None:
    lens = lenses[name]
    partner = {pair.fact.id: pair.other for pair in FACTS.pairs()}
    paths = ("main", "conv", "both") if name == "atlas-mamba1" else ("main",)
    result = lens.sweep(FACTS, ("subject", "relation"), window=5, paths=paths, ablation=ablation, progress=False)
    assert set(result.table.ablation) == {ablation} and result.configs[0].ablation == ablation
    assert {*result.table.fact_id, *result.skipped.fact_id} == {str(fact.id) for fact in FACTS}
    lens.model.requires_grad_(False)
    for fact in FACTS:
        rows = result.table[(result.table.fact_id == fact.id) & (result.table.window_start % 4 == 0)]
        if not len(rows):
            continue
        values = mean_by_hand(lens, FACTS, fact) if ablation == "mean" else other_by_hand(lens, fact, partner[fact.id])
        prompt, ids = alone(lens, fact)
        for row in rows.itertuples():
            layers = range(row.window_start, row.window_start + row.window_size)
            sources = prompt.positions(row.source)
            with lens.hooks.knockout(sources, [-1], layers, path=row.path, instead=values):
                prob = float(lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id])
            assert abs(prob - row.prob) < 1e-5 + 1e-4 * prob
    assert (result.table.change_pct.abs() > 1).any()


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_knocks_out_as_the_sweep_does(lenses: dict[str, Lens], name: str) -> None:
    lens, fact, other = lenses[name], FACTS[0], FACTS[1]
    for asked in ({"ablation": "mean", "over": FACTS}, {"ablation": "resample", "other": other}):
        row = lens.sweep([fact], "subject", window=[[2, 3, 4]], progress=False, **asked).table.iloc[0]
        with lens.knockout(fact, "subject", layers=[2, 3, 4], **asked):
            found = lens.predict(fact, k=500).set_index("token_id").prob[lens.prompt(fact).target_id]
        assert abs(found - row.prob) < 1e-5


def test_keys_are_put_in_where_asked(lenses: dict[str, Lens]) -> None:
    lens, fact = lenses["atlas-gpt-neox"], FACTS[0]
    found = []
    for keys in (False, True):
        with lens.knockout(fact, "subject", ablation="resample", other=FACTS[1], keys=keys):
            found.append(lens.predict(fact).prob.iloc[0])
    with lens.knockout(fact, "subject", ablation="resample", other=fact, keys=True):
        assert abs(lens.predict(fact).prob.iloc[0] - float(lens.evaluate(fact, progress=False).top_prob[0])) < 1e-5
    assert abs(found[0] - found[1]) > 1e-6


def test_facts_without_a_partner_are_left_out_with_the_reason(lenses: dict[str, Lens]) -> None:
    lens = lenses["atlas-gpt-neox"]
    lonely = Fact("The colour of snow is", "snow", "white", relation="colour", id="lonely")
    facts = Facts([*FACTS, lonely])
    result = lens.sweep(facts, "subject", window=[[0]], ablation="resample", progress=False)
    (reason,) = result.skipped[result.skipped.fact_id == "lonely"].reason
    assert reason.startswith("nothing to put in: no other fact with the same relation")
    assert "lonely" not in set(result.table.fact_id)
    some = lens.sweep(facts, "subject", window=[[0]], ablation="resample", other=FACTS.pairs()[:2], progress=False)
    assert some.table.fact_id.nunique() == 2
    assert set(some.skipped.reason) == {"nothing to put in: it is in none of the pairs"}


def test_what_makes_no_sense_is_refused(lenses: dict[str, Lens]) -> None:
    lens, fact = lenses["atlas-mamba1"], FACTS[0]
    for asked, said in (
        ({"ablation": "median"}, "ablation='median' is not an ablation"),
        ({"ablation": "mean"}, "here is one fact alone"),
        ({"ablation": "zero", "over": FACTS}, "over is of ablation='mean', but ablation='zero'"),
        ({"ablation": "mean", "other": fact}, "other is of ablation='resample'"),
        ({"ablation": "resample"}, "None of the 1 facts can be used"),
        ({"ablation": "mean", "over": FACTS, "paths": "erase"}, "path='erase' has nothing that could stand"),
    ):
        with pytest.raises(MambalensError, match=said):
            lens.sweep([fact], "subject", window=[[0]], progress=False, **asked)
    for asked, said in (
        ({"ablation": "mean"}, "say which, over=facts"),
        ({"ablation": "resample"}, "say which, other=fact"),
        ({"keys": True}, "keys=True puts in keys"),
        ({"ablation": "resample", "other": Fact("x y", "z", "w")}, "the subject 'z' is not in the prompt"),
    ):
        with pytest.raises(MambalensError, match=said), lens.knockout(fact, "subject", **asked):
            pass


def test_a_folder_knows_its_ablation(lenses: dict[str, Lens], tmp_path: Path) -> None:
    lens = lenses["atlas-gpt-neox"]

    def swept(**asked: Any) -> SweepResult:
        return lens.sweep(FACTS, "subject", window=[[0, 1]], out=tmp_path / "run", progress=False, **asked)

    swept(ablation="mean")
    defined = json.loads((tmp_path / "run" / "sweep.json").read_text())["definition"]
    assert defined["ablation"] == "mean"
    for asked in ({}, {"ablation": "resample"}, {"ablation": "mean", "over": FACTS[:4]}):
        with pytest.raises(MambalensError, match="holds another run"):
            swept(**asked)
    again = swept(ablation="mean")
    assert SweepResult.load(tmp_path / "run").table.equals(again.table)
    zero = lens.sweep(FACTS, "subject", window=[[0, 1]], out=tmp_path / "zero", progress=False)
    assert "ablation" not in json.loads((tmp_path / "zero" / "sweep.json").read_text())["definition"]
    assert set(zero.table.ablation) == {"zero"}
    both = SweepResult.concat([zero, again])
    assert both.summary().groupby("ablation").size().to_dict() == {"zero": 1, "mean": 1}
    assert len(both.report(tmp_path / "page.html").read_text()) > 1000
    titles = [axis.get_title() for axis in both.plot().axes]
    assert any("zero ablation" in title for title in titles) and any("mean ablation" in title for title in titles)
    assert "mean ablation" in again.plot()._suptitle.get_text()
    assert "ablation" not in zero.plot()._suptitle.get_text()


def test_heatmaps_say_what_stands_in_the_place(lenses: dict[str, Lens]) -> None:
    figure = lenses["atlas-gpt-neox"].heatmap(FACTS[0], 6, ablation="resample", other=FACTS[1])
    assert "another prompt's values put in" in figure.axes[0].get_title()


def test_the_command_line_sweeps_ablations_side_by_side(tmp_path: Path) -> None:
    arguments = ["sweep", "atlas-gpt-neox", "--where", "wording=near", "--limit", "6", "--window", "10",
                 "--source", "subject", "--out", str(tmp_path / "run")]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--ablation", "zero", "--ablation", "mean", "--ablation", "resample"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        f"last-10-{name}" for name in ("mean", "resample", "zero")
    ]
    table = SweepResult.load(tmp_path / "run").table
    assert set(table.ablation) == {"zero", "mean", "resample"}
    refused = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "no"), "--ablation", "nought"])
    assert "ablation='nought' is not an ablation" in str(refused.exception)
