"""The command line, as a user types it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from started import python

from mambalens import MambalensError, SweepResult
from mambalens.cli.app import app
from mambalens.data import checkpoints

MODEL = "atlas-gpt-neox" if "atlas-gpt-neox" in checkpoints() else next(iter(checkpoints()))
VERBS = ("sweep", "flow", "patch", "trace", "evaluate", "heatmap", "explore", "features", "attention", "logits", "contributions",
         "diagnose", "steer", "plot", "report", "reproduce", "models", "facts")  # fmt: skip


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def typed(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "mambalens", *arguments, cwd=cwd)


def test_help_is_quick_has_examples_and_fits_a_screen() -> None:
    for arguments in ([], *([verb] for verb in VERBS)):
        text = typed(*arguments, "--help").stdout
        assert len(text.splitlines()) <= 50, arguments
        assert "Example" in text and "..." not in text.partition("Commands:")[2]
    started = time.perf_counter()
    probe = (
        "import mambalens, mambalens.cli.app, sys; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
    assert time.perf_counter() - started < 5  # a stalled import; the usual time is a tenth of a second


def test_sweep_twice_gives_the_same_table_value_for_value(tmp_path: Path) -> None:
    options = ["--limit", "6", "--where", "wording=near", "--where", "relation=capital", "--window", "9"]
    for out in ("one", "two"):
        text = run("sweep", MODEL, "--out", str(tmp_path / out), *options)
    assert "sweeping 6 facts that it knows" in text
    tables = [SweepResult.load(tmp_path / out).table for out in ("one", "two")]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert len(tables[0]) == 6 * 4 * 4
    assert tables[0].base_rank.eq(1).all()
    assert (tmp_path / "one" / "flow.png").stat().st_size > 10_000
    run("plot", str(tmp_path / "one"), "--x", "depth", "--metric", "kl", "--out", str(tmp_path / "kl.png"))
    assert (tmp_path / "kl.png").stat().st_size > 10_000


def test_several_models_go_to_a_folder_each(tmp_path: Path) -> None:
    names = list(checkpoints())[:2]
    run(
        "sweep", *names, "--out", str(tmp_path), "--limit", "2", "--where", "wording=near", "--where", "relation=symbol",
        "--window", "6", "--source", "subject",
    )  # fmt: skip
    assert SweepResult.load(tmp_path).models == names
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_a_persons_own_facts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(
        "prompt,subject,target,relation\nThe capital of Peru is,Peru,Lima,capital\nThe capital of Peru is,Chile,Lima,capital\n"
    )
    text = run("evaluate", MODEL, "--facts", str(tmp_path / "mine.csv"), "--out", str(tmp_path / "answers.csv"))
    assert "capital" in text
    assert "skipped 1: the subject 'Chile' is not in the prompt" in text
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert answers.fact_id.tolist() == [0, 1]
    assert answers.skipped.notna().tolist() == [False, True]


def test_heatmap_models_and_facts(tmp_path: Path) -> None:
    arguments = ["--prompt", "The capital of Peru is", "--subject", "Peru", "--target", "Lima", "--window", "6"]
    assert "prob" in run("heatmap", MODEL, *arguments, "--out", str(tmp_path / "h.png"))
    assert (tmp_path / "h.png").stat().st_size > 10_000
    assert MODEL in run("models")
    assert "capital" in run("facts", "--where", "relation=capital")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "atlas-mamba7"], "did you mean 'atlas-mamba"),
        (["facts", "atals"], "did you mean 'atlas'"),
        (["sweep", MODEL, "--window", "99", "--out", "x", "--limit", "2"], "window=99, but the model has 12 layers"),
        (["sweep", MODEL, "--source", "subjct", "--out", "x", "--limit", "2"], "did you mean 'subject'"),
        (["facts", "--where", "wording"], "is not COLUMN=VALUE"),
        (["facts", "--where", "wording=nowhere"], "No fact of 'atlas' has wording=nowhere"),
        (["plot", "nowhere"], "does not exist"),
        (["attention", MODEL, "--prompt", "a", "--out", "map.pgn"], "written as 'map.pgn': did you mean 'png'"),
        (["attention", MODEL, "--prompt", "a", "--out", "none/map.png"], "there is no folder 'none'"),
        (["patch", MODEL, "--memory", "lots", "--out", "x"], "memory='lots' is not a size"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = typed(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plot"], "Missing argument 'DIR'"),
        (["report"], "Missing argument 'DIR..."),
        (["heatmap", MODEL], "Missing option '--prompt'"),
        (["sweep", MODEL, "--limt", "3"], "Did you mean '--limit'?"),
        (["sweep", MODEL, "--limit", "0"], "0 is not in the range x>=1"),
        (["sweep", MODEL, "--window", "six"], "'six' is not a valid integer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_cannot_be_read_is_quoted_beside_the_usage(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.output.startswith("Usage:") and sentence in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["steer", "--from", "relation=language", "--to", "capital"], "--to 'capital' is not COLUMN=VALUE"),
        (["steer", "--from", "language", "--to", "relation=capital"], "--from 'language' is not COLUMN=VALUE"),
        (["features", "--select", "half_lives"], "--select 'half_lives' is not measured .*mean 'half_life'"),
        (["features", "--select", "half_life", "--top", "2"], "--top 2: give the part"),
        (["logits", "--prompt", "a", "--target", "b", "--limit", "3"], "--limit would choose among facts"),
        (["contributions", "--target", "b"], "--target would be of a single prompt: give --prompt too"),
        (["contributions", "--prompt", "a", "--target", "b", "--where", "c=d"], "--where would choose among facts"),
        (["flow", "--prompt", "a", "--subject", "a", "--target", "b", "--limit", "3"], "--limit would choose among"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_contradicts_itself_is_refused_before_a_model_is_loaded(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, [arguments[0], "/nowhere", *arguments[1:], "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, MambalensError)
    assert re.search(sentence, str(done.exception)) and not (tmp_path / "out").exists()


def test_features_writes_tables_figures_and_a_selection_that_sweep_takes(tmp_path: Path) -> None:
    out, model = tmp_path / "features", "atlas-mamba2"
    text = run("features", model, "--out", str(out), "--limit", "8", "--where", "wording=near", "--causal",
               "--select", "exchange_share_last", "--top", "0.2")  # fmt: skip
    assert "Rank correlation with the exchange share" in text
    table = pd.read_csv(out / "features.csv")
    assert len(table) == 12 * 10 and table.exchange_share.between(0, 3).all()
    assert pd.read_csv(out / "causal.csv").drop_pct.notna().all()
    for figure in ("decay_norm.png", "half_life.png", "exchange_share.png", "causal.png"):
        assert (out / figure).stat().st_size > 10_000
    chosen = out / "exchange_share_last.csv"
    assert pd.read_csv(chosen).groupby("layer").selected.sum().tolist() == [2] * 12
    swept = tmp_path / "swept"
    run("sweep", model, "--out", str(swept), "--limit", "4", "--source", "subject", "--features", "all", "--features",
        str(chosen), "--features", "slow:0.1", "--features", "7")  # fmt: skip
    found = SweepResult.load(swept).table.features.unique().tolist()
    assert found == ["all", "exchange_share_last", "slow:0.1", "feature 7"]
    refused = typed("sweep", model, "--out", str(swept), "--features", str(tmp_path / "none.csv"))
    assert refused.returncode == 2 and "none.csv' cannot be read" in refused.stderr


def test_features_of_a_transformer_have_shares_and_no_decay(tmp_path: Path) -> None:
    run("features", "atlas-gpt-neox", "--out", str(tmp_path), "--limit", "5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exchange_share.png", "features.csv"]


def test_attention_and_diagnose_draw(tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    text = run("attention", MODEL, "--prompt", "The capital of Peru is", "--subject", "Peru", "--out", str(out))
    assert "Layer 6 of 12" in text and out.stat().st_size > 10_000
    run(
        "attention",
        MODEL,
        "--prompt",
        "The capital of Peru is",
        "--features",
        "1",
        "--reduce",
        "none",
        "--out",
        str(out),
    )
    text = run("diagnose", "atlas-mamba2", MODEL, "--limit", "3", "--out", str(tmp_path))
    assert "induction_score" in text
    assert set(pd.read_csv(tmp_path / "diagnostics.csv").model) == {"atlas-mamba2", MODEL}
    assert (tmp_path / "diagnostics.png").stat().st_size > 10_000
