"""`mambalens flow`, as a user types it, and the verbs that take its folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from test_cli import run, typed

from mambalens import MambalensError
from mambalens.cli.app import app
from mambalens.result import Flow

MODEL = "atlas-mamba1"
PERU = ["--prompt", "In Peru the capital is", "--subject", "Peru", "--target", "Lima"]
NEAR = ["--where", "wording=near", "--where", "relation=capital", "--limit", "2"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one prompt's flow, and what was printed."""
    out = tmp_path_factory.mktemp("one")
    return out, run("flow", MODEL, *PERU, "--certify", "10", "--sample", "5", "--circuit", "0.9", "--out", str(out))


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the flow of two facts, a block each, and what was printed."""
    out = tmp_path_factory.mktemp("facts")
    return out, run("flow", MODEL, *NEAR, "--block-size", "1", "--certify", "5", "--routes", "1", "--out", str(out))


def test_the_flow_of_one_prompt_is_told_and_kept(one: tuple[Path, str]) -> None:
    out, text = one
    flow = Flow.load(out)
    strongest = flow.strongest(1).iloc[0]
    assert f"{MODEL}: In Peru the capital is → Lima" in text
    row = next(line for line in text.splitlines() if line.startswith("    7  main"))
    assert (strongest.layer, strongest.path) == (7, "main")
    assert "3 ' the'" in row and "5 ' is'" in row and f"−{abs(strongest.effect):.2f}" in row and "exact" in row
    certificate = pd.read_csv(out / "certificate.csv").set_index("measured")
    assert f"same sign {100 * certificate['median'].sign_agreement:.0f} %" in text and "all other edges" in text
    routes = pd.read_csv(out / "routes.csv")
    assert f"subject → 3 ' the' → last carries {routes.carried_pct[0]:.1f} % of the answer" in text
    circuit = pd.read_csv(out / "circuit.csv")
    assert f"Circuit: {len(circuit)} of {len(flow.table)} edges keep" in text
    written = ["graph.png", "flow.html", "certificate.csv", "agreement.csv", "routes.csv", "circuit.csv"]
    assert f"{len(flow.table)} edges, {', '.join(written)} in {out}" in text
    assert {path.name for path in out.iterdir()} == {
        *written, "flow.json", "facts.parquet", "prompts.parquet", "parts", "locks",
    }  # fmt: skip
    assert flow.base.fact_id[0] == "In Peru the capital is Lima"


def test_the_flow_of_facts_is_told_by_pieces(facts: tuple[Path, str]) -> None:
    out, text = facts
    assert "the flow of 2 facts that it knows" in text and f"{MODEL}, 2 facts: by how much" in text
    assert "medians over 2 facts" in text
    by_piece = pd.read_csv(out / "routes_by_piece.csv")
    assert (
        f"carries {by_piece.carried_pct[0]:.1f} %" in text and by_piece.pieces[0].replace("source", "subject") in text
    )
    assert (out / "by_piece.png").stat().st_size > 10_000 and not (out / "circuit.csv").exists()
    assert len(pd.read_csv(out / "agreement.csv")) == 2


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambalens.flow.work import FlowWork

    whole, done = FlowWork.block, []

    def interrupted(self: FlowWork, facts: object) -> object:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return whole(self, facts)  # type: ignore[arg-type]

    command = ["flow", MODEL, *NEAR, "--certify", "0", "--block-size", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(FlowWork, "block", interrupted)
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130 and "the same command goes on from there" in stopped.output
    assert Flow.load(tmp_path).unfinished == 1
    done.clear()
    text = run(*command)
    assert len(done) == 1 and Flow.load(tmp_path).unfinished == 0
    assert "Certificate: none, no edge was cut" in text and not (tmp_path / "agreement.csv").exists()


def test_progress_and_result_as_json_lines(facts: tuple[Path, str]) -> None:
    out, _ = facts
    done = typed("flow", MODEL, *NEAR, "--block-size", "1", "--certify", "5", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["model", *["block already there"] * 2, "result"]
    flow = Flow.load(out)
    assert (events[-1]["facts"], events[-1]["edges"], events[-1]["cut"]) == (2, len(flow.table), 10)
    assert all((out / name).exists() for name in events[-1]["files"])


def test_every_edge_can_be_cut_which_is_said_before(tmp_path: Path) -> None:
    done = typed("flow", MODEL, "--prompt", "Peru lies in", "--subject", "Peru", "--target", "America", "--path", "conv",
                 "--method", "exact", "--routes", "0", "--out", str(tmp_path))  # fmt: skip
    edges = len(Flow.load(tmp_path).table)
    assert f"Every edge is cut on its own: {edges} cuts in 1 prompt." in done.stderr
    assert "Certificate: every edge cut exactly" in done.stdout and "the model's own answer" in done.stdout


def test_plot_and_report_take_folders_of_flows(one: tuple[Path, str], facts: tuple[Path, str], tmp_path: Path) -> None:
    assert f"Figure: {one[0] / 'graph.png'}" in run("plot", str(one[0]))
    assert f"Figure: {facts[0] / 'by_piece.png'}" in run("plot", str(facts[0]), "--where", "relation=capital")
    single = str(Flow.load(facts[0]).base.fact_id[0])
    run("plot", str(facts[0]), "--where", f"fact_id={single}", "--out", str(tmp_path / "graph.png"))
    assert (tmp_path / "graph.png").stat().st_size > 10_000
    run("plot", str(one[0]), "--where", "path=conv", "--out", str(tmp_path / "conv.png"))  # without its route
    page = tmp_path / "both.html"
    assert f"Page: {page}" in run("report", str(one[0]), str(facts[0]), "--out", str(page))
    prompts = json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[0])["prompts"]
    assert len(prompts) == 3 and prompts[0]["id"] == "In Peru the capital is Lima"
    assert {0, 1} < set(prompts[0]["edges"]["step"])  # routes that were kept are marked
    with pytest.raises(MambalensError, match="holds a flow, and --x, --metric|holds a flow, and --metric, --x"):
        run("plot", str(one[0]), "--x", "depth", "--metric", "kl")
    with pytest.raises(MambalensError, match="have the same edges"):
        run("report", str(one[0]), str(one[0]))


def test_sweeps_and_flows_are_kept_apart(one: tuple[Path, str], tmp_path: Path) -> None:
    sweep = str(tmp_path / "sweep")
    run("sweep", MODEL, *NEAR, "--window", "12", "--source", "subject", "--out", sweep)
    with pytest.raises(MambalensError, match=r"holds a sweep \(sweep.json\): a flow is not written over it"):
        run("flow", MODEL, *PERU, "--out", sweep)
    with pytest.raises(MambalensError, match=r"holds a flow \(flow.json\): a sweep is not written over it"):
        run("sweep", MODEL, *NEAR, "--out", str(one[0]))
    with pytest.raises(MambalensError, match="do not go into one page"):
        run("report", sweep, str(one[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MambalensError, match="holds no sweep, flow, patch, trace, contribution or logit"):
        run("plot", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "Peru is"], "A prompt has a subject and a target: give --subject and --target too"),
        (["--target", "Lima"], "give --prompt and --subject too"),
        ([*PERU, "--limit", "3"], "--prompt is a single one, and --limit would choose among facts"),
        ([*PERU, "--measure", "odds"], "measure='odds' is not a measure"),
        ([*PERU, "--method", "fast"], "method='fast' is not a method: Known: gradient, exact"),
        ([*PERU, "--source", "subjct"], "did you mean 'subject'"),
        ([*PERU, "--circuit", "2"], "--circuit 2: give the share of the answer to keep"),
        ([*PERU, "--path", "erase"], "path='erase', but none of the layers has it"),
        (["--where", "wording=nowhere"], "No fact of 'atlas' has wording=nowhere"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(MambalensError) as refused:
        run("flow", MODEL, *arguments, "--out", str(tmp_path))
    assert sentence in str(refused.value)


def test_another_flow_in_the_folder_is_refused_in_the_words_of_the_options(one: tuple[Path, str]) -> None:
    with pytest.raises(MambalensError, match=r"another run \(certify: 10 there, 11 now; sample: 5 there, 0 now\)"):
        run("flow", MODEL, *PERU, "--certify", "11", "--out", str(one[0]))
