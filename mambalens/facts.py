"""Facts: what they are, and the files they come from."""

from __future__ import annotations

import csv
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from mambalens.data import ATLAS_FACTS
from mambalens.hooks.errors import MambalensError, choose

if TYPE_CHECKING:
    import pandas as pd

BUNDLED = {"atlas": ATLAS_FACTS}
ELSEWHERE = ("counterfact", "known_1000")
"""Names of data sets that are not shipped: they are fetched, once."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ALIASES = {"attribute": "target", "relation_id": "relation", "known_id": "id"}
"""Field names of ROME's known_1000 (Meng et al. 2022), and ours."""


@dataclass(frozen=True)
class Fact:
    """A prompt and the continuation that the model should know."""

    prompt: str
    """Text that ends right before the target."""
    subject: str
    """What the fact is about, as it is spelled in the prompt."""
    target: str
    """The continuation; its first token is what is scored. Where a letter or digit would follow the prompt directly, a
    space is put between (`continuation`)."""
    relation: str | None = None
    id: str | None = None

    def _repr_html_(self) -> str:
        from mambalens.pages.notebook import fact_html

        return fact_html(self)

    @property
    def continuation(self) -> str:
        """The target as it follows the prompt.

        >>> Fact("The capital of Peru is", "Peru", "Lima").continuation
        ' Lima'
        """
        first = self.target[:1]
        spaced = first.isalnum() and unicodedata.east_asian_width(first) not in "WF"
        return " " + self.target if spaced and not self.prompt[-1:].isspace() else self.target


class Answered(NamedTuple):
    """How a model did on the facts that some were chosen from, because it answers them right."""

    model: str
    asked: int
    right: int
    unusable: tuple[tuple[str, str], ...] = ()
    """Facts that the model could not be asked, and why."""


class Facts(Sequence[Fact]):
    """A sequence of facts, with the further columns of the file they came from.

    `facts[3]` is a Fact, `facts[:10]` and `facts.where(relation="capital")` are Facts again.
    """

    def __init__(self, facts: Iterable[Fact], extra: Sequence[dict[str, Any]] | None = None, name: str = "") -> None:
        self._facts = [
            fact if fact.id is not None else Fact(fact.prompt, fact.subject, fact.target, fact.relation, str(i))
            for i, fact in enumerate(facts)
        ]
        self.extra = list(extra) if extra is not None else [{} for _ in self._facts]
        """Further columns of the file, one dict a fact."""
        self.name = name
        self.answered: tuple[Answered, ...] = ()
        """How models did on the facts that these were chosen from (`Lens.known`), in the order they were asked."""
        seen: set[str | None] = set()
        for fact in self._facts:
            if fact.id in seen:
                raise MambalensError(f"The fact id {fact.id!r} occurs twice: ids must differ, or be left out.")
            seen.add(fact.id)

    def __len__(self) -> int:
        return len(self._facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> Facts: ...
    def __getitem__(self, index: int | slice) -> Fact | Facts:
        if isinstance(index, slice):
            return self.pick(range(len(self))[index])
        return self._facts[index]

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts)

    def __repr__(self) -> str:
        return f"<{len(self)} facts{f' of {self.name}' if self.name else ''}>"

    def _repr_html_(self) -> str:
        from mambalens.pages.notebook import facts_html

        return facts_html(self)

    def pick(self, indices: Iterable[int]) -> Facts:
        """The facts at these indices, in the order given."""
        indices = list(indices)
        picked = Facts([self._facts[i] for i in indices], [self.extra[i] for i in indices], self.name)
        picked.answered = self.answered
        return picked

    def answered_by(self, answered: Answered) -> Facts:
        """The same facts, with a note that a model was asked and these were chosen by its answers."""
        noted = self.pick(range(len(self)))
        noted.answered = (*self.answered, answered)
        return noted

    @property
    def table(self) -> pd.DataFrame:
        """One row a fact: fact_id, prompt, subject, target, relation, and the file's further columns."""
        import pandas as pd

        columns = ["fact_id", "prompt", "subject", "target", "relation"]
        core = [(fact.id, fact.prompt, fact.subject, fact.target, fact.relation) for fact in self._facts]
        table = pd.DataFrame(core, columns=columns)
        extra = pd.DataFrame(self.extra, index=table.index)
        return pd.concat([table, extra], axis=1) if len(extra.columns) else table

    def where(self, **values: Any) -> Facts:
        """The facts whose columns have these values; a list means any of them.

        Raises:
            MambalensError: for a column that the facts do not have.
        """
        table = self.table
        keep = [True] * len(self)
        for column, value in values.items():
            if column not in table.columns:
                raise MambalensError(f"The facts have no column {column!r}: {choose(column, table.columns)}.")
            allowed = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            keep = [k and str(v) in allowed for k, v in zip(keep, table[column], strict=True)]
        return self.pick(i for i, k in enumerate(keep) if k)

    def sample(self, n: int, seed: int = 0) -> Facts:
        """At most n facts drawn at random, in their old order."""
        return self.pick(sorted(random.Random(seed).sample(range(len(self)), min(n, len(self)))))


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
        from mambalens.fetching import fetched

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
