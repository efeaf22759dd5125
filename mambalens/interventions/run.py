"""Patches, traces and readings over many facts, block by block, in a folder that they go on in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mambalens.defaults import TARGET
from mambalens.facts.pairs import Pairs
from mambalens.facts.prompts import Prompt
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.kept_data import KeptData
from mambalens.measures import Measure, name_of
from mambalens.model import LoadedModel
from mambalens.runs.config import RunConfig
from mambalens.runs.data import with_unusable
from mambalens.runs.folder import RunFolder, joined
from mambalens.runs.stored import Stored
from mambalens.sweep.identity import prompt_table
from mambalens.sweep.run import BlockWork, blocks_of, fill, versions


@runtime_checkable
class KeptWork(BlockWork, Protocol):
    """Something that computes blocks of patches, traces or readings."""

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""

    def prompts_read(self) -> list[Prompt]:
        """The prompts that are patched, traced or read."""


def check_kept(out: str | Path | None, measure: str | Measure | None) -> None:
    """Refuse a measure that a folder could not tell from another.

    Raises:
        MambalensError: for a lambda that is to be kept.
    """
    if out is not None and measure is not None and name_of(measure) == "<lambda>":
        raise MambalensError("A lambda has no name by which a folder could tell its numbers from another's: give a "
                             "function with a name, or leave out the folder and save the result.")  # fmt: skip


def configuration(
    lens: LoadedModel, facts: Facts | Pairs, windows: Sequence[Sequence[int]], measure: str | Measure | None
) -> RunConfig:
    """What is run, to label tables and figures with."""
    return RunConfig(
        model=lens.name, n_layers=lens.n_layers, kinds=tuple(lens.hooks.kinds), facts=facts.name, n_facts=len(facts),
        answered=facts.answered, target=TARGET, window=tuple(map(tuple, windows)),
        dtype=str(lens.model.dtype).removeprefix("torch."), measure="" if measure is None else name_of(measure),
    )  # fmt: skip


def found_or_kept(
    work: KeptWork,
    facts: Facts | Pairs,
    config: RunConfig,
    kind: type[KeptData],
    out: str | Path | None,
    block_size: int,
) -> KeptData:
    """What the work finds: in memory, or in a folder, in which blocks that are there are not computed again.

    Args:
        work: what computes a block.
        facts: facts or pairs.
        config: what is run.
        kind: what it gives.
        out: the folder, if any.
        block_size: facts or pairs of a block.
    """
    blocks = blocks_of(facts, block_size)
    work.bar.reset(total=work.size(facts))
    prompts = prompt_table(work.lens, work.prompts_read())
    if out is None:
        found = joined([work.block(block) for block in blocks])
        skipped = with_unusable(found.skipped, [config])
        return kind.from_stored(Stored([found.table], skipped, facts.table, prompts, [config], found.checks))
    defined = work.definition() | {"block_size": block_size}
    about = {"configs": [config.to_json()], "blocks": len(blocks), "versions": versions()}
    fill(RunFolder(out, defined, about, facts.table, prompts, kind.kind), work, blocks)
    return kind.load(out)
