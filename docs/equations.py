"""The equations that docstrings hold, for the page that lists them.

A docstring of a function, method or class that computes an equation says so in a section of its own:

    Equation: HEADING
        y_t = C_t . h_t

        Source: authors and year, arXiv number, equation

        What the letters are, where it is not obvious.

There may be several sources, each on a line that begins with the word, and several sections.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

HEADINGS = (
    "Recurrence", "Convolution", "Effective attention", "Knockout", "Exchange and enrichment", "Decay", "Half-life",
    "Groups", "Attention knockout", "Ablation", "Operator diagnostics", "Measures", "Every edge", "Erasing", "Routes",
    "Circuits", "Steering", "Logit lens", "Contributions",
)  # fmt: skip
"""What equations stand under, in this order."""
SECTION = re.compile(r"^Equation:[ ]*(.*)\n((?:[ ]{4}.*\n|\n)+)", re.MULTILINE)


class Equation(NamedTuple):
    """One section of a docstring."""

    heading: str
    function: str
    """Its full name as it is imported."""
    lines: str
    sources: tuple[str, ...]
    letters: str


def collect(root: Path) -> list[Equation]:
    """Every equation of a checkout, in the order of the headings.

    Raises:
        LookupError: if a section has no source, or a heading that is not known.
    """
    found: list[Equation] = []
    for package, folder in (("mambalens.hooks", root / "hooks"), ("mambalens", root / "mambalens")):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            for name, docstring in _docstrings(ast.parse(path.read_text(encoding="utf-8")), module):
                found += read(docstring, name)
    return sorted(found, key=lambda equation: HEADINGS.index(equation.heading))


def read(docstring: str, function: str) -> list[Equation]:
    """The equations of one docstring."""
    found = []
    for section in SECTION.finditer(inspect.cleandoc(docstring) + "\n"):
        heading, (lines, *rest) = section[1], dedent(section[2]).strip().split("\n\n")
        if heading not in HEADINGS:
            raise LookupError(f"{function}: 'Equation: {heading}' is under none of {', '.join(HEADINGS)}.")
        about = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=Source:)", "\n\n".join(rest))]
        sources = tuple(part.removeprefix("Source:").strip() for part in about if part.startswith("Source:"))
        if not all(sources) or not sources:
            raise LookupError(f"{function}: an equation has no 'Source: ...' below it.")
        letters = " ".join(part for part in about if not part.startswith("Source:"))
        found.append(Equation(heading, function, lines, sources, letters))
    return found


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Full names and docstrings of the functions, methods and classes in a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield f"{name}.{child.name}", ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, f"{name}.{child.name}")
