"""The logit lens: what the model would answer if a layer were its last, at every position."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.defaults import CELL_BLOCK
from mambalens.facts.pieces import piece_of
from mambalens.facts.prompts import Batch
from mambalens.facts.sequence import Facts
from mambalens.hooks.behind import beside_of, hidden_of, logits_behind
from mambalens.hooks.calls import bound
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.lens_data import LOGIT_COLUMNS, LogitLensData, with_texts
from mambalens.interventions.reading import ReadingWork
from mambalens.interventions.run import configuration, found_or_kept
from mambalens.measures import log_odds
from mambalens.model import LoadedModel
from mambalens.sweep.prediction import Prediction
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd

LOGITS_AT_ONCE = 2**25
"""Numbers of logits that are made at a time."""


def logits_by_layer(
    lens: LoadedModel,
    facts: Facts,
    k: int = 5,
    batch_size: int | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    block_size: int = CELL_BLOCK,
) -> LogitLensData:
    """See `Lens.logits_by_layer`.

    Equation: Logit lens
        z[l, t] = head(norm(r_t^l))    r^0 the embeddings, r^l the residual stream behind l layers

        Source: nostalgebraist 2020, 'interpreting GPT: the logit lens'

        head and norm are the model's own code behind its layers, with soft-capping and scaling of logits.
    """
    vocabulary = lens.model.get_output_embeddings().weight.shape[0]
    if not 1 <= k <= vocabulary:
        raise MambalensError(f"k={k}: give how many tokens to list, 1 to {vocabulary}.")
    with tqdm(desc=f"logits {lens.name}", unit="fact", disable=not progress) as bar:
        work = LogitWork(lens, facts, k, batch_size, bar)
        config = configuration(lens, facts, (), None)
        size = max(1, len(facts)) if out is None else block_size
        return cast(LogitLensData, found_or_kept(work, facts, config, LogitLensData, out, size))


class LogitWork(ReadingWork):
    """The logit lens on blocks of facts."""

    columns = tuple(LOGIT_COLUMNS)

    def __init__(self, lens: LoadedModel, facts: Facts, k: int, batch_size: int | None, bar: Any) -> None:
        super().__init__(lens, facts, batch_size, bar)
        self.k = k

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""
        return {"k": self.k} | super().definition()

    def tables(self, batch: Batch) -> list[pd.DataFrame]:
        """A table for each prompt of a batch."""
        found = [with_texts(table) for table in _tables(self.lens, batch, self.k)]
        self.bar.update(len(found))
        return found


@torch.no_grad()
def streams_of(
    lens: LoadedModel, ids: Int[Tensor, "batch time"]
) -> tuple[list[Float[Tensor, "batch time hidden"]], list[tuple[Any, ...] | None]]:
    """The residual stream before the first layer and behind every layer, and what layers return beside it."""
    streams: list[Tensor] = []
    beside: list[tuple[Any, ...] | None] = []

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not streams:
            given = bound(module, args, kwargs)
            streams.append(given[list(given)[1]].clone())
        streams.append(hidden_of(output).clone())
        beside.append(beside_of(output))

    with ExitStack() as stack:
        for layer in lens.hooks.layers:
            stack.callback(layer.register_forward_hook(watch, with_kwargs=True).remove)
        lens.hooks.trunk(input_ids=ids, use_cache=False)
    return streams, beside


@torch.no_grad()
def _tables(lens: LoadedModel, batch: Batch, k: int) -> list[pd.DataFrame]:
    """A table for each prompt of a batch."""
    import pandas as pd

    streams, beside = streams_of(lens, batch.ids.to(lens.device))
    is_token = torch.arange(batch.ids.shape[1]) <= batch.last[:, None]  # [B, T]
    row, position = is_token.nonzero(as_tuple=True)
    vocabulary = lens.model.get_output_embeddings().weight.shape[0]
    tables = []
    for layer, stream in enumerate(streams):
        for some in torch.arange(len(row)).split(max(1, LOGITS_AT_ONCE // vocabulary)):
            hidden = stream[row[some].to(stream.device), position[some].to(stream.device)].to(lens.device)
            with lens.hooks.aside():
                logits = logits_behind(lens.model, lens.hooks.layers, beside, hidden[:, None])
            targets = batch.targets[row[some]].to(logits.device)
            answer = Prediction.of(logits, targets)
            top = answer.log_probs.topk(k)
            tables.append(pd.DataFrame({
                "row": row[some], "layer": layer, "position": position[some], "prob": answer.prob.cpu(),
                "log_odds": log_odds(logits.double(), targets).cpu(), "rank": answer.rank.cpu(),
                "top_tokens": top.indices.tolist(), "top_probs": top.values.double().exp().tolist(),
            }))  # fmt: skip
    whole = pd.concat(tables, ignore_index=True)
    texts = {i: lens.tokenizer.decode([i]) for i in set(itertools.chain.from_iterable(whole.top_tokens))}
    whole["top_tokens"] = [[texts[i] for i in tokens] for tokens in whole.top_tokens]
    whole["top_token"] = [tokens[0] for tokens in whole.top_tokens]
    found = []
    for number, prompt in enumerate(batch.prompts):
        table = whole[whole.row == number].sort_values(["layer", "position"], ignore_index=True)
        names, pieces = np.array(prompt.tokens, dtype=object), np.array(piece_of(prompt), dtype=object)
        at = table.position.to_numpy()
        table = table.assign(model=lens.name, fact_id=str(prompt.fact.id), token=names[at], piece=pieces[at])
        found.append(table[list(LOGIT_COLUMNS)])
    return found
