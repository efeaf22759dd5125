"""Shapes in signatures are checked while the tests run."""

from pathlib import Path

from jaxtyping import install_import_hook

# What a user hands over is checked by these two themselves, in sentences.
FIRST_TO_HEAR = ("manager", "knockout")
HOOKS = [path.stem for path in (Path(__file__).parent.parent / "hooks").glob("[a-z]*.py")]

install_import_hook(
    [*(f"mambalens.hooks.{name}" for name in HOOKS if name not in FIRST_TO_HEAR), "mambalens.features"],
    "beartype.beartype",
)
