"""Shapes in signatures are checked while the tests run, unless MAMBALENS_SHAPES=unchecked (they cost time); a browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# What a user hands over is checked by these two themselves, in sentences.
FIRST_TO_HEAR = ("manager", "knockout", "steering")
# Their methods give the class they are called on, which beartype knows only where it has the whole class.
GIVE_THEMSELVES = ("data", "verbs", "contribution_data", "lens_data", "kept_data")
ROOT = Path(__file__).parent.parent
HOOKS = [path.stem for path in (ROOT / "hooks").glob("[a-z]*.py")]
FLOW = [f"flow.{path.stem}" for path in (ROOT / "mambalens" / "flow").glob("[a-z]*.py")
        if path.stem not in GIVE_THEMSELVES]  # fmt: skip

INTERVENTIONS = [f"interventions.{path.stem}" for path in (ROOT / "mambalens" / "interventions").glob("[a-z]*.py")
                 if path.stem not in GIVE_THEMSELVES]  # fmt: skip

if os.environ.get("MAMBALENS_SHAPES") != "unchecked":
    import shapes

    shapes.install(
        [
            *(f"mambalens.hooks.{name}" for name in HOOKS if name not in FIRST_TO_HEAR),
            *(
                f"mambalens.{name}"
                for name in (
                    "features",
                    "measures",
                    *FLOW,
                    *INTERVENTIONS,
                    "sweep.replay",
                    "sweep.prediction",
                    "runs.intervals",
                    "runs.rows",
                    "figures.flow_pieces",
                    "figures.tokens",
                    "report.assets",
                    "report.page",
                )
            ),
        ]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's cases of one architecture stand together: the worker that has made a model and what it gives has them all."""
    first: dict[tuple[Path, str], int] = {}
    order = []
    for number, item in enumerate(items):
        named = getattr(item, "callspec", None)
        of_model = str(named.params.get("model_type", "")) if named is not None else ""
        file = first.setdefault((item.path, "file"), number)
        order.append((file, first.setdefault((item.path, of_model), number) if of_model else file, number))
    items[:] = [items[number] for *_, number in sorted(order)]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield opened
        opened.close()
