"""`mambalens patch` and `mambalens trace`, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from test_cli import run

from mambalens import MambalensError
from mambalens.cli.app import app
from mambalens.interventions.table import PATCHES, TRACE_MEASURED, TRACES

NEAR = ["--where", "wording=near", "--where", "relation=capital"]


def test_patches_are_told_and_kept(tmp_path: Path) -> None:
    options = ["--limit", "6", "--window", "3", "--site", "state", "--position", "subject", "--position", "-1"]
    text = run("patch", "atlas-mamba1", *NEAR, *options, "--out", str(tmp_path))
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(table.columns) == list(PATCHES) and set(table.piece) == {"subject", "last"}
    of_run = {"patch.json", "facts.parquet", "prompts.parquet", "parts", "locks"}
    shown = {"table.parquet", "summary.csv", "skipped.csv", "heatmap.png"}
    assert {path.name for path in tmp_path.iterdir()} == of_run | shown
    assert f"{len(table)} rows" in text and "subject" in text


def test_traces_are_told_and_kept(tmp_path: Path) -> None:
    options = ["--limit", "2", "--window", "6", "--samples", "2", "--position", "subject_last"]
    options += ["--measure", "log_odds", "--block-size", "1"]
    text = run("trace", "atlas-mamba1", *NEAR, *options, "--out", str(tmp_path))
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(table.columns) == [*TRACES, *TRACE_MEASURED] and len(table) == 2 * 7 * 2
    assert f"{len(table)} rows" in text and "noise 3" in text
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(parts) == 2
    run("trace", "atlas-mamba1", *NEAR, *options, "--out", str(tmp_path))
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    figure = tmp_path / "again.png"
    run("plot", str(tmp_path), "--metric", "measure", "--where", "relation=capital", "--out", str(figure))
    assert figure.read_bytes()[:4] == b"\x89PNG"
    for arguments, said in (
        (["plot", str(tmp_path), "--x", "depth"], "holds no sweep, and --x draw"),
        (["report", str(tmp_path)], "holds a trace, of which there is no page"),
        (["patch", "atlas-mamba1", "--out", str(tmp_path)], "holds a trace (trace.json)"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, MambalensError) and said in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["patch", "atlas-mamba1", "--site", "states"], "'states' is not a site"),
        (["patch", "atlas-mamba1", "--position", "subjects"], "'subjects' is not a role"),
        (["trace", "atlas-mamba1", "--noise", "loud"], "--noise 'loud': give a number"),
    ],
)
def test_refusals_come_before_any_work(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "none")])
    assert isinstance(result.exception, MambalensError) and said in str(result.exception)
    assert not (tmp_path / "none").exists()
