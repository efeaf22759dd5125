"""The command line's readings: the logit lens and contributions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from mambalens.cli.app import app, main
from mambalens.figures.style import signed
from mambalens.hooks.errors import MambalensError
from mambalens.result import Contributions

PROMPT = ["--prompt", "In Peru the capital is", "--subject", "Peru", "--target", "Lima"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_contributions_of_one_prompt(tmp_path: Path) -> None:
    text = run("contributions", "atlas-deltanet", *PROMPT, "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "contributions.csv")
    total = table.contribution.sum()
    assert f"atlas-deltanet, 'Lima': Log-odds of the target (nats) {signed(total)} = " in text
    strongest = table[table.part != "bias"].contribution.abs().max()
    assert f"{strongest:.2f}" in text
    files = {"contributions.csv", "contributions.png", "summary.csv"}
    run_s = {"contribution.json", "facts.parquet", "prompts.parquet", "parts", "locks"}
    assert {path.name for path in tmp_path.iterdir()} == files | run_s


def test_the_contributions_to_facts_that_are_known(tmp_path: Path) -> None:
    text = run("contributions", "atlas-mamba1", "--limit", "3", "--against", "London", "--out", str(tmp_path))
    assert "the contributions to 3 facts that it knows" in text and "3 facts, means: Logit difference (nats)" in text
    assert pd.read_csv(tmp_path / "contributions.csv").fact_id.nunique() == 3
    assert Contributions.load(tmp_path).scores.fact_id.nunique() == 3
    (tmp_path / "contributions.png").unlink()
    run("plot", str(tmp_path), "--where", "part=mixer")
    assert (tmp_path / "contributions.png").stat().st_size > 10_000


def test_the_same_question_goes_on_in_its_folder_and_another_is_refused(tmp_path: Path) -> None:
    asking = ["logits", "atlas-mamba1", "--limit", "3", "-k", "2", "--block-size", "2", "--out", str(tmp_path)]
    run(*asking)
    first = pd.read_csv(tmp_path / "logits.csv")
    one, two = sorted((tmp_path / "parts").iterdir())
    before = one.stat().st_mtime_ns
    two.unlink()
    run(*asking)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "logits.csv"), first, atol=1e-5)
    assert one.stat().st_mtime_ns == before and two.exists()
    run("plot", str(tmp_path), "--metric", "rank", "--out", str(tmp_path / "rank.png"))
    assert (tmp_path / "rank.png").stat().st_size > 10_000
    with pytest.raises(MambalensError, match="holds another run .*k: 2 there, 3 now"):
        run(*asking[:5], "3", *asking[6:])
    for asking, said in (
        (["plot", str(tmp_path), "--where", "layer=1"], "holds logits, which --where does not choose from"),
        (["contributions", "atlas-mamba1", *PROMPT, "--out", str(tmp_path)], r"holds a logit \(logit.json\)"),
    ):
        with pytest.raises(MambalensError, match=said):
            run(*asking)


def test_the_layers_of_one_prompt_and_of_facts(tmp_path: Path) -> None:
    text = run("logits", "atlas-mamba1", *PROMPT, "-k", "2", "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "logits.csv")
    last = table[table.position == table.position.max()].sort_values("layer")
    assert "'Lima' at the last token" in text
    assert all(str(top).strip() in text for top in last.top_token)
    text = run("logits", "atlas-mamba1", "--limit", "2", "--metric", "rank", "--out", str(tmp_path / "facts"))
    assert "2 facts: rank of the answer at the last token, means" in text
    assert (tmp_path / "facts" / "logits.png").stat().st_size > 10_000


def test_mistakes_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["contributions", "atlas-mamba1", "--prompt", "In Peru"], "give --target too"),
        (["contributions", "atlas-mamba1", *PROMPT, "--measure", "loss"], "'loss' is not a measure"),
        (["logits", "atlas-mamba1", *PROMPT, "--metric", "ranks"], "did you mean 'rank'"),
    ):
        monkeypatch.setattr("sys.argv", ["mambalens", *arguments, "--out", str(tmp_path / "none")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
