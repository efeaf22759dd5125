"""Folders that older releases wrote: read, drawn and gone on with as if they were new."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from mambalens import Lens, MambalensError, SweepResult, load_facts
from mambalens.facts.fact import Answered
from mambalens.runs.config import RunConfig
from mambalens.runs.folder import PARTS, Part, digest_of, no_checks, write_part
from mambalens.runs.table import COLUMNS, with_all_columns

FACTS = load_facts("atlas").where(wording="near").sample(5)
SOURCES = ("subject", "each")
# What defines the run, but for what transformers has a say in: the digests of the model.
DEFINITION = """
{"model": "atlas-gpt-neox", "n_layers": 12, "facts": "atlas", "n_facts": 5, "sources": ["subject", "each"],
 "target": "last", "window": 6, "features": ["all"], "paths": ["main"], "mixers": null, "dtype": "float32",
 "windows": "644646084eb3f9ce", "feature masks": "1d8fc6ceb1f94c63", "facts digest": "360b9d62e4c5d582", "block_size": 2}
"""
CONFIG = """
{"model": "atlas-gpt-neox", "n_layers": 12, "facts": "atlas", "n_facts": 5, "sources": ["subject", "each"],
 "target": "last", "window": 6, "features": ["all"], "paths": ["main"], "dtype": "float32", "of_a_later_release": [1]}
"""
ABOUT_THE_MODEL = ("model config", "weights", "revision")


def swept(lens: Lens, out: Path) -> SweepResult:
    return lens.sweep(FACTS, SOURCES, window=6, out=out, progress=False, block_size=2)


def without_checks(part: Path) -> None:
    """Take out of a part's metadata what older releases did not write."""
    arrow = pq.read_table(part)
    about = json.loads(arrow.schema.metadata[b"mambalens"])
    del about["checks"]
    pq.write_table(arrow.replace_schema_metadata(arrow.schema.metadata | {b"mambalens": json.dumps(about)}), part)


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.load("atlas-gpt-neox")


@pytest.fixture(scope="module")
def new(lens: Lens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    swept(lens, folder)
    return folder


@pytest.fixture
def old(new: Path, tmp_path: Path) -> Path:
    """The same run as an older release left it, without its last part."""
    (tmp_path / PARTS).mkdir()
    there = json.loads((new / "sweep.json").read_text())["definition"]
    definition = json.loads(DEFINITION) | {key: there[key] for key in ABOUT_THE_MODEL}
    about = {"configs": [json.loads(CONFIG)], "blocks": 3, "definition": definition}
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    (tmp_path / "facts.parquet").write_bytes((new / "facts.parquet").read_bytes())
    for name in ("00000.parquet", "00001.parquet"):
        table = pd.read_parquet(new / PARTS / name).drop(columns=["position", "ablation"])
        skipped = pd.DataFrame(columns=["fact_id", "source", "reason"])
        write_part(tmp_path / PARTS / name, Part(table, skipped, no_checks()), digest_of(definition))
        without_checks(tmp_path / PARTS / name)
    return tmp_path


def test_an_old_folder_is_loaded_drawn_reported_and_saved(old: Path, new: Path) -> None:
    result = SweepResult.load(old)
    assert result.unfinished == 1 and result.models == ["atlas-gpt-neox"] and result.n_layers == {"atlas-gpt-neox": 12}
    whole = SweepResult.load(new).table
    expected = whole[whole.fact_id.isin(set(result.table.fact_id))].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.table, expected, check_exact=True)
    assert result.plot().axes
    assert "Facts from" in result.report(old / "page.html").read_text()
    pd.testing.assert_frame_equal(SweepResult.load(result.save(old / "saved")).table, result.table, check_exact=True)
    assert SweepResult.load(old / "saved").configs == result.configs


def test_an_old_run_goes_on_where_it_stopped(lens: Lens, old: Path, new: Path) -> None:
    parts = {path.name: path.read_bytes() for path in (old / PARTS).iterdir()}
    result = swept(lens, old)
    assert not result.unfinished
    pd.testing.assert_frame_equal(result.table, SweepResult.load(new).table, check_exact=True)
    assert {name: (old / PARTS / name).read_bytes() for name in parts} == parts
    assert len(list((old / PARTS).iterdir())) == 3
    assert len(result.checks) == 1, "only the new part says how its replay was held against the model"


def test_what_a_configuration_lacks_has_its_default_and_what_is_not_known_is_left_out() -> None:
    config = RunConfig.from_json(json.loads(CONFIG))
    assert config.kinds == () and config.answered == () and config.mixers is None
    assert config.sources == ("subject", "each") and config["sources"] == ["subject", "each"]
    with pytest.raises(MambalensError, match="its configuration has no n_layers"):
        RunConfig.from_json({"model": "x"})


def test_a_configuration_is_the_same_after_json() -> None:
    answered = (Answered("x", 9, 5, (("a", "the subject is empty"),)), Answered("y", 5, 4))
    for window in (9, ((0, 2), (1, 3))):
        config = RunConfig(model="x", n_layers=4, kinds=("mamba1",), facts="atlas", n_facts=5, answered=answered,
                           sources=("subject",), target="last", window=window, features=("all", "slow"),
                           paths=("main", "conv"), mixers="mamba1", dtype="float32")  # fmt: skip
        assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert list(config.to_json()) == [
        "model", "n_layers", "kinds", "facts", "n_facts", "answered", "sources", "target", "window", "features",
        "paths", "mixers", "ablation", "dtype", "measure", "points",
    ]  # fmt: skip
    assert config.to_json()["window"] == [[0, 2], [1, 3]]
    assert config["answered"][0]["unusable"] == [["a", "the subject is empty"]]


def test_positions_are_those_of_single_tokens_and_minus_one_for_roles(old: Path, new: Path) -> None:
    for table in (SweepResult.load(old).table, SweepResult.load(new).table):
        assert table.position.dtype == "int64" and tuple(table.columns) == COLUMNS
        assert table.source.tolist() == [
            "subject" if position == -1 else f"each:{position}" for position in table.position
        ]
        assert set(table.position) >= {-1, 0, 1, 2}


def test_a_part_without_rows_has_positions_too() -> None:
    empty = with_all_columns(pd.DataFrame(columns=[name for name in COLUMNS if name not in ("position", "ablation")]))
    assert tuple(empty.columns) == COLUMNS and empty.position.dtype == "int64"
