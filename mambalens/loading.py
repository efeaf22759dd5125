"""Models by name: bundled checkpoints, local folders, the Hugging Face hub."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mambalens.data import checkpoints
from mambalens.hooks.errors import MambalensError, choose


def find_model(name: str) -> tuple[str, Path | str]:
    """A short name and what `from_pretrained` is to be given.

    Raises:
        MambalensError: for a name that is no bundled checkpoint, no folder and cannot be a hub id.
    """
    bundled = checkpoints()
    if name in bundled:
        return name, bundled[name]
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MambalensError(f"The folder {name!r} has no config.json: it is not a Hugging Face model.")
        return path.resolve().name, path
    if path.is_file():
        raise MambalensError(f"{name!r} is a file, and only folders can be loaded: give the folder it is in.")
    # 'gpt2' is a hub id too; a name that is nearly a bundled one is meant to be that.
    slip = "/" not in name and get_close_matches(name, bundled, n=1, cutoff=0.7)
    if slip or name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        raise MambalensError(f"{name!r} is no folder and no hub id. Bundled checkpoints: {choose(name, bundled)}.")
    return name.rsplit("/", 1)[-1], name


def load_model(name: str, **options: Any) -> tuple[str, Any, Any]:
    """Load a model in eval mode with its tokenizer.

    Args:
        name: bundled name, local folder or hub id.
        options: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, attn_implementation, ...).
            `tokenizer` names another folder or hub id to take the tokenizer from.

    Returns:
        A short name, the model, the tokenizer.
    """
    short, place = find_model(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer_place = options.pop("tokenizer", place)
    revision = {"revision": options["revision"]} if "revision" in options else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place, **revision)
        model = AutoModelForCausalLM.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MambalensError(
            f"{name!r} could not be loaded ({first_line.strip().rstrip('.')}). Give a local folder, a hub id with a "
            f"network at hand, or a bundled checkpoint: {', '.join(checkpoints())}."
        ) from error
    return short, model.eval(), tokenizer
