"""Templates filled in; what is shown is escaped there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def templates() -> Environment:
    """The environment that finds and fills the templates of notebooks and of the report."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    homes = [PackageLoader(f"mambalens.{package}") for package in ("html", "report")]
    return Environment(
        loader=ChoiceLoader(homes), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def render(template: str, **values: Any) -> str:
    """A template, filled in."""
    return templates().get_template(template).render(**values)
