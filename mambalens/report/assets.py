"""What pages share: the texts that go into each file, and numbers as the page's script reads them."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mambalens.html.modules import joined, styles
from mambalens.runs.folder import atomically, writing

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

SKIPS = 200
"""What was left out is listed up to so much."""


def write(path: str | Path, page: str) -> Path:
    """Write a page, whole or not at all."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda file: file.write_text(page, encoding="utf-8"))
    return path


@functools.cache
def texts(wiring: str, *further: str) -> dict[str, Markup]:
    """The styles of every page and further ones, and the page's script with the modules that it imports.

    Args:
        wiring: the script's file among the templates.
        further: files of styles after those of every page.
    """
    from markupsafe import Markup

    return {
        "own_styles": Markup(styles("mambalens.report", "report.css", *further)),
        "wiring": Markup(joined(wiring, "mambalens.report")),
    }


@functools.cache
def tables() -> dict[str, Markup]:
    """The libraries that draw curves and list facts."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    folder = files("itables") / "html"
    module = base64.b64encode((folder / "dt_bundle.js").read_bytes()).decode()
    return {
        "plotly": Markup(get_plotlyjs()),
        "imports": Markup(json.dumps({"imports": {"datatables": f"data:text/javascript;base64,{module}"}})),
        "table_styles": Markup((folder / "dt_bundle.css").read_text(encoding="utf-8")),
    }


def left_out(skipped: pd.DataFrame) -> dict[str, Any]:
    """What a run left out, as `left_out.html` lists it: how much, how often for which reason, and the first ones."""
    skipped = skipped.drop_duplicates()
    reasons = skipped.reason.astype(str).str.replace(r"(?<=is not in).*", " the prompt", regex=True)
    return {
        "n_skipped": len(skipped),
        "reasons": reasons.value_counts().to_dict(),
        "skipped": skipped.head(SKIPS).to_dict("records"),
    }


def packed(values: Float[np.ndarray, " ..."]) -> str:
    """Numbers as base64 of their bytes."""
    return base64.b64encode(values.tobytes()).decode()


def rounded(values: Sequence[float] | pd.Series) -> list[float | None]:
    """Numbers with the digits that a picture can show."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values, float)]


def plain(value: Any) -> Any:
    """The same without numpy's kinds of numbers, which JSON does not know."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
