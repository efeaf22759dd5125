"""A flow over many facts, block by block, in a folder that it goes on in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mambalens.defaults import FLOW_BLOCK, TARGET
from mambalens.facts.sequence import Facts
from mambalens.flow.data import FlowData
from mambalens.flow.work import Flowing, FlowWork
from mambalens.hooks.errors import MambalensError
from mambalens.model import LoadedModel
from mambalens.runs.config import RunConfig
from mambalens.sweep.identity import model_and_facts, prompt_table
from mambalens.sweep.run import blocks_of, fill, versions
from mambalens.system.progress import tqdm


def run(
    lens: LoadedModel,
    facts: Facts,
    flowing: Flowing,
    batch_size: int | None = None,
    progress: bool = True,
    memory: int | str | None = None,
    out: str | Path | None = None,
    block_size: int = FLOW_BLOCK,
) -> FlowData:
    """Attribute every edge of some facts, and cut those that are asked for.

    Args:
        lens: model and tokenizer.
        facts: facts.
        flowing: what is asked for.
        batch_size: prompts a batch at most; fewer where the memory needs it.
        progress: show a progress bar.
        memory: bytes to use beside the model, or text like '4GB'; by default half of what is free.
        out: folder to keep finished blocks in; those that are there already are not computed again.
        block_size: facts a block.
    """
    from mambalens.runs.data import with_unusable
    from mambalens.runs.folder import FLOW, RunFolder, joined

    if out is not None and not isinstance(flowing.measure, str):
        raise MambalensError("A flow of a function cannot be kept in a folder, which could not tell it from another: "
                             "name a measure, or leave out the folder and save the result.")  # fmt: skip
    blocks = blocks_of(facts, block_size)
    bar = tqdm(desc=f"flow {lens.name}", unit="step", disable=not progress)
    with bar:
        work = FlowWork(lens, facts, flowing, batch_size, memory, bar)
        bar.reset(total=work.size(facts))
        if flowing.every and progress:
            count = len(work.prompts)
            said = f"Every edge is cut on its own: {work.cuts(facts):,} cuts in {count} prompt{'s' * (count > 1)}."
            bar.write(said, file=sys.stderr)
        config = _configuration(lens, facts, flowing)
        prompts = prompt_table(lens, work.prompts.values())
        if out is None:
            found = joined([work.block(block) for block in blocks])
            skipped = with_unusable(found.skipped, [config])
            return FlowData(found.table, skipped, facts.table, prompts, [config], checks=found.checks)
        defined = _definition(lens, facts, flowing, config) | {"block_size": block_size}
        if work.ablation is not None:
            defined |= work.ablation.identity
        about = {"configs": [config.to_json()], "blocks": len(blocks), "versions": versions()}
        fill(RunFolder(out, defined, about, facts.table, prompts, FLOW), work, blocks)
    return FlowData.load(out)


def _configuration(lens: LoadedModel, facts: Facts, flowing: Flowing) -> RunConfig:
    return RunConfig(
        model=lens.name, n_layers=lens.n_layers, kinds=tuple(lens.hooks.kinds), facts=facts.name, n_facts=len(facts),
        answered=facts.answered, target=TARGET, features=(flowing.features_name,), paths=flowing.paths,
        dtype=str(lens.model.dtype).removeprefix("torch."), measure=flowing.measure_name, points=flowing.points,
        ablation=flowing.ablation.label,
    )  # fmt: skip


def _definition(lens: LoadedModel, facts: Facts, flowing: Flowing, config: RunConfig) -> dict[str, Any]:
    """Everything that the numbers depend on, as JSON."""
    about = config.to_json()
    masks = None
    if not isinstance(flowing.features, str):
        found = lens.hooks.feature_masks(flowing.features, None)
        masks = [[m.layer, m.kind, None if f is None else f.nonzero().flatten().tolist()] for m, f in found.items()]
    names = ("model", "n_layers", "facts", "n_facts", "features", "paths", "dtype", "measure", "points")
    # Called what they are called when a flow is asked for: a refusal quotes them.
    cuts = {"certify": flowing.top, "sample": flowing.sample, "seed": flowing.seed}
    asked = {"strongest": flowing.strongest, "method": "exact" if flowing.every else "gradient"}
    asked |= dict.fromkeys(cuts, 0) if flowing.every else cuts
    return {key: about[key] for key in names} | asked | {"feature masks": masks} | model_and_facts(lens, facts)
