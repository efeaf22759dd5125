"""A sweep from a file: the same settings as on the command line, checked as strictly."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import run, typed

from mambalens import Lens, MambalensError, SweepResult, load_facts
from mambalens.cli.app import app
from mambalens.cli.settings import SweepSettings

FILE = """
model = ["atlas-gpt-neox", "atlas-mamba2"]
source = ["subject"]
where = {wording = "near", relation = ["capital", "language"]}
window = [6, 9]
target = ["last", "subject_last"]
limit = 4
block_size = 3
"""


def test_a_file_and_the_command_line_say_the_same() -> None:
    given = {"model": ["m"], "out": Path("o"), "window": [3], "where": ["a=b"], "all_facts": True, "limit": 7}
    from_line = SweepSettings.read(None, given)
    assert from_line == SweepSettings(("m",), "o", window=(3,), where=("a=b",), all_facts=True, limit=7)


def test_what_is_given_beside_a_file_goes_first(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(FILE + "out = 'there'\n")
    read = SweepSettings.read(tmp_path / "s.toml", {"out": "here", "window": [4], "source": None, "where": []})
    assert (read.out, read.window, read.source) == ("here", (4,), ("subject",))
    assert read.where == ("wording=near", "relation=capital", "relation=language")


def test_the_command_line_has_every_setting_and_leaves_to_a_file_what_it_was_not_given() -> None:
    sweep = app.commands["sweep"]
    given = sweep.make_context("sweep", []).params
    assert set(given) == set(SweepSettings.__dataclass_fields__) | {"config", "dry_run", "as_json"}
    assert all(given[name] in (None, ()) for name in SweepSettings.__dataclass_fields__)
    given = sweep.make_context("sweep", ["m", "--all-facts", "--window", "3", "--window", "4", "--where", "a=b"]).params
    assert (given["model"], given["all_facts"], given["window"], given["where"]) == (("m",), True, (3, 4), ("a=b",))


def test_a_sweep_from_a_file_has_a_folder_for_every_model_target_and_window(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(FILE)
    out = tmp_path / "out"
    text = run("sweep", "--config", str(tmp_path / "s.toml"), "--out", str(out))
    assert "The window that costs most" in text
    folders = {str(path.parent.relative_to(out)) for path in out.rglob("sweep.json")}
    assert folders == {f"{model}/{target}-{window}" for model in ("atlas-gpt-neox", "atlas-mamba2")
                       for target in ("last", "subject_last") for window in (6, 9)}  # fmt: skip
    result = SweepResult.load(out)
    assert result.models == ["atlas-gpt-neox", "atlas-mamba2"]
    assert result.facts.relation.isin(["capital", "language"]).all()
    one = tmp_path / "one"
    run("sweep", "atlas-mamba2", "--source", "subject", "--where", "wording=near", "--where", "relation=capital", "--where",
        "relation=language", "--window", "9", "--limit", "4", "--out", str(one), "--block-size", "3")  # fmt: skip
    alone = SweepResult.load(one).table
    among = result.where(model="atlas-mamba2", target="last", window_size=9).table
    assert alone.equals(among)


@pytest.mark.parametrize(("text", "message"), [
    ("sources = ['subject']", "'sources' is no setting: did you mean 'source'"),
    ("window = ['six']", "window has 'six', which is not a whole number"),
    ("window = true", "window has True, which is not a whole number"),
    ("all_facts = 1", "all_facts has 1, which is not true or false"),
    ("limit = 0", "limit has 0: give 1 or more"), ("source = []", "source is empty"),
    ("source = ['last', 'last']", "source has 'last' twice"), ("common = true\nall_facts = true", "contradict each other"),
    ("facts = {a = 1}", "which is not text"), ("model = 'a", "is not TOML"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_quoted(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text + ("" if text.startswith("model") else "\nmodel = 'm'") + "\nout = 'o'\n")
    with pytest.raises(MambalensError, match=message):
        SweepSettings.read(tmp_path / "s.toml", {})
    with pytest.raises(MambalensError, match="cannot be read"):
        SweepSettings.read(tmp_path / "none.toml", {})
    with pytest.raises(MambalensError, match="model and out must be given"):
        SweepSettings.read(None, {})


KEYS = st.sampled_from(["model", "out", "facts", "source", "target", "window", "features", "path", "mixers", "all_facts",
                        "common", "where", "limit", "memory", "dtype"]) | st.text("abcd_", min_size=1, max_size=5)  # fmt: skip
SCALARS = st.one_of(
    st.integers(-3, 20).map(str), st.booleans().map(lambda b: str(b).lower()), st.floats(-2, 2).map(lambda f: f"{f:.3f}"),
    st.text("abc =:\"'\n[", max_size=6).map(lambda t: "'" + t.replace("'", "").replace("\n", "") + "'"),
)  # fmt: skip
LINES = st.builds("{} = {}".format, KEYS, SCALARS | st.lists(SCALARS, max_size=3).map(lambda v: f"[{', '.join(v)}]"))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES | st.text(max_size=15), max_size=6), bits=st.binary(max_size=3))
def test_any_file_gives_settings_or_a_sentence(lines: list[str], bits: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes("\n".join(lines).encode("utf-8", "replace") + bits)
    try:
        found = SweepSettings.read(path, {"model": ["m"], "out": "o"})
    except MambalensError as error:
        assert str(error).endswith((".", ")"))
        return
    assert set(tomllib.loads(path.read_text())) <= set(SweepSettings.__dataclass_fields__)
    assert all(isinstance(window, int) for window in found.window)


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(tmp_path: Path) -> None:
    text = run("sweep", "atlas-gpt-neox", "atlas-mamba2", "--where", "wording=far", "--limit", "40", "--source", "subject",
               "--window", "6", "--dry-run", "--out", str(tmp_path / "out"))  # fmt: skip
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("atlas")}
    for model in ("atlas-gpt-neox", "atlas-mamba2"):
        assert lines[model][1:3] == ["40", "280"]  # 7 windows
    assert "Nothing was written" in text and not (tmp_path / "out").exists()


def test_a_size_of_memory_is_read_before_any_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(f"model = 'nowhere'\nout = '{tmp_path}/o'\nmemory = 'lots'\n")
    for told in (
        ["--config", str(tmp_path / "s.toml")],
        ["nowhere", "--out", str(tmp_path / "o"), "--memory", "lots"],
    ):
        done = CliRunner().invoke(app, ["sweep", *told])
        assert "memory='lots' is not a size: give bytes, or text like '4GB'" in str(done.exception)


def test_a_model_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done = typed("sweep", "atlas-gpt-neox", str(tmp_path), "--where", "wording=near", "--limit", "3", "--window", "6", "--out",
                 str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 1
    assert "failed, the others go on" in done.stderr and "has no config.json" in done.stderr
    assert SweepResult.load(tmp_path / "out").models == ["atlas-gpt-neox"]


def test_two_models_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    from mambalens.data import checkpoints

    done = typed("sweep", "atlas-gpt-neox", str(checkpoints()["atlas-gpt-neox"]), "--where", "wording=near", "--limit", "2",
                 "--window", "6", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 1 and "Two of the models are called 'atlas-gpt-neox'" in done.stderr


def test_common_facts_have_subjects_that_are_short_for_every_model_and_a_limit_counts_what_is_left(
    tmp_path: Path,
) -> None:
    options = [
        "--where",
        "wording=near",
        "--window",
        "6",
        "--source",
        "subject",
        "--subject-tokens",
        "2",
        "--limit",
        "3",
    ]
    run("sweep", "atlas-gpt-neox", "atlas-mamba2", "--common", *options, "--out", str(tmp_path / "common"))
    result = SweepResult.load(tmp_path / "common")
    of_each = [sorted(set(part.fact_id)) for _, part in result.table.groupby("model")]
    assert of_each[0] == of_each[1] and len(of_each[0]) == 3
    lens = Lens.load("atlas-mamba2")
    facts = {fact.id: fact for fact in load_facts("atlas")}
    assert all(len(lens.prompt(facts[name]).positions("subject")) <= 2 for name in of_each[0])
    run("sweep", "atlas-mamba2", "--all-facts", *options, "--out", str(tmp_path / "all"))
    assert SweepResult.load(tmp_path / "all").table.fact_id.nunique() == 3
    text = run("plot", str(tmp_path / "common"), "--where", "model=atlas-gpt-neox", "--where", "model=atlas-mamba2")
    assert "Figure" in text


def test_a_sweep_that_is_interrupted_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambalens.sweep.block import Work

    whole, done = Work.block, []

    def interrupted(self: Work, facts: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return whole(self, facts)  # type: ignore[arg-type]

    options = ["sweep", "atlas-gpt-neox", "--where", "wording=near", "--limit", "6", "--window", "6", "--block-size", "2",
               "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(Work, "block", interrupted)
    result = CliRunner().invoke(app, options)
    assert "the same command goes on from there" in result.output
    assert SweepResult.load(tmp_path).unfinished == 1
    done.clear()
    run(*options)
    assert len(done) == 1 and SweepResult.load(tmp_path).unfinished == 0


def test_progress_and_result_as_json_lines(tmp_path: Path) -> None:
    options = ["sweep", "atlas-gpt-neox", "--where", "wording=near", "--limit", "5", "--window", "6", "--block-size", "2",
               "--out", str(tmp_path), "--json"]  # fmt: skip
    for again in (False, True):
        done = typed(*options)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        checks = [event for event in events if event["event"] == "replay checked"]
        assert len(checks) == (0 if again else 3)
        assert all(event["passed"] and event["difference"] < 4 * event["noise"] < 1e-4 for event in checks)
        events = [event for event in events if event not in checks]
        kinds = [event["event"] for event in events]
        assert kinds == ["model", *["block already there" if again else "block"] * 3, "result"]
        assert [event["block"] for event in events[1:-1]] == [0, 1, 2] and events[1]["blocks"] == 3
        assert events[-1]["rows"] == len(SweepResult.load(tmp_path).table)


def test_logs_are_quiet_unless_somebody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [
        "sweep",
        "atlas-gpt-neox",
        "--where",
        "wording=near",
        "--limit",
        "2",
        "--window",
        "6",
        "--out",
        str(tmp_path),
    ]
    with caplog.at_level("INFO", logger="mambalens"):
        run(*options)
    assert [record.message.split()[0] for record in caplog.records if record.name == "mambalens"] == [
        "model",
        "replay",
        "block",
        "result",
    ]
    assert "block=0" not in typed(*options).stderr
