"""A run's folder: what is run, and its results in parts, so that a run that was cut off goes on where it stopped.

    sweep.json            what defines the run, and what it was run with; flow.json for a flow, patch.json and
                          trace.json for patches and traces, contribution.json and logit.json for readings
    facts.parquet         the facts that were asked for
    prompts.parquet       their prompts as the model's tokenizer cuts them, for figures of single prompts
    parts/00000.parquet   one block of facts each: the table's rows, and in the file's metadata what was skipped, how
                          replays were held against the model, which run it belongs to and a digest of the rows
    locks/00000.lock      held by the process that computes the block; the system frees it when the process ends

Files are written under another name, flushed to the disk and renamed: a name that is there stands for a whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mambalens.hooks.errors import MambalensError

FACTS, PROMPTS, PARTS, LOCKS = "facts.parquet", "prompts.parquet", "parts", "locks"
SWEEP, FLOW, PATCH, TRACE = "sweep", "flow", "patch", "trace"
CONTRIBUTION, LOGIT = "contribution", "logit"
"""Kinds of runs that a folder holds: `sweep.json`, `flow.json`, ... says what was run."""
KINDS = (SWEEP, FLOW, PATCH, TRACE, CONTRIBUTION, LOGIT)
SAVED = "saved"
"""Stands for the run of a result that was saved, not filled block by block."""
_KEY = b"mambalens"
SKIPPED = ("fact_id", "source", "reason")
PROMPT = ("model", "fact_id", "tokens", "subject")
"""Columns of the prompts: the tokens' texts, and the subject's positions."""
CHECKS = ("model", "prompts", "tokens", "difference", "noise", "passed")
"""Columns of how replays were held against the model, one row a replay: its prompts, tokens of the longest, how far it
is from the model's own pass (root mean square over the vocabulary of the difference of log-probabilities, in nats), how
far the model is from itself for rounding alone, and whether the first is small enough for the second."""


class Part(NamedTuple):
    """What is found of one block of facts."""

    table: pd.DataFrame
    skipped: pd.DataFrame
    """What was left out; columns in `SKIPPED`."""
    checks: pd.DataFrame
    """How replays were held against the model; columns in `CHECKS`, no row where none was tried."""


def no_checks() -> pd.DataFrame:
    """Of results without a replay, and of older releases."""
    return pd.DataFrame(columns=list(CHECKS))


def below_each_other(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other; those without rows do not say what the columns hold."""
    return pd.concat([table for table in tables if len(table)] or list(tables[:1]), ignore_index=True)


def joined(parts: Sequence[Part]) -> Part:
    """Parts one behind the other."""
    tables, skipped, checks = zip(*parts, strict=True)
    return Part(below_each_other(tables), pd.concat(skipped, ignore_index=True), below_each_other(checks))


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made if need be.
        definition: everything that the numbers depend on, as JSON.
        about: what else is worth keeping (configs, versions, blocks).
        facts: the facts that were asked for.
        prompts: their prompts, with the columns of `PROMPT`.
        kind: what kind of run it is; one of `KINDS`.

    Raises:
        MambalensError: if the folder cannot be written, or holds another run, of this kind or another.
    """

    def __init__(
        self,
        path: str | Path,
        definition: dict[str, Any],
        about: dict[str, Any],
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        kind: str = SWEEP,
    ) -> None:
        config = config_of(Path(path), kind)
        self.path, self.definition = Path(path), json.loads(json.dumps(definition))
        self.digest = digest_of(self.definition)
        self._whole: set[int] = set()
        with writing(self.path):
            for folder in (PARTS, LOCKS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            with self.claim("run", wait=True):
                check_kind(self.path, kind)
                if config.exists():
                    self._compare(read_config(self.path, kind))
                if not (self.path / PROMPTS).exists():
                    write_prompts(self.path, prompts)
                if config.exists():
                    return
                write_facts(self.path, facts)
                text = json.dumps(about | {"definition": self.definition}, indent=1) + "\n"
                atomically(config, lambda file: file.write_text(text))

    def _compare(self, there: dict[str, Any]) -> None:
        if there.get("definition") is None:
            raise MambalensError(f"{str(self.path)!r} holds a saved result, which is no run: choose another folder.")
        old, new = there["definition"], self.definition
        different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if different:
            shown = "; ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in different)
            raise MambalensError(
                f"{str(self.path)!r} holds another run ({shown}): choose another folder, or ask for the same again."
            )

    @contextmanager
    def claim(self, block: int | str, wait: bool = False) -> Iterator[bool]:
        """Hold a block while the `with` runs; gives False where somebody else holds it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCKS / f"{_name(block)}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def finished(self, block: int) -> bool:
        """Whether a block's part is there and whole; what is not is set aside, with a warning."""
        path = part_file(self.path, block)
        if block in self._whole:
            return True
        if not path.exists():
            return False
        try:
            read_part(path, self.digest)
        except BrokenPart as error:
            aside = path.with_suffix(f".broken-{os.urandom(4).hex()}")
            with writing(self.path):
                path.rename(aside)
            warnings.warn(f"{path.name} {error}; it is set aside as {aside.name} and computed again.", stacklevel=2)
            return False
        self._whole.add(block)
        return True

    def write(self, block: int, part: Part) -> None:
        """Keep a block's result."""
        with writing(self.path):
            write_part(part_file(self.path, block), part, self.digest)
        self._whole.add(block)


def digest_of(definition: dict[str, Any] | None) -> str:
    """What a run's parts carry to say whose they are."""
    if definition is None:
        return SAVED
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


class Interrupts:
    """While the `with` runs, Ctrl-C waits for `look`, so that a part nearly done is kept; twice, it does not wait."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self.ours = threading.current_thread() is threading.main_thread()  # only there can signals be heard
        if self.ours:
            self.before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, self.before)

    def _hear(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nFinishing the current block of facts; Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    def look(self) -> None:
        """Stop here if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt


def check_kind(folder: Path, kind: str) -> None:
    """Keep results of different kinds apart: their parts have the same names.

    Raises:
        MambalensError: if a folder holds a result of another kind.
    """
    for other in KINDS:
        if other != kind and config_of(folder, other).exists():
            raise MambalensError(
                f"{str(folder)!r} holds a {other} ({other}.json): a {kind} is not written over it, choose another "
                "folder."
            )


def writable_folder(folder: str | Path, kind: str | None = None) -> Path:
    """The folder, made if need be; asked for before long work starts.

    Args:
        folder: the folder.
        kind: the kind of result that is to be kept there, if any.

    Raises:
        MambalensError: if it cannot be made or written to, or holds a result of another kind.
    """
    folder = Path(folder)
    if kind is not None:
        check_kind(folder, kind)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".probe.{os.getpid()}").touch()
        (folder / f".probe.{os.getpid()}").unlink()
    return folder


def write_facts(path: Path, facts: pd.DataFrame) -> None:
    """Keep the facts; a further column that mixes kinds of values, as JSON may, is kept as text."""

    def plain(column: pd.Series) -> pd.Series:
        try:
            pa.array(column, from_pandas=True)
            return column
        except pa.ArrowException:
            return column.map(lambda value: value if isinstance(value, str) else json.dumps(value, default=str))

    atomically(path / FACTS, lambda file: facts.apply(plain).to_parquet(file, index=False))


def write_prompts(path: Path, prompts: pd.DataFrame) -> None:
    """Keep the prompts' tokens."""
    atomically(path / PROMPTS, lambda file: prompts.to_parquet(file, index=False))


def read_prompts(path: Path) -> pd.DataFrame:
    """The prompts' tokens; none where the folder is older than this file."""
    if not (path / PROMPTS).exists():
        return pd.DataFrame(columns=list(PROMPT))
    try:
        return pd.read_parquet(path / PROMPTS)
    except (OSError, ValueError) as error:
        raise MambalensError(f"The prompts of the run in {str(path)!r} cannot be read ({error}).") from error


class BrokenPart(Exception):
    """A part that is cut off, altered, or of another run; the message says which."""


def write_part(path: Path, part: Part, run: str) -> None:
    """Write one part."""
    arrow = pa.Table.from_pandas(part.table, preserve_index=False)
    digest = _digest(arrow.to_pandas())
    about = {"run": run, "rows": len(part.table), "sha256": digest}
    about |= {"skipped": part.skipped.to_numpy().tolist(), "checks": part.checks.astype(object).to_numpy().tolist()}
    arrow = arrow.replace_schema_metadata((arrow.schema.metadata or {}) | {_KEY: json.dumps(about).encode()})
    atomically(path, lambda file: pq.write_table(arrow, file))


def read_part(path: Path, run: str, categories: bool = False) -> Part:
    """One part; without checks where an older release wrote it.

    Args:
        path: the part's file.
        run: the run that it belongs to; see `digest_of`.
        categories: texts as categories, which are read and looked through sooner.

    Raises:
        BrokenPart: if the part is not whole, or not of this run.
    """
    try:
        file = pq.ParquetFile(path, read_dictionary=texts_of(pq.read_schema(path)) if categories else None)
        arrow = file.read()
        about = json.loads((arrow.schema.metadata or {})[_KEY])
        table = arrow.to_pandas()
        skipped = pd.DataFrame(about["skipped"], columns=list(SKIPPED))
        checks = pd.DataFrame(about.get("checks", []), columns=list(CHECKS))
        belongs, whole = about["run"] == run, about["sha256"] == _digest(table)
    except Exception as error:  # a damaged file may raise anything
        raise BrokenPart(f"cannot be read ({type(error).__name__})") from error
    if not belongs:
        raise BrokenPart("belongs to another run")
    if not whole:
        raise BrokenPart("is damaged (its digest differs)")
    return Part(table, skipped, checks)


def texts_of(schema: pa.Schema) -> list[str]:
    """Columns of texts."""
    return [
        column.name for column in schema if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ]


def part_file(path: Path, block: int) -> Path:
    """Where a block's part is, or will be."""
    return path / PARTS / f"{_name(block)}.parquet"


def part_files(path: Path, blocks: int) -> list[Path]:
    """The parts of a run that are there, in order."""
    files = [part_file(path, block) for block in range(blocks)]
    return [file for file in files if file.exists()]


def rows_of(files: Iterable[Path]) -> int:
    """Rows that some parts have, as far as they can be read."""
    count = 0
    for file in files:
        with suppress(OSError, ValueError, pa.ArrowException):
            count += pq.read_metadata(file).num_rows
    return count


def whole_parts(files: Iterable[Path], run: str, categories: bool = False) -> Iterator[tuple[Path, Part]]:
    """The parts of a run that are whole, one by one; those that are not are left out with a warning."""
    for file in files:
        try:
            yield file, read_part(file, run, categories)
        except BrokenPart as error:
            warnings.warn(f"{str(file)!r} {error} and is left out.", stacklevel=3)


def config_of(path: Path, kind: str = SWEEP) -> Path:
    """The file of a folder that says what was run."""
    return path / f"{kind}.json"


def read_config(path: Path, kind: str = SWEEP) -> dict[str, Any]:
    """What was run: sweep.json, flow.json, ..."""
    try:
        found = json.loads(config_of(path, kind).read_text())
        if not isinstance(found, dict) or "configs" not in found:
            raise ValueError("it has no configs")
        return found
    except (OSError, ValueError) as error:
        raise MambalensError(f"The {kind} in {str(path)!r} cannot be read ({error}).") from error


def is_run(path: Path, kind: str = SWEEP) -> bool:
    """Whether a folder holds a run of its own, and not a saved result or something that cannot be read."""
    try:
        return read_config(path, kind).get("definition") is not None
    except MambalensError:
        return False


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, flush it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence why a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise MambalensError(
            f"The result could not be written to {str(path)!r} ({error.strerror or error}). What was finished is kept."
        ) from error


def _digest(table: pd.DataFrame) -> str:
    """Of the values, whatever file they came from."""
    values = pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()
    return hashlib.sha256(json.dumps(list(table.columns)).encode() + values).hexdigest()


def _name(block: int | str) -> str:
    return block if isinstance(block, str) else f"{block:05d}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
