"""The paper's experiments as named plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mambalens import Lens, MambalensError, SweepResult, known_to_all, load_facts
from mambalens.cli.app import app
from mambalens.experiments.reproduce import EXPERIMENTS, WINDOW_SIZES, reproduce, words

FACTS = load_facts("atlas").where(relation="capital", wording="near")[:40]
MODELS = ("atlas-mamba1", "atlas-mamba2")


def typed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["reproduce", *arguments, "--where", "relation=capital", "--where", "wording=near"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_experiment_sweeps_the_facts_that_all_models_know_and_sets_findings_beside_the_papers(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    found = reproduce("figure1", MODELS, FACTS, tmp_path, limit=8, say=said.append, progress=False)
    known = known_to_all(MODELS, FACTS, progress=False)
    assert said == [f"{len(known)} of 40 facts are known to all models"]
    result = found.results["all"]
    assert set(result.table.fact_id) == {fact.id for fact in known.sample(8)}
    assert set(result.table.window_size) == {9} and result.models == list(MODELS)
    text = words("figure1", found.findings)
    assert (tmp_path / "findings.txt").read_text() == text
    assert text.count("The paper: ") == 3 and text.count("measured  ") == 6
    worst = result.where(source="subject", model="atlas-mamba2").dearest().iloc[0]
    start = worst.window_start
    assert (
        f"atlas-mamba2: {worst['mean']:+z.1f} % [{worst.low:+z.1f}, {worst.high:+z.1f}] in layers {start}–{start + 8}"
        in text
    )
    assert [path.name for path in found.figures] == ["figure1.png"] and found.figures[0].stat().st_size > 10_000
    assert SweepResult.load(tmp_path).models == list(MODELS)


def test_started_again_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = ("figure6", "atlas-mamba2", "--limit", "5", "--out", str(tmp_path))
    first = typed(*arguments)
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*.parquet")}
    assert typed(*arguments) == first and "context-independent" in first
    assert parts and all(path.stat().st_mtime_ns == before for path, before in parts.items())


def test_windows_larger_than_the_model_are_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    found = reproduce("figure9", (), FACTS, tmp_path, limit=3, say=said.append, progress=False)
    assert set(found.results["all"].table.window_size) == {size for size in WINDOW_SIZES if size <= 12}
    assert said[-1] == "atlas-mamba2 has 12 layers: no window of 15."
    assert [path.name for path in found.figures] == ["figure9-atlas-mamba2.png"]


def test_facts_known_to_all_and_to_each_model(tmp_path: Path) -> None:
    found = reproduce("figure14", MODELS, FACTS, tmp_path, limit=4, say=lambda _: None, progress=False)
    for model in MODELS:
        own = Lens.load(model).known(FACTS, limit=4, progress=False)
        assert set(found.results["own"].where(model=model).table.fact_id) == {fact.id for fact in own}
    assert found.findings.measured.str.startswith("own facts: ").sum() == 2


def test_heatmaps_of_a_few_facts(tmp_path: Path) -> None:
    text = typed("heatmaps", "atlas-mamba2", "--limit", "2", "--window", "6", "--out", str(tmp_path))
    assert "(subject)" in text and len(list(tmp_path.glob("*.png"))) == 2


def test_every_experiment_names_models_of_the_paper_and_findings() -> None:
    assert {"figure1", "figure3", "figure4", "figure5", "figure6", "figure8", "figure9", "figure10", "figure14",
            "heatmaps"} == set(EXPERIMENTS)  # fmt: skip
    for experiment in EXPERIMENTS.values():
        assert experiment.paper and experiment.findings and experiment.models
    with pytest.raises(MambalensError, match="did you mean 'figure1'"):
        reproduce("figur1", (), FACTS, ".")
