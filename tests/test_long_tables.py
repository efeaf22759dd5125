"""Tables whose rows stay in their folder give what the same rows in memory do, and plain loops."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.pandas import column, data_frames, range_indexes
from matplotlib.figure import Figure

from mambalens import Lens, MambalensError, SweepResult, load_facts
from mambalens.cli.app import app
from mambalens.figures import flow
from mambalens.report import page
from mambalens.runs import data, intervals, rows
from mambalens.runs.folder import PARTS
from mambalens.runs.intervals import Draws, mean_intervals
from mambalens.runs.rows import Groups, Held, Kept, Rows, numbered
from mambalens.runs.table import GROUP

FACTS = load_facts("atlas").where(wording="near").sample(7)
BLOCK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    lens = Lens.load("atlas-mamba1")
    lens.sweep(FACTS, ("subject", "context", "each"), window=6, paths=("main", "both"), out=out, progress=False,
               block_size=BLOCK, measure="log_odds")  # fmt: skip
    return out


@pytest.fixture(scope="module")
def held(folder: Path) -> SweepResult:
    return SweepResult.load(folder)


@pytest.fixture
def kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SweepResult]:
    """The same, as if it were too long to be held."""
    monkeypatch.setattr(data, "HELD", 10)
    result = SweepResult.load(folder)
    yield result
    assert all(isinstance(piece, Kept) for piece in result.rows.pieces), "something has read the whole table"


def summary_by_loops(result: SweepResult, interval: str, metric: str, by: list[str]) -> pd.DataFrame:
    table = result.table
    facts = result.facts.set_index("fact_id")
    table = table.assign(**{name: table.fact_id.map(facts[name]) for name in by})
    found = []
    for key, group in table.groupby([*by, *GROUP], sort=False, dropna=False):
        values = group[metric].to_numpy(float)
        ((mean, low, high),) = mean_intervals([values[~np.isnan(values)]], interval, 0)
        found.append((*key, len(group), mean, low, high))
    return pd.DataFrame(found, columns=[*by, *GROUP, "n", "mean", "low", "high"])


@pytest.mark.parametrize("by", [[], ["relation"], ["wording", "relation"]])
@pytest.mark.parametrize("metric", ["change_pct", "hit", "rank", "measure"])
def test_a_summary_equals_plain_loops_wherever_the_rows_are(
    held: SweepResult, kept: SweepResult, by: list[str], metric: str
) -> None:
    assert len(kept.rows.pieces) == 4 and len(kept.rows) == len(held.table) > 100
    for interval in ("bootstrap", "t"):
        expected = summary_by_loops(held, interval, metric, by)
        for result in (held, kept):
            found = result.summary(interval, metric, by)
            pd.testing.assert_frame_equal(found, expected, rtol=1e-12, atol=1e-12)
            assert (found["mean"].to_numpy() == expected["mean"].to_numpy()).all()


def test_parts_of_a_long_table_are_those_of_a_short_one(held: SweepResult, kept: SweepResult) -> None:
    fact = str(held.table.fact_id.iloc[-1])
    wheres = [
        {"source": "subject"}, {"fact_id": fact}, {"path": "both", "window_start": [0, 3]}, {"hit": True},
        {"relation": str(held.facts.relation.iloc[0])}, {"base_prob": float(held.table.base_prob.iloc[5])},
    ]  # fmt: skip
    for where in wheres:
        text = {str(one) for one in np.atleast_1d(np.array(list(where.values())[-1], dtype=object))}
        expected, found = held.where(**where), kept.where(**where)
        last = list(where)[-1]
        assert set(found.column(last).astype(str)) == text
        pd.testing.assert_frame_equal(found.table, expected.table, check_exact=True)
        assert found.configs == expected.configs
    for result in (held, kept):
        with pytest.raises(MambalensError, match="No row of the sweep has source='nobody'"):
            result.where(source="nobody")
        with pytest.raises(MambalensError, match="'soruce' is no column"):
            result.where(soruce="subject")
    pd.testing.assert_frame_equal(kept.roles().dearest(), held.roles().dearest(), check_exact=True)
    pd.testing.assert_frame_equal(kept.groups(), held.groups(), check_exact=True)
    pd.testing.assert_frame_equal(held.groups(), held.table[GROUP].drop_duplicates(ignore_index=True), check_exact=True)
    twice = kept.where(path="both").where(source="subject")
    pd.testing.assert_frame_equal(twice.table, held.where(path="both").where(source="subject").table, check_exact=True)
    assert repr(kept) == repr(held) and kept._repr_html_() == held._repr_html_()


def lines(result: SweepResult, **options: str) -> list[np.ndarray]:
    return [line.get_xydata() for axis in flow(result, **options).axes for line in axis.lines]


def test_figures_of_a_long_table_are_those_of_a_short_one(held: SweepResult, kept: SweepResult) -> None:
    for options in ({}, {"rows": "relation"}, {"metric": "kl", "x": "depth", "interval": "sem"}):
        expected, found = lines(held, **options), lines(kept, **options)
        assert len(expected) == len(found) > 3
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)
    fact = str(held.table.fact_id.iloc[-1])
    one, other = (result.heatmap(fact, path="main").axes[0] for result in (held, kept))
    np.testing.assert_array_equal(one.images[0].get_array(), other.images[0].get_array())


def test_the_page_of_a_long_table_is_that_of_a_short_one(held: SweepResult, kept: SweepResult, tmp_path: Path) -> None:
    for details in (0, 3, 1000):
        pages = [result.report(tmp_path / "page.html", details=details).read_text() for result in (held, kept)]
        assert pages[0] == pages[1] and "all facts" in pages[0]
    both = SweepResult.concat([kept, kept])
    assert len(both.rows) == 2 * len(kept.rows)
    assert both.report(tmp_path / "page.html").read_text() == pages[0], "knockouts that stand twice count once"


def test_different_numbers_for_one_knockout_are_refused_wherever_they_are(
    held: SweepResult, kept: SweepResult, tmp_path: Path
) -> None:
    changed = held.table.copy()
    changed.loc[changed.index[-1], "prob"] += 0.1
    other = held._with(changed, held.configs)
    with pytest.raises(MambalensError, match="have different numbers for the same knockouts of 'atlas-mamba1'"):
        SweepResult.concat([kept, other]).report(tmp_path / "page.html")


def test_a_long_table_is_put_together_where_it_fits_and_else_says_what_to_do(
    held: SweepResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "HELD", 10)
    monkeypatch.setattr(rows, "HELD", 10)
    result = SweepResult.load(folder)
    pd.testing.assert_frame_equal(result.rows.take(["source", "prob"]), held.table[["source", "prob"]])
    monkeypatch.setattr(rows, "_free", lambda: 10_000)
    with pytest.raises(MambalensError, match=rf"has {len(held.table):,} rows, which take .*result\.rows\.take"):
        _ = result.table
    monkeypatch.undo()
    pd.testing.assert_frame_equal(result.table, held.table, check_exact=True)
    assert result.table is result.table
    result.table = held.table[:3]
    assert len(result.rows) == 3


def test_a_long_result_is_saved_part_by_part_and_never_over_itself(
    held: SweepResult, kept: SweepResult, tmp_path: Path, folder: Path
) -> None:
    saved = SweepResult.load(kept.where(path="both").save(tmp_path / "saved"))
    assert len(list((tmp_path / "saved" / PARTS).iterdir())) == 4
    pd.testing.assert_frame_equal(saved.table, held.where(path="both").table, check_exact=True)
    pd.testing.assert_frame_equal(saved.skipped, held.skipped)
    pd.testing.assert_frame_equal(saved.checks, held.checks)
    again = SweepResult.load(tmp_path / "saved")
    again.table = held.table  # what is held may take the place of what was there
    assert len(SweepResult.load(again.save(tmp_path / "saved")).rows) == len(held.table)
    assert [path.name for path in (tmp_path / "saved" / PARTS).iterdir()] == ["00000.parquet"]
    with pytest.raises(MambalensError, match="keeps the rows of this result: choose another folder"):
        SweepResult.load(kept.save(tmp_path / "other")).save(tmp_path / "other")


def test_damaged_and_missing_parts_of_a_long_table_are_left_out(
    held: SweepResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        target = tmp_path / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / PARTS / "00002.parquet").unlink()
    part = tmp_path / PARTS / "00001.parquet"
    content = bytearray(part.read_bytes())
    table = pd.read_parquet(part)
    at = content.index(np.float64(table.prob.iloc[7]).tobytes())
    content[at] ^= 1
    part.write_bytes(content)
    monkeypatch.setattr(data, "HELD", 10)
    with pytest.warns(UserWarning, match=r"00001\.parquet' .* left out"):
        result = SweepResult.load(tmp_path)
    assert result.unfinished == 2 and len(result.rows.pieces) == 2
    blocks = [FACTS[begin : begin + BLOCK] for begin in range(0, len(FACTS), BLOCK)]
    left = {fact.id for block in (blocks[0], blocks[3]) for fact in block}
    expected = held.table[held.table.fact_id.isin(left)].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.table, expected, check_exact=True)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, Path]:
    """Two models, some facts in fewer windows, missing numbers, facts left out, single tokens and parts without some."""
    folder = tmp_path_factory.mktemp("uneven")
    one = Lens.load("atlas-mamba1").sweep(FACTS, ("subject", "context", "each"), window=6, progress=False)
    two = Lens.load("atlas-mamba2").sweep(FACTS[:5], ("subject", "relation"), window=4, progress=False,
                                          measure="log_odds")  # fmt: skip
    draw = np.random.default_rng(0)
    for name, result in (("one", one), ("two", two)):
        table = result.table[draw.random(len(result.table)) > 0.1].reset_index(drop=True)  # windows, facts and sources
        for metric in ("change_pct", "kl", "prob"):
            table.loc[draw.random(len(table)) < 0.1, metric] = np.nan
        some = table.fact_id.isin(table.fact_id.unique()[1:4])
        for number, rows_of_part in enumerate((table[some], table[~some])):
            part = result._with(rows_of_part, result.configs)
            part.unfinished = number
            part.save(folder / f"{name}-{number}")
    return SweepResult.load(folder), folder


def by_loops(result: SweepResult, metric: str, by: list[str]) -> pd.DataFrame:
    """A summary by a loop over rows, its bootstrap by one over resamples."""
    facts = {row["fact_id"]: row for row in result.facts.to_dict("records")}
    groups: dict[tuple, list[float]] = {}
    for row in result.table.to_dict("records"):
        key = (*(facts[row["fact_id"]][name] for name in by), *(row[name] for name in GROUP))
        groups.setdefault(key, []).append(float(row[metric]))
    found = []
    for key, every in groups.items():
        values = np.array([value for value in every if value == value])
        n, mean = len(values), values.mean() if len(values) else np.nan
        rng, means = np.random.default_rng(0), []
        if n > 1:
            means = [values[drawn].mean() for _ in range(20) for drawn in rng.integers(0, n, (100, n))]
        low, high = np.percentile(means, [2.5, 97.5]) if n > 1 else (np.nan, np.nan)
        found.append((*key, len(every), mean, low, high))
    return pd.DataFrame(found, columns=[*by, *GROUP, "n", "mean", "low", "high"])


@pytest.fixture(scope="module")
def looped(uneven: tuple[SweepResult, Path]) -> Callable[..., pd.DataFrame]:
    """`by_loops` of the uneven table, by a metric and columns, once for every test."""
    return functools.cache(lambda metric, *by: by_loops(uneven[0], metric, list(by)))


@pytest.mark.parametrize("most", [None, 0])
def test_uneven_tables_are_summarized_as_by_loops(
    uneven: tuple[SweepResult, Path],
    looped: Callable[..., pd.DataFrame],
    monkeypatch: pytest.MonkeyPatch,
    most: int | None,
) -> None:
    held, folder = uneven
    assert held.table.kl.isna().any() and held.table.position.max() > 3 and held.table.model.nunique() == 2
    assert held.table.groupby(GROUP).size().nunique() > 2
    monkeypatch.setattr(data, "HELD", 10)
    if most is not None:
        monkeypatch.setattr(rows, "_most", lambda _: most)  # as where numbers are too many for a list
    kept = SweepResult.load(folder)
    for result in (held, kept):
        for by in ([], ["relation"], ["relation", "wording"]):
            for metric in ("change_pct", "hit", "rank"):
                found, expected = result.summary(metric=metric, by=by), looped(metric, *by)
                pd.testing.assert_frame_equal(found, expected, rtol=1e-9, atol=1e-9)
        both = result.summaries(["kl", "prob"])
        for metric in both:
            pd.testing.assert_frame_equal(both[metric], looped(metric), rtol=1e-9, atol=1e-9)
    assert all(isinstance(piece, Kept) for piece in kept.rows.pieces)


@pytest.mark.parametrize("sparse", [page.SPARSE, 0])
def test_the_page_of_an_uneven_table_has_every_knockout_once(
    uneven: tuple[SweepResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: int
) -> None:
    monkeypatch.setattr(page, "SPARSE", sparse)
    held, folder = uneven
    expected = held.report(tmp_path / "held.html").read_text()
    monkeypatch.setattr(data, "HELD", 10)
    kept = SweepResult.load(folder)
    assert kept.report(tmp_path / "kept.html").read_text() == expected
    once = held.table.drop_duplicates(["fact_id", *GROUP], ignore_index=True)
    assert len(once) == len(held.table)
    again = SweepResult.concat([kept, kept.where(source="subject"), kept])
    whole = page._whole(again)
    pd.testing.assert_frame_equal(whole.rows.frame(), once, check_exact=True)
    assert again.report(tmp_path / "again.html").read_text() == expected
    assert page._whole(kept) is kept


def test_whole_numbers_are_resampled_exactly_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    groups = [
        (rng.random(400) < 0.3).astype(float), rng.integers(1, 40_000, 400).astype(float),
        rng.integers(1, 60_000, 400).astype(float), rng.normal(size=400), np.array([1.0, 2.0, np.inf]),
    ]  # fmt: skip
    assert [intervals._is_exact(group[None]) for group in groups] == [True, True, False, False, False]
    for group in groups[:4]:
        for kept in (2**28, 0):  # bytes of draws
            monkeypatch.setattr(intervals, "KEPT", kept)
            draws = Draws(3)
            found = [mean_intervals([group, group[:50], group], "bootstrap", 3, draws) for _ in range(2)]
            monkeypatch.setattr(intervals, "_EXACT", 0)
            expected = mean_intervals([group, group[:50], group], "bootstrap", 3)
            monkeypatch.undo()
            if intervals._is_exact(group[None]):
                assert found == [expected, expected]
            np.testing.assert_allclose(found, [expected, expected], rtol=1e-13)


def test_groups_outlive_what_their_rows_are_turned_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "HELD", 10)
    result = SweepResult.load(folder)
    before, roles = result.summary(), result.roles()
    apart = roles.summary("t", by=["relation"])
    _ = result.table
    assert isinstance(result.rows.pieces[0], Held)
    pd.testing.assert_frame_equal(result.summary(), before)
    pd.testing.assert_frame_equal(roles.summary("t", by=["relation"]), apart)
    result.table["prob"] = 0.0
    assert (result.summary(metric="prob")["mean"] == 0).all()


def test_long_tables_say_how_far_they_are_and_short_ones_do_not(
    held: SweepResult, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    SweepResult.load(folder).report(tmp_path / "page.html")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(data, "HELD", 10)
    result = SweepResult.load(folder)
    assert f"load {folder.name}: " in (said := capsys.readouterr().err) and "0/4" in said
    result.report(tmp_path / "page.html")
    said = capsys.readouterr().err
    assert "means: " in said and "means by relation: " in said and "0/6" in said


@pytest.mark.parametrize("at", ["mambalens.runs.data.mean_intervals", "mambalens.report.assets.Path.write_text",
                                "mambalens.runs.folder.os.fsync"])  # fmt: skip
def test_an_interrupt_leaves_the_page_that_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(data, "HELD", 10)
    result = SweepResult.load(folder)
    (tmp_path / "page.html").write_text("the one before")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            result.report(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "the one before"


def test_an_interrupt_leaves_the_figure_that_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = tmp_path / "flow.png"
    assert CliRunner().invoke(app, ["plot", str(folder), "--out", str(figure)]).exit_code == 0
    before = figure.read_bytes()
    assert before.startswith(b"\x89PNG") and before.endswith(b"IEND\xaeB`\x82")

    def half(self: Figure, file: Path, **_: object) -> None:
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", half)
        assert CliRunner().invoke(app, ["plot", str(folder), "--out", str(figure)]).exit_code != 0
    assert list(tmp_path.iterdir()) == [figure] and figure.read_bytes() == before


TEXTS = st.sampled_from(["a", "b", "", "c", None])
SOME = data_frames(
    [column("x", elements=TEXTS, dtype=object), column("y", elements=st.integers(-1, 2)),
     column("z", elements=st.sampled_from([0.5, np.nan, 1.0]))],
    index=range_indexes(max_size=12),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(SOME, min_size=1, max_size=4))
def test_groups_are_those_of_pandas_over_all_pieces(frames: list[pd.DataFrame]) -> None:
    whole = pd.concat(frames, ignore_index=True)
    pieces = Rows([Held(frame) for frame in frames])
    names = ["x", "y"]
    groups = Groups.of(pieces, ([frame[name] for name in names] for frame in pieces.taken(names)))
    expected = list(whole.groupby(names, sort=False, dropna=False))
    assert repr(groups.keys) == repr([tuple(np.nan if pd.isna(one) else one for one in key) for key, _ in expected])
    assert list(groups.sizes) == [len(group) for _, group in expected]
    for found, (_, group) in zip(groups.values("z"), expected, strict=True):
        np.testing.assert_array_equal(found, group.z.dropna())
    first = pieces.first(names, ["z"])
    pd.testing.assert_frame_equal(first, whole.drop_duplicates(names, ignore_index=True), check_dtype=False)
    numbers, at = numbered([whole.x, whole.y])
    assert repr(whole[names].iloc[at[numbers]].to_numpy().tolist()) == repr(whole[names].to_numpy().tolist())
    assert list(at) == [numbers.tolist().index(number) for number in range(len(at))]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_benchmarks_peak_is_that_of_its_work_and_not_of_who_starts_it(folder: Path) -> None:
    script = Path(__file__).parent / "benchmarks" / "long_table.py"
    starts = (
        "import resource, subprocess, sys\n"
        "held = b'x' * 10**9\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", starts, sys.executable, str(script), "--only", "load", str(folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert int(said[-1]) * 1024 > 10**9
    assert 0.05 < json.loads(said[-2])["peak_gb"] < 0.8


def test_every_pass_of_a_long_report_says_how_far_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "HELD", 10)
    result = SweepResult.load(folder)
    capsys.readouterr()
    result.report(tmp_path / "page.html")
    said = capsys.readouterr().err
    parts = [
        "look for groups",
        "look for first rows",
        "look for single tokens",
        "look for rows by fact_id",
        "read rows",
    ]
    for doing in parts:
        assert f"{doing}: " in said and "0/4" in said.partition(f"{doing}: ")[2].partition("\r")[0], doing
    assert "curves of facts: " in said and "heatmaps of facts: " in said
    twice = SweepResult.concat([result, SweepResult.load(folder)])
    capsys.readouterr()
    twice.report(tmp_path / "page.html")
    assert "compare what stands twice: " in capsys.readouterr().err


@pytest.mark.parametrize("at", ["mambalens.runs.rows.Kept.take", "mambalens.runs.rows.Kept.frame",
                                "mambalens.report.page._top", "mambalens.report.page.packed"])  # fmt: skip
def test_an_interrupt_in_the_middle_of_facts_leaves_the_page_that_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    test_an_interrupt_leaves_the_page_that_was_there(folder, tmp_path, monkeypatch, at)
