"""What the README and the docstrings show is run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib
import pytest
import torch

import mambalens
import mambalens.hooks

matplotlib.use("agg")

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHOWN = r"facts\[0\]\s+# (.*?) \.\.\."
MODULES = [
    name
    for package in (mambalens, mambalens.hooks)
    for name in (package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")))
    if not name.endswith("__main__")
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_every_python_block_of_the_readme_runs(block: str) -> None:
    names: dict = {}
    exec(block, names)
    for shown in re.finditer(SHOWN, block):  # the comment shows what the line gives
        assert repr(names["facts"][0]).startswith(shown[1])


def test_the_readme_shows_a_fact() -> None:
    assert re.search(SHOWN, README)


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_the_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
