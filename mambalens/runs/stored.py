"""A result in a folder, of whatever kind: written whole, or read from what a run has filled block by block."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
    no_checks,
    part_file,
    part_files,
    read_config,
    read_prompts,
    rows_of,
    whole_parts,
    writable_folder,
    write_facts,
    write_part,
    write_prompts,
    writing,
)
from mambalens.system.progress import tqdm

PLURAL = {"sweep": "sweeps", "flow": "flows", "patch": "patches", "trace": "traces",
          "contribution": "contributions", "logit": "logits"}  # fmt: skip
"""What several results of a kind are called."""


class Stored(NamedTuple):
    """What a folder holds of a result."""

    tables: Iterable[pd.DataFrame]
    """Rows, part by part; none where they stay in the folder."""
    skipped: pd.DataFrame
    facts: pd.DataFrame
    prompts: pd.DataFrame
    configs: list[RunConfig]
    checks: pd.DataFrame
    """How replays were held against the model."""
    unfinished: int = 0
    """Blocks of facts that are missing."""
    kept: Sequence[Path] = ()
    """Parts whose rows stay in the folder."""

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
            files: list[Path] = []
            about, before = (self.skipped, self.checks), config.exists() and read_config(folder, kind).get("blocks", 1)
            for table in self.tables:
                files.append(part_file(folder, len(files)))
                if max(len(files), before) > 1:
                    config.unlink(missing_ok=True)  # parts of two results are never read as one
                write_part(files[-1], Part(table, *about), SAVED)
                about = self.skipped[:0], no_checks()  # the first part has them all
            for left in {*(folder / PARTS).glob("*.parquet")}.difference(files):
                left.unlink()
            write_facts(folder, self.facts)
            write_prompts(folder, self.prompts)
            configs = [one.to_json() for one in self.configs]
            text = json.dumps({"configs": configs, "blocks": len(files), "definition": None}, indent=1) + "\n"
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


def rows_in(folders: Iterable[Path], kind: str) -> int:
    """Rows of the results in some folders."""
    return sum(rows_of(part_files(folder, int(read_config(folder, kind).get("blocks", 1)))) for folder in folders)


def stored_in(folder: Path, kind: str, tables: bool = True) -> Stored:
    """What one folder holds, also while a run is still filling it.

    Parts that are damaged are left out with a warning.

    Args:
        folder: the folder.
        kind: what it holds.
        tables: hold the rows of all parts; without, parts are looked through one by one, with a progress bar, and
            their rows stay there.

    Raises:
        MambalensError: if it has no finished block, or cannot be read.
    """
    about = read_config(folder, kind)
    configs = [RunConfig.from_json(one) for one in about["configs"]]
    blocks = int(about.get("blocks", 1))
    files: list[Path] = []
    parts: list[Part] = []
    there = tqdm(part_files(folder, blocks), f"load {folder.name}", unit="part", disable=tables, leave=False)
    for file, part in whole_parts(there, digest_of(about.get("definition")), not tables):
        files.append(file)
        parts.append(part if tables else part._replace(table=pd.DataFrame()))
    if not parts:
        raise MambalensError(f"The run in {str(folder)!r} has no finished block yet.")
    try:
        facts = pd.read_parquet(folder / FACTS)
    except (OSError, ValueError) as error:
        raise MambalensError(f"The facts of the run in {str(folder)!r} cannot be read ({error}).") from error
    skipped = pd.concat([part.skipped for part in parts], ignore_index=True)
    checks = below_each_other([part.checks for part in parts])
    prompts, missing = read_prompts(folder), blocks - len(parts)
    # A block of which nothing could be used has columns, but does not say what they hold.
    held = ([part.table for part in parts if len(part.table)] or [parts[0].table]) if tables else []
    return Stored(held, skipped, facts, prompts, configs, checks, missing, () if tables else files)
