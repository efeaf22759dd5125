"""`mambalens patch` and `mambalens trace`, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from test_cli import run

from mambalens import MambalensError
from mambalens.cli.app import app
from mambalens.interventions.table import PATCHES, TRACES

NEAR = ["--where", "wording=near", "--where", "relation=capital"]


def test_patches_are_told_and_kept(tmp_path: Path) -> None:
    options = ["--limit", "6", "--window", "3", "--site", "state", "--position", "subject", "--position", "-1"]
    text = run("patch", "atlas-mamba1", *NEAR, *options, "--out", str(tmp_path))
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(table.columns) == list(PATCHES) and set(table.piece) == {"subject", "last"}
    assert {path.name for path in tmp_path.iterdir()} == {"table.parquet", "summary.csv", "skipped.csv", "heatmap.png"}
    assert f"{len(table)} rows" in text and "subject" in text


def test_traces_are_told_and_kept(tmp_path: Path) -> None:
    options = ["--limit", "2", "--window", "6", "--samples", "2", "--position", "subject_last"]
    text = run("trace", "atlas-mamba1", *NEAR, *options, "--out", str(tmp_path))
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(table.columns) == list(TRACES) and len(table) == 2 * 7 * 2
    assert f"{len(table)} rows" in text and "noise 3" in text


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
