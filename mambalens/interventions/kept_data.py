"""A result that a run's folder keeps: made of what is stored, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from mambalens.hooks.errors import MambalensError
from mambalens.runs.config import RunConfig
from mambalens.runs.data import with_unusable
from mambalens.runs.folder import no_checks
from mambalens.runs.stored import PLURAL, Stored, folders_of, stored_in

if TYPE_CHECKING:
    import pandas as pd


class KeptData:
    """What a folder of some kind holds."""

    kind: ClassVar[str]
    """What kind of run it is; see `runs.folder.KINDS`."""

    @classmethod
    def from_stored(cls, stored: Stored) -> Self:
        """The result that a folder holds, or that would be in one."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what a folder holds."""
        raise NotImplementedError


class ReadingData(KeptData):
    """Something read off one model for every fact.

    Attributes:
        table: rows of every fact.
        skipped: fact_id, source ('') and reason.
        facts: the facts that were asked for, with all their columns.
        prompts: model, fact_id, the prompt's tokens, as texts, and the subject's positions.
        config: what was run.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        config: RunConfig,
        unfinished: int = 0,
    ) -> None:
        self.table, self.skipped, self.facts, self.prompts = table, skipped, facts, prompts
        self.config, self.unfinished = config, unfinished

    @property
    def n_layers(self) -> dict[str, int]:
        """Layers of each model."""
        return {self.config.model: self.config.n_layers}

    def _rows(self) -> pd.DataFrame:
        """The rows as a folder has them: with all that is not in other files, and without lists."""
        raise NotImplementedError

    def _left(self) -> str:
        """How much is missing, for `repr`."""
        return f"; {self.unfinished} block{'s' * (self.unfinished > 1)} of facts to come" if self.unfinished else ""

    def save(self, folder: str | Path) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder (`mambalens.runs.folder`).

        Returns:
            The folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own.
        """
        stored = Stored([self._rows()], self.skipped, self.facts, self.prompts, [self.config], no_checks())
        return stored.save(folder, self.kind)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run's folder, also while it is still being filled, or what `save` wrote.

        Raises:
            MambalensError: if it holds none, or folders of several.
        """
        found = folders_of(folder, cls.kind)
        if len(found) > 1:
            raise MambalensError(
                f"The folder {str(folder)!r} holds {len(found)} folders of {PLURAL[cls.kind]}: name one of them."
            )
        kept = stored_in(found[0], cls.kind)
        return cls.from_stored(kept._replace(skipped=with_unusable(kept.skipped, kept.configs)))
