"""What the README and the docstrings show is run."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import pytest
import torch

import mambalens
import mambalens.hooks

sys.path.append(str(Path(__file__).parent.parent / "docs"))

import equations

matplotlib.use("agg")

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
README = (ROOT / "README.md").read_text()
BLOCKS = BLOCK.findall(README)
PAGES = sorted(path for path in (ROOT / "docs" / "pages").rglob("*.md") if BLOCK.search(path.read_text()))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs" / "pages").as_posix())
def test_the_python_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(textwrap.dedent(block), f"{page.name}, block {number}", "exec"), names)


def test_every_how_to_has_code_that_is_run() -> None:
    guides = set((ROOT / "docs" / "pages" / "howto").glob("*.md"))
    assert guides and guides < set(PAGES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_kept_with_its_outputs_and_without_warnings(notebook: Path) -> None:
    code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]


def test_the_readme_shows_a_fact() -> None:
    assert re.search(SHOWN, README)


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_the_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_every_equation_names_a_function_that_there_is_and_its_source() -> None:
    found = equations.collect(ROOT)
    for equation in found:
        module = next(name for name in sorted(MODULES, reverse=True) if equation.function.startswith(f"{name}."))
        value = importlib.import_module(module)
        for part in equation.function.removeprefix(f"{module}.").split("."):
            value = getattr(value, part)
        assert callable(value) and equation.lines and all(re.search(r"\d{4}|this package", s) for s in equation.sources)
    by_function: dict[str, str] = {}
    for equation in found:
        name = equation.function.rpartition(".")[2]
        by_function[name] = by_function.get(name, "") + "\n".join((equation.heading, equation.lines, *equation.sources))
    for name, known in {
        "selective_scan": ("y_t = C_t . h_t", "2312.00752, eq. 2"),
        "ssd_attention": ("alpha[t, s] = (C_t . B_s)", "2405.21060, eq. 16"),
        "add_skip": ("D x_t", "2111.00396, eq. 1"),
        "decay_norm": ("sum_n exp(-exp(A_log[f, n]))", "2505.24244"),
        "effective_rank": ("exp(-sum_i p_i log p_i)", "EUSIPCO, eq. 4"),
    }.items():
        assert all(part in by_function[name] for part in known), name
    knockouts = [equation for equation in found if equation.heading == "Knockout"]
    assert any("alpha[t, s, f] = 0" in e.lines and "2505.24244, eq. 5" in e.sources[0] for e in knockouts)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("Equation: Decay\n    y = x\n", "has no 'Source: ...'"),
        ("Equation: Sums\n    y = x\n\n    Source: a book\n", "'Equation: Sums' is under none of Recurrence"),
    ],
)
def test_an_equation_without_source_or_under_an_unknown_heading_is_refused(section: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        equations.read(f"What it does.\n\n{section}", "f")
