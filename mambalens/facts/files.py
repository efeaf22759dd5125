"""The files and data sets that facts come from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mambalens.data import ATLAS_FACTS
from mambalens.facts.fact import Fact
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError, choose

BUNDLED = {"atlas": ATLAS_FACTS}
ELSEWHERE = ("counterfact", "known_1000")
"""Names of data sets that are not shipped: they are fetched, once."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ALIASES = {"attribute": "target", "relation_id": "relation", "known_id": "id"}
"""Field names of ROME's known_1000 (Meng et al. 2022), and ours."""


def as_facts(facts: Fact | Iterable[Fact] | str | Path) -> Facts:
    """Facts from anything that a user may hand over: one, several, a name or a path."""
    if isinstance(facts, Facts):
        return facts
    if isinstance(facts, Fact):
        return Facts([facts])
    return load_facts(facts) if isinstance(facts, str | Path) else Facts(facts)


def load_facts(name: str | Path) -> Facts:
    """Load facts by name or from a file.

    Args:
        name: "atlas" (bundled), "counterfact" or "known_1000" (fetched once), or a .jsonl, .json, .csv or .parquet file
            whose records have prompt, subject and target, and perhaps relation, id and anything else. ROME's
            known_1000.json and counterfact.json and the hub's counterfact-tracing are read too.

    Raises:
        MambalensError: for an unknown name (with the near matches), or a broken record (with file and line).
    """
    path = BUNDLED.get(str(name), Path(name))
    if str(name) in ELSEWHERE and not path.exists():
        from mambalens.facts.fetching import fetched

        path = fetched(str(name))
    if path.suffix not in SUFFIXES:
        known = [*BUNDLED, *ELSEWHERE]
        raise MambalensError(
            f"{str(name)!r} is no facts file ({', '.join(SUFFIXES)}) and no name of facts: {choose(name, known)}."
        )
    if not path.is_file():
        raise MambalensError(f"The facts file {str(path)!r} does not exist.")
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix]
    facts, extra = [], []
    for place, record in read(path):
        fact, rest = _fact(record, place)
        facts.append(fact)
        extra.append(rest)
    if not facts:
        raise MambalensError(f"The facts file {str(path)!r} has no facts in it.")
    return Facts(facts, extra, path.stem)


def _fact(record: Any, place: str) -> tuple[Fact, dict[str, Any]]:
    """A record of a file as a fact and its further columns."""
    if not isinstance(record, dict):
        raise MambalensError(f"{place}: expected an object with prompt, subject and target, found {record!r:.80}.")
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise MambalensError(f"{place}: {error.object[error.start]!r} in a text is no character.") from None
    except RecursionError:
        raise MambalensError(f"{place}: nested too deeply.") from None
    record = _in_our_words(dict(record), place)
    has = ", ".join(map(str, record)) or "none"
    core: dict[str, str] = {}
    for name in ("prompt", "subject", "target"):
        value = record.pop(name, None)
        if value is None:
            raise MambalensError(f"{place}: the field {name!r} is missing; it has {has}.")
        if not str(value).strip():
            raise MambalensError(f"{place}: the field {name!r} is empty.")
        core[name] = str(value)
    relation, id_ = record.pop("relation", None), record.pop("id", record.pop("fact_id", None))
    return Fact(**core, relation=_text(relation), id=_text(id_)), record


def _in_our_words(record: dict[str, Any], place: str) -> dict[str, Any]:
    """ROME's two formats and the hub's counterfact-tracing with our names of the fields."""
    if "attribute" in record and "target" not in record:  # known_1000 (Meng et al. 2022)
        return {_ALIASES.get(key, key): value for key, value in record.items()}
    rewrite = record.pop("requested_rewrite", None)
    if isinstance(rewrite, dict):  # counterfact.json
        try:
            template, subject = str(rewrite["prompt"]), str(rewrite["subject"])
            target, other = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        except (KeyError, TypeError) as error:
            raise MambalensError(f"{place}: requested_rewrite lacks {error}.") from None
        kept = {"template": template, "target_false": other}
        core = {"prompt": template.replace("{}", subject), "subject": subject, "target": target}
        return core | {"relation": rewrite.get("relation_id"), "id": record.get("case_id")} | kept
    if "target_true" in record and "target" not in record:  # counterfact-tracing
        record["target"] = record.pop("target_true")
        if "relation_id" in record:
            record["template"] = record.pop("relation", None)
            record["relation"] = record.pop("relation_id")
    return record


def _text(value: Any) -> str | None:
    return None if value is None or value != value or value == "" else str(value)


Records = Iterator[tuple[str, Any]]


def _read_jsonl(path: Path) -> Records:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"{path}, line {number}", _json(line, path, number)


def _read_json(path: Path) -> Records:
    records = _json("\n".join(_lines(path)), path, 1)
    if not isinstance(records, list):
        raise MambalensError(f"{path}: expected a list of objects, found {type(records).__name__}.")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise MambalensError(f"{path}, line {line}, column {error.colno}: not JSON ({error.msg}).") from None
    except RecursionError:
        raise MambalensError(f"{path}, line {first_line}: nested too deeply.") from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise MambalensError(f"{path}, line {line}: not UTF-8 ({error.reason}).") from None


def _read_csv(path: Path) -> Records:
    reader = csv.DictReader((line + "\n" for line in _lines(path)), restkey="", strict=True)
    try:
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if "" in record:
                raise MambalensError(f"{place}: more fields than the {len(reader.fieldnames or [])} columns.")
            if any(value is None for value in record.values()):
                raise MambalensError(f"{place}: fewer fields than the {len(reader.fieldnames or [])} columns.")
            yield place, record
    except csv.Error as error:
        raise MambalensError(f"{path}, line {reader.line_num}: not CSV ({error}).") from None


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise MambalensError(f"{path}: not a parquet file ({str(error).splitlines()[0]}).") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, row {number}", record
