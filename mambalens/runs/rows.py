"""Rows of a sweep's table: held in memory, or left in their folder and read column by column when asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from mambalens.hooks.errors import MambalensError
from mambalens.runs.folder import texts_of
from mambalens.runs.table import columns_of, missing_column, with_all_columns
from mambalens.system.progress import tqdm

Key = TypeVar("Key", bound=tuple[Any, ...])
HELD = 2_000_000
"""Rows of a folder that are held in memory at most; more stay in their parts, and only columns of them are read."""


class Held(NamedTuple):
    """Rows in memory."""

    table: pd.DataFrame

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self.table.columns]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.table)

    def take(self, names: Sequence[str]) -> pd.DataFrame:
        """Some columns."""
        return self.table[list(names)]

    def numbers(self, name: str) -> Float[np.ndarray, " row"]:
        """A column of numbers."""
        return self.table[name].to_numpy(float)

    def frame(self) -> pd.DataFrame:
        """All columns."""
        return self.table

    def only(self, mask: Bool[np.ndarray, " row"]) -> Held:
        """Some of the rows."""
        return Held(self.table[mask].reset_index(drop=True))


class Kept(NamedTuple):
    """Rows of a part, which its folder keeps."""

    path: Path
    stored: tuple[str, ...]
    """Columns that the part has."""
    texts: tuple[str, ...]
    """Those of texts."""
    size: int
    """How many rows there are."""
    mask: np.ndarray | None = None
    """Which rows of the part they are; None: all."""

    @classmethod
    def of(cls, path: Path) -> Kept:
        """All rows of a part."""
        about = pq.read_metadata(path)
        schema = about.schema.to_arrow_schema()
        return cls(path, tuple(schema.names), tuple(texts_of(schema)), about.num_rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, with those that older releases did not write."""
        return columns_of(self.stored)

    def take(self, names: Sequence[str]) -> pd.DataFrame:
        """Some columns, texts as categories."""
        there = [name for name in names if name in self.stored]
        read = [*there, *(["source"] if "position" not in self.stored and "source" not in there else [])]
        file = pq.ParquetFile(self.path, read_dictionary=[name for name in self.texts if name in read])
        table = self._masked(file.read(read).to_pandas())
        for name in set(names) - set(there):
            table[name] = missing_column(name, table)
        return table[list(names)]

    def numbers(self, name: str) -> Float[np.ndarray, " row"]:
        """A column of numbers."""
        found = pq.ParquetFile(self.path).read([name]).column(0).to_numpy()
        return (found if self.mask is None else found[self.mask]).astype(float, copy=False)

    def frame(self) -> pd.DataFrame:
        """All columns."""
        return self._masked(with_all_columns(pq.ParquetFile(self.path).read().to_pandas()))

    def only(self, mask: Bool[np.ndarray, " row"]) -> Kept:
        """Some of the rows."""
        if mask.all():
            return self
        if self.mask is not None:
            whole = self.mask.copy()
            whole[self.mask] = mask
        else:
            whole = mask
        return self._replace(mask=whole, size=int(mask.sum()))

    def _masked(self, table: pd.DataFrame) -> pd.DataFrame:
        return table if self.mask is None else table[self.mask].reset_index(drop=True)


class Rows:
    """Rows in pieces, one below the other.

    Args:
        pieces: at least one; those of a folder may have different columns.
    """

    def __init__(self, pieces: Iterable[Held | Kept]) -> None:
        every = list(pieces)
        self.pieces = [piece for piece in every if piece.size] or every[:1]
        self._groups: dict[tuple[str, ...], Groups] = {}

    def __len__(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def kept(self) -> bool:
        """Whether some stay in their folder."""
        return any(isinstance(piece, Kept) for piece in self.pieces)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(dict.fromkeys(name for piece in self.pieces for name in piece.columns))

    def taken(self, names: Sequence[str], doing: str = "") -> Iterator[pd.DataFrame]:
        """Some columns of one piece after another; texts may be categories.

        Args:
            names: the columns.
            doing: what it is done for; where it is said, and rows stay in their folder, a bar shows how far it is.
        """
        names = list(dict.fromkeys(names))
        for piece in self._passing(doing):
            has = set(piece.columns)
            taken = piece.take([name for name in names if name in has])
            yield taken if len(has.intersection(names)) == len(names) else taken.reindex(columns=names)

    def numbers(self, name: str) -> Iterator[Float[np.ndarray, " _"]]:
        """A column of numbers, of one piece after another; NaN where a piece lacks it."""
        for piece in self.pieces:
            yield piece.numbers(name) if name in piece.columns else np.full(piece.size, np.nan)

    def _passing(self, doing: str) -> Iterator[Held | Kept]:
        yield from tqdm(self.pieces, doing, unit="part", disable=not (doing and self.kept), leave=False)

    def take(self, names: Sequence[str], doing: str = "") -> pd.DataFrame:
        """Some columns of all rows, texts as texts."""
        return _below([_plain(frame) for frame in self.taken(names, doing)])

    def frame(self) -> pd.DataFrame:
        """All columns of all rows; they are held from then on.

        Raises:
            MambalensError: if the memory that is free is not enough.
        """
        if len(self.pieces) > 1 or isinstance(self.pieces[0], Kept):
            first = self.pieces[0].frame()
            needed = 2 * first.memory_usage(index=False, deep=True).sum() / max(len(first), 1) * len(self)
            if len(self) > HELD and needed > (left := _free()):
                raise MambalensError(
                    f"The table has {len(self):,} rows, which take {needed / 1e9:.1f} GB to put together, and "
                    f"{left / 1e9:.1f} GB are free. Take a part of the sweep, such as result.where(source='subject'), "
                    "or some columns: result.rows.take(['fact_id', 'prob']). Summaries, figures and pages need no more "
                    "than there is."
                )
            self._groups = {}
            parts = self._passing("read rows")
            next(parts)
            self.pieces = [Held(_below([first, *(piece.frame() for piece in parts)]))]
        return self.pieces[0].frame()

    def parts(self) -> Iterator[pd.DataFrame]:
        """All columns of one piece after another."""
        for piece in self.pieces:
            yield piece.frame()

    def only(self, masks: Iterable[Bool[np.ndarray, " _"]]) -> Rows:
        """Some of the rows; a mask for every piece."""
        pieces = [piece.only(mask) for piece, mask in zip(self.pieces, masks, strict=True)]
        found = Rows(pieces)
        if all(piece is whole for piece, whole in zip(pieces, self.pieces, strict=True)):
            found._groups = self._groups
        return found

    def groups(self, names: Sequence[str]) -> Groups:
        """Rows that have the same in some columns; of rows that stay in their folder, they are looked for once."""
        found = self._groups.get(tuple(names))
        if found is None:
            found = Groups.of(self, ([frame[name] for name in names] for frame in self.taken(names, "look for groups")))
            if self.kept:
                self._groups[tuple(names)] = found
        return found

    def first(self, keys: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
        """The first row for every value of some columns, in order, with these columns and others."""
        found = []
        for frame in self.taken([*keys, *others], "look for first rows"):
            _, at = numbered(frame[name] for name in keys)
            found.append(_plain(frame.iloc[at]))
        return _below(found).drop_duplicates(list(keys), ignore_index=True)


class Groups:
    """Which rows have the same in some columns, in the order in which they first stand in the table.

    Args:
        rows: the rows.
        numbers: which group every row is of, piece by piece.
        keys: the values of every group.

    Attributes:
        keys: the same.
        sizes: rows of every group.
    """

    def __init__(self, rows: Rows, numbers: list[np.ndarray], keys: list[tuple[Any, ...]]) -> None:
        self._rows = Rows(rows.pieces)  # those that are numbered, whatever `rows` makes of its pieces
        self._numbers, self.keys = numbers, keys
        counts = (np.bincount(piece, minlength=len(keys)) for piece in numbers)
        self.sizes = sum(counts, np.zeros(len(keys), int))

    @classmethod
    def of(cls, rows: Rows, columns: Iterable[list[pd.Series]]) -> Groups:
        """Groups of rows, of the columns that keep them apart, piece by piece."""
        known: dict[tuple[Any, ...], int] = {}
        found = []
        for piece in columns:
            numbers, at = numbered(piece)
            keys = zip(*(_values(column, at) for column in piece), strict=True)
            found.append(_renumbered(numbers, keys, known))
        return cls(rows, found, list(known))

    def split(self, other: Groups, values: Sequence[tuple[Any, ...]]) -> Groups:
        """These groups, kept apart by something more as well.

        Args:
            other: other groups of the same rows.
            values: what is kept apart, for each of them; a group's key begins with it.
        """
        number: dict[tuple[Any, ...], int] = {}
        value_of = np.array([number.setdefault(value, len(number)) for value in values], np.int64)
        known: dict[tuple[int, int], int] = {}
        found = []
        for mine, theirs in zip(self._numbers, other._numbers, strict=True):
            value, own = value_of[theirs], mine.astype(np.int64)
            numbers, at = _in_order(value * len(self.keys) + own, len(number) * len(self.keys))
            found.append(_renumbered(numbers, zip(value[at].tolist(), own[at].tolist(), strict=True), known))
        apart = list(number)
        return Groups(self._rows, found, [(*apart[value], *self.keys[own]) for value, own in known])

    def numbers(self) -> Int[np.ndarray, " row"]:
        """Which group every row is of."""
        return np.concatenate(self._numbers).astype(np.int64)

    def values(self, column: str) -> list[Float[np.ndarray, " _"]]:
        """A column's numbers of every group, in order, without NaN."""
        together, ends = np.empty(self.sizes.sum()), self.sizes.cumsum()
        for numbers, places in zip(self._rows.numbers(column), self._places, strict=True):
            together[places] = numbers
        found = np.split(together, ends)[:-1]
        return [values[~np.isnan(values)] for values in found] if np.isnan(together).any() else found

    @functools.cached_property
    def _places(self) -> list[np.ndarray]:
        """Where the rows of every piece stand when all are in order of their groups."""
        found, free = [], self.sizes.cumsum() - self.sizes
        for numbers in self._numbers:
            order, counts = np.argsort(numbers, kind="stable"), np.bincount(numbers, minlength=len(self.keys))
            places = np.empty(len(numbers), np.int32 if self.sizes.sum() < 2**31 else np.int64)
            places[order] = np.arange(len(numbers)) + np.repeat(free - (counts.cumsum() - counts), counts)
            found.append(places)
            free += counts
        return found


def numbered(columns: Iterable[pd.Series]) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " group"]]:
    """Rows with the same values have the same number, counted in their order; and where each number stands first."""
    joint: Any = np.zeros(1, np.int64)  # one for all rows, as long as no column keeps them apart
    several, rows = 1, 0
    for column in columns:
        codes, count = _codes(column)
        rows = len(codes)
        if count == 1:
            continue
        if several * count > _most(rows):
            joint, first = _in_order(joint, several)
            several = len(first)
        joint, several = joint * count + codes, several * count
    return _in_order(np.broadcast_to(joint, rows) if len(joint) != rows else joint, several)


def _codes(column: pd.Series) -> tuple[Int[np.ndarray, " row"], int]:
    """Numbers that are the same where a column's values are, and how many there may be."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, different = column.cat.codes.to_numpy(), len(column.cat.categories)
    elif column.dtype.kind in "iu" and isinstance(column.dtype, np.dtype) and len(column):
        codes, low = column.to_numpy(), int(column.min())
        if (different := int(column.max()) - low + 1) <= _most(len(column)):
            return codes.astype(np.int64) - low, different
        codes, values = pd.factorize(column)
        different = len(values)
    else:
        codes, values = pd.factorize(column)
        different = len(values)
    if len(codes) and codes.min() < 0:  # where there is no value
        return codes.astype(np.int64) + 1, different + 1
    return codes.astype(np.int64), max(different, 1)


def _most(rows: int) -> int:
    """How long a list of all numbers that there may be is made, for so many rows."""
    return 4 * rows + 1000


def _in_order(
    joint: Int[np.ndarray, " row"], several: int
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " group"]]:
    """Numbers below `several` counted in their order, and where each stands first."""
    if several > _most(len(joint)):
        numbers = pd.factorize(joint)[0].astype(np.int64)
        first = np.zeros(numbers.max(initial=-1) + 1, np.int64)
        first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # of several the last that is written stays
        return numbers, first
    at = np.full(several, -1)
    at[joint[::-1]] = np.arange(len(joint))[::-1]
    there = np.flatnonzero(at >= 0)
    order = there[np.argsort(at[there])]
    number = np.empty(several, np.int64)
    number[order] = np.arange(len(order))
    return number[joint], at[order]


def _renumbered(numbers: Int[np.ndarray, " row"], keys: Iterable[Key], known: dict[Key, int]) -> np.ndarray:
    """A piece's numbers as those of all pieces, of which `known` keeps the keys."""
    here = np.array([known.setdefault(key, len(known)) for key in keys], np.int32)
    # Numbers of 16 bits are sorted in linear time.
    return here.astype(np.uint16 if len(known) <= 2**16 else np.int32)[numbers]


def _values(column: pd.Series, at: Int[np.ndarray, " group"]) -> list[Any]:
    """A column's values in some rows; no value is always the same NaN, which no dictionary would know otherwise."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        every = np.array([*column.cat.categories.tolist(), np.nan], object)
        return every[column.cat.codes.to_numpy()[at]].tolist()  # -1, the last, is no value
    return [np.nan if pd.isna(value) else value for value in column.iloc[at].tolist()]


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories as the values that they stand for."""
    kinds = {name: kind.categories.dtype for name, kind in frame.dtypes.items()
             if isinstance(kind, pd.CategoricalDtype)}  # fmt: skip
    return frame.astype(kinds) if kinds else frame


def _below(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


def _free() -> int:
    """Bytes of memory that are free."""
    import torch

    from mambalens.system.memory import free

    return free(torch.device("cpu"))
