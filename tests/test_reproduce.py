"""The paper's experiments as named plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mambalens import Fact, Facts, Lens, MambalensError, SweepResult, known_to_all, load_facts
from mambalens.cli.app import app
from mambalens.experiments import demo
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


def test_an_experiment_of_no_facts_is_refused_and_one_fact_has_no_interval(tmp_path: Path) -> None:
    for limit in (0, -1):
        with pytest.raises(MambalensError, match=f"^limit={limit} leaves no fact"):
            reproduce("figure1", MODELS, FACTS, tmp_path, limit=limit, progress=False)
        with pytest.raises(MambalensError, match=f"^limit={limit} leaves no fact"):
            Lens.load("atlas-mamba2").known(FACTS, limit=limit, progress=False)
    with pytest.raises(MambalensError, match=r"^sample\(-1\) is no number of facts"):
        FACTS.sample(-1)
    found = reproduce("figure4", (), FACTS, tmp_path, limit=1, say=lambda _: None, progress=False)
    assert found.findings.measured.str.contains(r"% \[no interval\]").all()
    assert not found.findings.measured.str.contains("nan").any()


def test_the_demo_runs_on_one_fact(tmp_path: Path) -> None:
    # Drawn with the demo's seed it is none of the capitals, of which the heatmap is where there is one.
    far = Lens.load("atlas-mamba1").known(load_facts("atlas").where(wording="far"), limit=1, progress=False)
    assert far[0].relation != "capital"
    result = demo.demo(tmp_path, ["atlas-mamba1"], 1)
    assert result.table.fact_id.nunique() == 2
    assert (tmp_path / "atlas-mamba1" / "heatmap.png").stat().st_size > 10_000
    table = demo.findings(result)
    assert (table.facts == 1).all() and table["costs most"].str.endswith("% [no interval]").all()
    grouped = demo.groups(tmp_path, ["atlas-mamba1"], 1)
    assert set(grouped.table.source) == set(demo.GROUP_SOURCES)
    assert demo.group_findings(grouped).change.str.endswith("% [no interval]").all()


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_demo_of_no_facts_says_what_to_do(count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["demo", f"--facts={count}", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"A demo of {count} facts for each wording shows nothing: give 1 or more"):
        demo.main()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_knows_too_little_for_the_demo_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Fact(fact.prompt, fact.subject, " Z", fact.relation, fact.id) for fact in FACTS[:3]]
    rows = [{"wording": wording} for wording in ("near", "far", "far")]
    monkeypatch.setattr(demo, "load_facts", lambda name: Facts(wrong, rows, name))
    with pytest.raises(MambalensError, match=r"^Of 1 facts atlas-mamba2 answers 0 right, .* leave this model out"):
        demo.demo(tmp_path, ["atlas-mamba2"], 4)
    with pytest.raises(MambalensError, match=r"^Of 2 facts atlas-mamba2 answers 0 right, and the demo takes 2"):
        demo.groups(tmp_path, ["atlas-mamba2"], 4)
