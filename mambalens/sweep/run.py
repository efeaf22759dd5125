"""The sweep: one knockout for every source, window, group of features and path, over many facts, block by block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mambalens.defaults import BLOCK
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.model import LoadedModel
from mambalens.sweep.ablation import Asked
from mambalens.sweep.block import Work
from mambalens.sweep.identity import configuration, definition, prompt_table
from mambalens.sweep.plan import Plan
from mambalens.system import processes
from mambalens.system.events import tell
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    from mambalens.facts.pairs import Pairs
    from mambalens.runs.data import SweepData
    from mambalens.runs.folder import Part, RunFolder

POLL = 0.5
"""Seconds between looks at blocks that another process is at."""


def run(
    lens: LoadedModel,
    facts: Facts,
    plan: Plan,
    batch_size: int | None = None,
    progress: bool = True,
    memory: int | str | None = None,
    replay: bool = True,
    out: str | Path | None = None,
    block_size: int = BLOCK,
    asked: Asked | None = None,
) -> SweepData:
    """Run a plan, block of facts by block of facts.

    Args:
        lens: model and tokenizer.
        facts: facts to sweep.
        plan: what to knock out.
        batch_size: prompts a batch at most; fewer where the memory needs it.
        progress: show a progress bar.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        replay: answer knockouts by the replay engine (`mambalens.sweep.replay`) wherever it reproduces the model;
            otherwise by one hooked forward pass for every knockout.
        out: folder to keep finished blocks in (see `mambalens.runs.folder`); those that are there already are not
            computed again, and those that another process is at are left to it.
        block_size: facts a block.
        asked: more about the plan's ablation; None: as it is without more.
    """
    from mambalens.runs.data import SweepData, with_unusable
    from mambalens.runs.folder import RunFolder, joined

    if out is not None and plan.measure_name == "<lambda>":
        raise MambalensError("A lambda has no name by which a folder could tell its sweep from another: give a "
                             "function with a name, or leave out the folder and save the result.")  # fmt: skip
    blocks = blocks_of(facts, block_size)
    bar = tqdm(desc=f"sweep {lens.name}", unit="prompt", disable=not progress)
    with bar:
        work = Work(lens, facts, plan, batch_size, memory, replay, bar, asked)
        bar.reset(total=work.size(facts))
        config = configuration(lens, facts, plan, work.windows)
        prompts = prompt_table(lens, work.prompts.values())
        if out is None:
            found = joined([work.block(block) for block in blocks])
            missing = with_unusable(found.skipped, [config])
            return SweepData(found.table, missing, facts.table, [config], prompts=prompts, checks=found.checks)
        defined = definition(lens, facts, plan, work.windows, config) | {"block_size": block_size}
        if work.ablation is not None:
            defined |= work.ablation.identity
        about = {"configs": [config.to_json()], "blocks": len(blocks), "versions": versions()}
        fill(RunFolder(out, defined, about, facts.table, prompts), work, blocks)
    return SweepData.load(out)


class BlockWork(Protocol):
    """Something that computes blocks of facts, or of pairs of them."""

    lens: LoadedModel
    bar: Any

    def size(self, facts: Any, /) -> int:
        """How far the progress bar goes for some facts."""

    def block(self, facts: Any, /) -> Part:
        """The table's rows for some facts, what is left out of them, and how replays were held against the model."""


def blocks_of(facts: Facts | Pairs, size: int) -> list[Any]:
    """The facts, or pairs of them, in blocks."""
    if size < 1:
        raise MambalensError(f"block_size={size}: give 1 or more facts.")
    return [facts[begin : begin + size] for begin in range(0, len(facts), size)]


def fill(folder: RunFolder, work: BlockWork, blocks: Sequence[Any]) -> None:
    """Compute the blocks that a folder lacks, those that nobody else is at first."""
    from mambalens.runs.folder import Interrupts

    begin = processes.rank() * len(blocks) // processes.count()
    left = [*range(begin, len(blocks)), *range(begin)]
    counted: set[int] = set()
    with Interrupts() as interrupts:
        while left:
            waiting = []
            for number in left:
                interrupts.look()
                if not folder.finished(number):
                    with folder.claim(number) as mine:
                        if not mine:
                            waiting.append(number)
                            continue
                        if not folder.finished(number):
                            _compute(folder, work, number, blocks)
                            counted.add(number)
                if number not in counted:
                    counted.add(number)
                    _tell("block already there", folder, work, number, blocks)
                    work.bar.update(work.size(blocks[number]))
            if len(waiting) == len(left):
                time.sleep(POLL)
            left = waiting


def _compute(folder: RunFolder, work: BlockWork, number: int, blocks: Sequence[Any]) -> None:
    """Compute a block and keep it."""
    started = time.perf_counter()
    part = work.block(blocks[number])
    folder.write(number, part)
    seconds = round(time.perf_counter() - started, 3)
    _tell("block", folder, work, number, blocks, rows=len(part.table), seconds=seconds)


def _tell(event: str, folder: RunFolder, work: BlockWork, number: int, blocks: Sequence[Any], **more: Any) -> None:
    """Say what became of a block."""
    tell(event, model=work.lens.name, folder=str(folder.path), block=number, blocks=len(blocks), **more)


def versions() -> dict[str, str]:
    """What numbers were computed with."""
    from importlib.metadata import version

    return {name: version(name) for name in ("mambalens", "torch", "transformers")}
