"""Makes docstrings, which are plain text first, safe as Markdown.

`[T] [batch, T]` is no link, `>>>` no quotation, and the lines of an equation are not run together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
EQUATION = re.compile(r"^Equation: .*\n((?:    .+\n?)+)", re.MULTILINE)
"""The head of a section, and the lines of the equation, which end at an empty one."""


def as_markdown(text: str) -> str:
    """A docstring whose brackets stay brackets and whose examples are code."""
    lines: list[str] = []
    example = False
    text = EQUATION.sub(lambda found: f"Equation:\n    ```text\n{found[1].rstrip()}\n    ```\n", text)
    text = text.replace("\n    Source: ", "\n\n    Source: ")
    for line in text.split("\n"):
        begins = line.lstrip().startswith(">>>")
        if begins and not example:
            lines += ["", f"{_indent(line)}```pycon"]
        if example and not line.strip():
            lines.append(f"{_indent(lines[-1])}```")
            example = False
        example = example or begins
        lines.append(line if example else _escaped(line))
    return "\n".join([*lines, f"{_indent(lines[-1])}```"] if example else lines)


def _escaped(line: str) -> str:
    pieces = CODE.split(line)
    return "".join(piece if piece.startswith("`") else piece.replace("] [", "] \\[") for piece in pieces)


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
