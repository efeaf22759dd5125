"""What contributions and the logit lens share: facts read batch by batch, in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.model import LoadedModel
from mambalens.runs.folder import Part, no_checks
from mambalens.sweep.identity import model_and_facts

if TYPE_CHECKING:
    import pandas as pd


class ReadingWork:
    """Everything that a reading needs, looked up and checked once.

    Raises:
        MambalensError: if no fact can be used.
    """

    columns: tuple[str, ...] = ()
    """Columns of the rows."""

    def __init__(self, lens: LoadedModel, facts: Facts, batch_size: int | None, bar: Any) -> None:
        self.lens, self.facts, self.batch_size, self.bar = lens, facts, batch_size, bar
        self.prompts, self.unusable = read_facts(facts, lens.tokenizer, subject=False)
        if not self.prompts:
            raise none_usable(facts, self.unusable)

    def tables(self, batch: Batch) -> list[pd.DataFrame]:
        """A table for each prompt of a batch."""
        raise NotImplementedError

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""
        return {
            "model": self.lens.name, "dtype": str(self.lens.model.dtype).removeprefix("torch."),
            "facts": self.facts.name, "n_facts": len(self.facts),
        } | model_and_facts(self.lens, self.facts)  # fmt: skip

    def prompts_read(self) -> list[Prompt]:
        """The prompts that are read."""
        return self.prompts

    def size(self, facts: Facts) -> int:
        """Some facts that can be read."""
        return len(self._of(facts))

    def block(self, facts: Facts) -> Part:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        prompts, asked = self._of(facts), {fact.id for fact in facts}
        tables = {
            table.fact_id.iloc[0]: table
            for batch in self.lens.batches(prompts, self.batch_size)
            for table in self.tables(batch)
        }
        rows = [tables[str(prompt.fact.id)] for prompt in prompts] or [pd.DataFrame(columns=list(self.columns))]
        skipped = [skip for skip in self.unusable if skip.fact_id in asked]
        left_out = pd.DataFrame(skipped, columns=list(Skip._fields))
        return Part(pd.concat(rows, ignore_index=True), left_out, no_checks())

    def _of(self, facts: Facts) -> list[Prompt]:
        asked = {fact.id for fact in facts}
        return [prompt for prompt in self.prompts if prompt.fact.id in asked]
