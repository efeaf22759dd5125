"""Templates filled in; what is shown is escaped there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mambalens.roles import subject_spans

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def templates() -> Environment:
    """The environment that finds and fills `templates/`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("mambalens.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A template of `templates/`, filled in."""
    return templates().get_template(template).render(**values)


def pieces(text: str, subject: str) -> list[tuple[str, str]]:
    """A text in pieces, each with what it is: 'subject' or ''.

    >>> pieces("The capital of Peru is", "Peru")
    [('The capital of ', ''), ('Peru', 'subject'), (' is', '')]
    """
    found, begin = [], 0
    for start, end in subject_spans(text, subject):
        found += [(text[begin:start], ""), (text[start:end], "subject")]
        begin = end
    return [piece for piece in [*found, (text[begin:], "")] if piece[0]]
