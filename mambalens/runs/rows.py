"""Rows of a sweep's table: held in memory, or left in their folder and read column by column when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from mambalens.hooks.errors import MambalensError
from mambalens.runs.folder import texts_of
from mambalens.runs.table import columns_of, missing_column, with_all_columns

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
    size: int
    """How many rows there are."""
    mask: np.ndarray | None = None
    """Which rows of the part they are; None: all."""

    @classmethod
    def of(cls, path: Path) -> Kept:
        """All rows of a part."""
        about = pq.read_metadata(path)
        return cls(path, tuple(about.schema.to_arrow_schema().names), about.num_rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, with those that older releases did not write."""
        return columns_of(self.stored)

    def take(self, names: Sequence[str]) -> pd.DataFrame:
        """Some columns, texts as categories."""
        there = [name for name in names if name in self.stored]
        read = [*there, *(["source"] if "position" not in self.stored and "source" not in there else [])]
        file = pq.ParquetFile(self.path, read_dictionary=texts_of(pq.read_schema(self.path)))
        table = self._masked(file.read(read).to_pandas())
        for name in set(names) - set(there):
            table[name] = missing_column(name, table)
        return table[list(names)]

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

    def __len__(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(dict.fromkeys(name for piece in self.pieces for name in piece.columns))

    def taken(self, names: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Some columns of one piece after another; texts may be categories."""
        names = list(dict.fromkeys(names))
        for piece in self.pieces:
            has = set(piece.columns)
            taken = piece.take([name for name in names if name in has])
            yield taken if len(has.intersection(names)) == len(names) else taken.reindex(columns=names)

    def take(self, names: Sequence[str]) -> pd.DataFrame:
        """Some columns of all rows, texts as texts."""
        return _below([_plain(frame) for frame in self.taken(names)])

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
            self.pieces = [Held(_below([first, *(piece.frame() for piece in self.pieces[1:])]))]
        return self.pieces[0].frame()

    def parts(self) -> Iterator[pd.DataFrame]:
        """All columns of one piece after another."""
        for piece in self.pieces:
            yield piece.frame()

    def only(self, masks: Iterable[Bool[np.ndarray, " _"]]) -> Rows:
        """Some of the rows; a mask for every piece."""
        return Rows([piece.only(mask) for piece, mask in zip(self.pieces, masks, strict=True)])

    def first(self, keys: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
        """The first row for every value of some columns, in order, with these columns and others."""
        found = []
        for frame in self.taken([*keys, *others]):
            _, at = numbered(frame[name] for name in keys)
            found.append(_plain(frame.iloc[at]))
        return _below(found).drop_duplicates(list(keys), ignore_index=True)


class Groups:
    """Which rows have the same in some columns, in the order in which they first stand in the table.

    Args:
        rows: the rows.
        columns: pieces of them with the columns that keep groups apart, and nothing else.

    Attributes:
        keys: the values of every group.
        sizes: rows of every group.
    """

    def __init__(self, rows: Rows, columns: Iterable[list[pd.Series]]) -> None:
        known: dict[tuple[Any, ...], int] = {}
        self._rows, self._numbers = rows, []
        for piece in columns:
            numbers, at = numbered(piece)
            keys = zip(*(_values(column.iloc[at]) for column in piece), strict=True)
            here = np.array([known.setdefault(key, len(known)) for key in keys], np.int32)
            # Numbers of 16 bits are sorted in linear time.
            kind = np.uint16 if len(known) <= 2**16 else np.int32
            self._numbers.append(here.astype(kind)[numbers])
        self.keys = list(known)
        self.sizes = sum(
            (np.bincount(numbers, minlength=len(known)) for numbers in self._numbers), np.zeros(len(known), int)
        )

    def numbers(self) -> Int[np.ndarray, " row"]:
        """Which group every row is of."""
        return np.concatenate(self._numbers).astype(np.int64)

    def values(self, column: str) -> list[Float[np.ndarray, " _"]]:
        """A column's numbers of every group, in order, without NaN."""
        found: list[list[np.ndarray]] = [[] for _ in self.keys]
        for frame, numbers in zip(self._rows.taken([column]), self._numbers, strict=True):
            order = np.argsort(numbers, kind="stable")
            values, counts = frame[column].to_numpy(float)[order], np.bincount(numbers)
            for group, part in enumerate(np.split(values, counts.cumsum()[:-1])):
                if len(part):
                    found[group].append(part)
        together = [np.concatenate(parts) for parts in found]
        return [values[~np.isnan(values)] for values in together]


def numbered(columns: Iterable[pd.Series]) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " group"]]:
    """Rows with the same values have the same number, counted in their order; and where each number stands first."""
    numbers: Any = 0
    for column in columns:
        codes, different = pd.factorize(column)  # -1 where there is no value
        numbers = pd.factorize(numbers * (len(different) + 1) + codes.astype(np.int64) + 1)[0].astype(np.int64)
    first = np.zeros(numbers.max(initial=-1) + 1, np.int64)
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # of several the last that is written stays
    return numbers, first


def _values(column: pd.Series) -> list[Any]:
    """A column's values; no value is always the same NaN, which no dictionary would know otherwise."""
    return [np.nan if pd.isna(value) else value for value in _plain(column.to_frame()).iloc[:, 0].tolist()]


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
