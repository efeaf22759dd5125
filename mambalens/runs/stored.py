"""A result in a folder, of whatever kind: written whole, or read from what a run has filled block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from mambalens.hooks.errors import MambalensError
from mambalens.runs.config import RunConfig
from mambalens.runs.folder import (
    FACTS,
    KINDS,
    PARTS,
    SAVED,
    Part,
    atomically,
    below_each_other,
    config_of,
    digest_of,
    is_run,
    read_config,
    read_parts,
    read_prompts,
    writable_folder,
    write_facts,
    write_part,
    write_prompts,
    writing,
)

PLURAL = {"sweep": "sweeps", "flow": "flows", "patch": "patches", "trace": "traces"}
"""What several results of a kind are called."""


class Stored(NamedTuple):
    """What a folder holds of a result."""

    tables: list[pd.DataFrame]
    """Rows, part by part."""
    skipped: pd.DataFrame
    facts: pd.DataFrame
    prompts: pd.DataFrame
    configs: list[RunConfig]
    checks: pd.DataFrame
    """How replays were held against the model."""
    unfinished: int = 0
    """Blocks of facts that are missing."""

    def save(self, folder: str | Path, kind: str) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own or a result of another kind.
        """
        folder = writable_folder(folder, kind)
        config = config_of(folder, kind)
        if config.exists() and is_run(folder, kind):
            raise MambalensError(
                f"{str(folder)!r} holds a run: a result is not written over it, choose another folder."
            )
        with writing(folder):
            (folder / PARTS).mkdir(exist_ok=True)
            part = Part(pd.concat(self.tables, ignore_index=True), self.skipped, self.checks)
            write_part(folder / PARTS / "00000.parquet", part, SAVED)
            write_facts(folder, self.facts)
            write_prompts(folder, self.prompts)
            configs = [one.to_json() for one in self.configs]
            text = json.dumps({"configs": configs, "blocks": 1, "definition": None}, indent=1) + "\n"
            atomically(config, lambda file: file.write_text(text))
        return folder


def kind_of(folder: str | Path) -> str:
    """Which kind of result a folder holds, or folders in it do; one of `folder.KINDS`.

    Raises:
        MambalensError: if there is none, or several kinds are there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MambalensError(f"The folder {str(folder)!r} does not exist.")
    names = {kind: config_of(folder, kind).name for kind in KINDS}
    found = [kind for kind in KINDS if (folder / names[kind]).is_file()]
    found = found or [kind for kind in KINDS if next(folder.rglob(names[kind]), None) is not None]
    if not found:
        raise MambalensError(
            f"The folder {str(folder)!r} holds no {', '.join(KINDS[:-1])} or {KINDS[-1]} (no "
            f"{', no '.join(names.values())})."
        )
    if len(found) > 1:
        held = " and ".join(PLURAL[kind] for kind in found)
        raise MambalensError(f"The folder {str(folder)!r} holds {held}: name a folder of one kind.")
    return found[0]


def folders_of(folder: str | Path, kind: str) -> list[Path]:
    """The folder itself if it holds a result of this kind, else those in it that do.

    Raises:
        MambalensError: if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MambalensError(f"The folder {str(folder)!r} does not exist.")
    name = config_of(folder, kind).name
    if (folder / name).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.rglob(name))
    if not found:
        raise MambalensError(f"The folder {str(folder)!r} holds no {kind} (no {name}).")
    return found


def stored_in(folder: Path, kind: str) -> Stored:
    """What one folder holds, also while a run is still filling it.

    Parts that are damaged are left out with a warning.

    Raises:
        MambalensError: if it has no finished block, or cannot be read.
    """
    about = read_config(folder, kind)
    configs = [RunConfig.from_json(one) for one in about["configs"]]
    parts, missing = read_parts(folder, digest_of(about.get("definition")), int(about.get("blocks", 1)))
    if not parts:
        raise MambalensError(f"The run in {str(folder)!r} has no finished block yet.")
    try:
        facts = pd.read_parquet(folder / FACTS)
    except (OSError, ValueError) as error:
        raise MambalensError(f"The facts of the run in {str(folder)!r} cannot be read ({error}).") from error
    skipped = pd.concat([part.skipped for part in parts], ignore_index=True)
    checks = below_each_other([part.checks for part in parts])
    # A block of which nothing could be used has columns, but does not say what they hold.
    tables = [part.table for part in parts if len(part.table)] or [parts[0].table]
    return Stored(tables, skipped, facts, read_prompts(folder), configs, checks, missing)
