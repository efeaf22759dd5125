"""Shapes in signatures are checked while the tests run, unless MAMBALENS_SHAPES=unchecked (they cost time)."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

# What a user hands over is checked by these two themselves, in sentences.
FIRST_TO_HEAR = ("manager", "knockout")
HOOKS = [path.stem for path in (Path(__file__).parent.parent / "hooks").glob("[a-z]*.py")]

if os.environ.get("MAMBALENS_SHAPES") != "unchecked":
    install_import_hook(
        [
            *(f"mambalens.hooks.{name}" for name in HOOKS if name not in FIRST_TO_HEAR),
            *(
                f"mambalens.{name}"
                for name in (
                    "features",
                    "flow.attribution",
                    "flow.measures",
                    "sweep.replay",
                    "sweep.prediction",
                    "runs.intervals",
                    "figures.tokens",
                    "report.page",
                )
            ),
        ],
        "beartype.beartype",
    )
