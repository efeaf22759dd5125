"""The Atlas: facts the project wrote down itself, and four small language models trained on them."""

from __future__ import annotations

from pathlib import Path

ATLAS_FACTS = Path(__file__).with_name("atlas.csv")
CHECKPOINTS = Path(__file__).with_name("checkpoints")


def checkpoints() -> dict[str, Path]:
    """Folders of the bundled checkpoints by name, each an ordinary Hugging Face model folder."""
    return {folder.name: folder for folder in sorted(CHECKPOINTS.glob("*")) if (folder / "config.json").is_file()}
