"""Models by name: bundled checkpoints, local folders, GGUF files, mamba_ssm checkpoints, the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mambalens.data import checkpoints
from mambalens.hooks.errors import MambalensError, choose
from mambalens.loading.gguf import SMOLLM2, load_gguf, smollm2_folder
from mambalens.loading.mamba_ssm import TOKENIZER, WEIGHTS, is_original, load_original
from mambalens.system.hub import unreachable

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "float64")
"""What a dtype is called."""


def find_model(name: str) -> tuple[str, Path | str]:
    """A short name, and a folder, a GGUF file or a hub id.

    Raises:
        MambalensError: for a name that is no bundled checkpoint, no folder and cannot be a hub id.
    """
    bundled = checkpoints()
    if name in bundled:
        return name, bundled[name]
    if name == SMOLLM2:
        return name, smollm2_folder()
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MambalensError(f"The folder {name!r} has no config.json: it holds no model.")
        return path.resolve().name, path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MambalensError(f"The file {name!r} does not exist.")
        return path.stem, path
    if path.is_file():
        raise MambalensError(f"{name!r} is a file, and of files only .gguf can be loaded: give the folder it is in.")
    # 'gpt2' is a hub id too; a name that is nearly a bundled one is meant to be that.
    names = [*bundled, SMOLLM2]
    slip = "/" not in name and get_close_matches(name, names, n=1, cutoff=0.7)
    if slip or name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        raise MambalensError(f"{name!r} is no folder and no hub id. Bundled checkpoints: {choose(name, names)}.")
    return name.rsplit("/", 1)[-1], name


def load_model(name: str, **options: Any) -> tuple[str, Any, Any]:
    """Load a model in eval mode with its tokenizer.

    Args:
        name: bundled name, 'smollm2', local folder, .gguf file or hub id; folders and ids may hold checkpoints of
            mamba_ssm.
        options: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, attn_implementation, ...).
            `device` puts the model somewhere; `tokenizer` names another folder or hub id to take the tokenizer from.

    Returns:
        A short name, the model, the tokenizer.

    Raises:
        MambalensError: in one sentence, whatever is missing.
    """
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype not in PRECISIONS:
        raise MambalensError(f"dtype={dtype!r} is no precision: {choose(dtype, PRECISIONS)}.")
    short, place = find_model(name)
    _mute_advice()
    device = options.pop("device", None)
    if isinstance(place, Path) and place.suffix == ".gguf":
        model, tokenizer = load_gguf(place, **options)
    elif name in checkpoints() or name == SMOLLM2:
        with _quiet():  # they load in a moment
            model, tokenizer = _load(name, place, options)
    else:
        model, tokenizer = _load(name, place, options)
    return short, (model if device is None else model.to(device)).eval(), tokenizer


def _mute_advice() -> None:
    """Where there is no GPU, no advice to install kernels for one; `HookManager.backend` says what scans."""
    import torch

    if not torch.cuda.is_available():
        logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "falling back to its reference" not in record.getMessage()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def _load(name: str, place: Path | str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer_place = options.pop("tokenizer", None)
    source = {"revision": options["revision"]} if "revision" in options else {}
    local = _offline(name, [p for p in (place, tokenizer_place) if isinstance(p, str) and not Path(p).is_dir()])
    try:
        config = json.loads(_file(place, "config.json", local, **source).read_text())
        if is_original(config):
            tokenizer = _original_tokenizer(name, place, tokenizer_place, local)
            weights = _weights(place, local, **source)
            taken = {key: options[key] for key in ("dtype", "device_map") if key in options}
            return load_original(config, weights, name, **taken), tokenizer
        offline = {"local_files_only": True} if local else {}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place or place, **source, **offline)
        return AutoModelForCausalLM.from_pretrained(place, **options, **offline), tokenizer
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, MambalensError):
            raise
        raise MambalensError(_why(name, error)) from error


def _offline(name: str, ids: list[str]) -> bool:
    """Whether only what the hub's cache holds can be used; asked once, so that nothing waits for retries.

    Raises:
        MambalensError: if the hub is needed and does not answer.
    """
    if not ids:
        return True
    from huggingface_hub import try_to_load_from_cache

    reason = unreachable()
    if not reason:
        return False
    missing = [hub_id for hub_id in ids if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str)]
    if missing and (missing != [TOKENIZER] or len(ids) == 1):
        raise MambalensError(
            f"{missing[0]!r} is no folder here, and not in the hub's cache ({reason}). Give a local folder, or a "
            f"bundled checkpoint: {', '.join(checkpoints())}."
        )
    return True


def _file(place: Path | str, file: str, local: bool, **source: Any) -> Path:
    from transformers.utils import cached_file

    found = cached_file(str(place), file, local_files_only=local, **source)
    if found is None:
        raise MambalensError(f"{str(place)!r} has no {file}.")
    return Path(found)


def _weights(place: Path | str, local: bool, **source: Any) -> Path:
    """The file with the weights of a mamba_ssm checkpoint."""
    for file in WEIGHTS:
        try:
            return _file(place, file, local, **source)
        except (OSError, MambalensError):
            continue
    raise MambalensError(f"{str(place)!r} has none of {', '.join(WEIGHTS)}.")


def _original_tokenizer(name: str, place: Path | str, given: str | None, local: bool) -> Any:
    """The tokenizer of a mamba_ssm checkpoint: the one given, the folder's own, or the one they were trained with."""
    from transformers import AutoTokenizer

    own = isinstance(place, Path) and any(
        (place / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")
    )
    tried = given or (place if own else TOKENIZER)
    if isinstance(tried, str) and not Path(tried).is_dir():
        try:
            local = _offline(tried, [tried])
        except MambalensError as error:
            raise MambalensError(
                f"{name!r} is a mamba_ssm checkpoint and carries no tokenizer. {error} Or name one with "
                "tokenizer='FOLDER' (--tokenizer)."
            ) from error
    return AutoTokenizer.from_pretrained(tried, **({"local_files_only": True} if local else {}))


def _why(name: str, error: Exception) -> str:
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{name!r} could not be loaded ({first_line.strip().rstrip('.')}). Give a local folder, a hub id with a "
        f"network at hand, or a bundled checkpoint: {', '.join(checkpoints())}."
    )
