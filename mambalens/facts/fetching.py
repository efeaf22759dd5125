"""Data sets of facts that are not shipped: fetched once into the user's cache, checked by their digest ever after."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mambalens.hooks.errors import MambalensError
from mambalens.system.hub import PATIENCE, unreachable


class Source(NamedTuple):
    """Where a data set comes from."""

    what: str
    """What a user may give the path of instead."""
    file: str
    """Its name in the cache."""
    fetch: Callable[[Path], None]
    """Writes it to a path."""


def fetched(name: str) -> Path:
    """The file of a data set in the cache.

    Its SHA-256 is noted when it is fetched and compared whenever it is used.

    Raises:
        MambalensError: if it cannot be fetched, or is not what was fetched.
    """
    from platformdirs import user_cache_path

    source = SOURCES[name]
    path = user_cache_path("mambalens") / "facts" / source.file
    digest = path.with_name(path.name + ".sha256")
    if path.is_file() and digest.is_file():
        if sha256(path) != digest.read_text().strip():
            raise MambalensError(
                f"{str(path)!r} is not what was fetched (its SHA-256 differs): delete it to fetch it again."
            )
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.fetch(temporary)
            digest.write_text(sha256(temporary) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except MambalensError:
        raise
    except Exception as error:  # the network's and the hub's errors are of many classes
        raise MambalensError(
            _cannot(name, str(error).strip().splitlines()[0] if str(error) else repr(error))
        ) from error
    return path


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot(name: str, reason: str) -> str:
    return f"{name!r} could not be fetched ({reason}): give the path of {SOURCES[name].what}."


def _counterfact(path: Path) -> None:
    """CounterFact as used for tracing; the hub's own digest of the file is checked on the way."""
    from huggingface_hub import HfApi, hf_hub_download

    reason = unreachable()
    if reason:
        raise MambalensError(_cannot("counterfact", reason))
    files = HfApi().list_repo_tree(COUNTERFACT, repo_type="dataset", recursive=True)
    entry = next(file for file in files if str(file.path).endswith(".parquet"))
    got = Path(hf_hub_download(COUNTERFACT, entry.path, repo_type="dataset"))
    expected = getattr(getattr(entry, "lfs", None), "sha256", None)
    if expected is not None and sha256(got) != expected:
        raise MambalensError(_cannot("counterfact", "what arrived has another SHA-256 than the hub says"))
    path.write_bytes(got.read_bytes())


def _known_1000(path: Path) -> None:
    try:
        with urllib.request.urlopen(KNOWN_1000, timeout=PATIENCE) as answer:
            path.write_bytes(answer.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise MambalensError(_cannot("known_1000", str(getattr(error, "reason", error)))) from error


COUNTERFACT = "NeelNanda/counterfact-tracing"
KNOWN_1000 = "https://rome.baulab.info/data/dsets/known_1000.json"
SOURCES = {
    "counterfact": Source(
        f"a copy: ROME's counterfact.json, or a parquet file of {COUNTERFACT}", "counterfact.parquet", _counterfact
    ),
    "known_1000": Source("ROME's known_1000.json", "known_1000.json", _known_1000),
}
