"""The bundled checkpoints know the Atlas, and a wheel carries them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mambalens import Lens, load_facts
from mambalens.data import checkpoints

NAMES = ("atlas-deltanet", "atlas-gpt-neox", "atlas-mamba1", "atlas-mamba2")
ROOT = Path(__file__).parent.parent
FIRST_BLOCK = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def test_there_are_four_of_at_most_five_megabytes_each_with_one_tokenizer() -> None:
    assert tuple(checkpoints()) == NAMES
    tokenizers = set()
    for folder in checkpoints().values():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 5e6
        assert 8 <= json.loads((folder / "config.json").read_text())["num_hidden_layers"] <= 12
        tokenizers.add((folder / "tokenizer.json").read_bytes())
    assert len(tokenizers) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_knows_trained_wordings_and_most_held_out_ones(name: str) -> None:
    lens, facts = Lens.load(name), load_facts("atlas")
    assert all(lens.prompt(fact).ids for fact in facts)  # none that cannot be used
    facts = facts.sample(1000)  # enough for shares that are 0.95 to 1; all take a checkpoint ten seconds
    table = lens.evaluate(facts, progress=False)
    correct = table.correct.groupby([facts.table.split, facts.table.wording]).mean()
    for wording in ("near", "far"):
        assert correct["trained", wording] >= 0.95
        assert correct["held_out", wording] >= 0.60
    assert (table.skipped == "").all()


def test_subjects_span_several_tokens() -> None:
    lens = Lens.load(NAMES[0])
    lengths = [len(lens.prompt(fact).positions("subject")) for fact in load_facts("atlas").sample(300)]
    assert sum(length >= 2 for length in lengths) / len(lengths) > 0.9


def _what_is_made(folder: str, names: list[str]) -> set[str]:
    """What a clone has not, .training and .venv among it."""
    at_the_top = {"build", "runs"} if Path(folder) == ROOT else set()
    return {name for name in names if name.startswith(".") or name.endswith((".egg-info", "__pycache__"))} | at_the_top


def test_a_wheel_finds_its_facts_and_checkpoints_from_another_folder(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=_what_is_made)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(clone)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert not any("test" in name or ".training" in name for name in archive.namelist())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for arguments in (["models"], ["evaluate", NAMES[0], "--limit", "20"]):
        command = [sys.executable, "-P", "-m", "mambalens", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if arguments == ["models"]:
            assert str(tmp_path / "site") in done.stdout
    # Started in the clone, Python imports the clone's folder, which holds a part of the package only.
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BLOCK], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_the_first_lines_of_the_readme_run_in_the_clone_and_elsewhere(inside: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BLOCK],
        cwd=ROOT if inside else tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
