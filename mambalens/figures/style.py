"""What figures share: colours and markers that are told apart without colour vision, and words."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambalens.flow.data import FlowData
    from mambalens.runs.data import SweepData

# Okabe & Ito's palette, with markers so that no line depends on its colour.
STYLES: dict[str, tuple[str, str]] = {
    "subject": ("#D55E00", "o"),
    "relation": ("#0072B2", "s"),
    "last": ("#009E73", "^"),
    "first": ("#CC79A7", "D"),
    "others": ("#000000", "v"),
    "context": ("#E69F00", "P"),
    "subject_last": ("#A63603", "X"),
    "subject_first": ("#FDAE6B", "p"),
    "relation_minus_last": ("#56B4E9", "<"),
    "all": ("#666666", ">"),
    "slow": ("#542788", "o"),
    "middle": ("#1B9E77", "s"),
    "fast": ("#E08214", "^"),
    "context-dependent": ("#8073AC", "D"),
    "context-independent": ("#B35806", "v"),
}
_SPARE = ("#7F3C8D", "#11A579", "#3969AC", "#F2B701", "#E73F74", "#80BA5A")
PATH_STYLES = {"main": ("#0072B2", "o"), "conv": ("#D55E00", "s"), "erase": ("#009E73", "^")}
"""Colour and marker of an edge's path."""
PATHS = {"conv": "convolution", "erase": "erasing", "both": "all paths"}
INSTEAD = {
    "mean": "means put in (mean ablation)",
    "resample": "another prompt's values put in (resample ablation)",
    "mean+keys": "means put in, of keys too (mean ablation)",
    "resample+keys": "another prompt's keys and values put in (resample ablation)",
}
"""What stands in a source's place, where it is not nothing."""
WITHOUT_MAIN = {"shortconv"}
"""Kinds of mixers that have no main path."""


def style(role: str, index: int = 0) -> tuple[str, str]:
    """Colour and marker of a role or group of features; another label gets a spare one by its index."""
    return STYLES.get(role, (_SPARE[index % len(_SPARE)], "osD^vP"[index % 6]))


def put_in(ablation: str) -> str:
    """What stands in the place of what is cut, behind other words; '' where that is nothing."""
    return f", {INSTEAD[ablation]}" if ablation in INSTEAD else ""


def main_path(result: SweepData | FlowData) -> str:
    """What the main path is in these models: 'scan', 'attention', or 'scan or attention' ('main path' if not known)."""
    has = {kind for config in result.configs for kind in config.kinds} - WITHOUT_MAIN
    kinds = {"attention" if kind == "attention" else "scan" for kind in has}
    return " or ".join(sorted(kinds, reverse=True)) or "main path"


def visible(token: str) -> str:
    """A token as a row label: its spaces can be seen, and no mathematics is read into a dollar sign."""
    return plain(token).replace("\n", "⏎").replace(" ", "·")


def plain(text: str) -> str:
    """Text in which no mathematics is read into a dollar sign."""
    return text.replace("$", r"\$")


def lines(text: str, width: int) -> list[str]:
    """Text in as few lines of at most `width` characters as it takes, about equally long: no word is left over."""
    few = textwrap.wrap(text, width)
    while len(textwrap.wrap(text, width - 1)) == len(few) > 1:
        width -= 1
    return textwrap.wrap(text, width)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, as texts have it: '+0.40', '−2.10', '0.00'."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("−" if value < 0 else "+") + text
