"""The strongest edges of a flow, and some others, cut exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mambalens.flow.data import FlowData
from mambalens.flow.table import CHOSEN
from mambalens.flow.work import FlowWork, Listed, choose_edges

if TYPE_CHECKING:
    import pandas as pd


def certify(flow: FlowData, work: FlowWork, top: int, sample: int, seed: int, bar: Any) -> pd.DataFrame:
    """The flow's table with the strongest edges of every fact, and a random sample of all, cut exactly.

    Args:
        flow: the flow.
        work: model and prompts.
        top: edges of a fact, the strongest as attributed.
        sample: edges of a fact that are drawn among all.
        seed: of the sample.
        bar: progress, of edges.
    """
    table = flow.table.copy()
    exact = table.exact.to_numpy(float, copy=True)
    chosen = table.chosen.cat.codes.to_numpy(copy=True)
    groups = table.groupby("fact_id", sort=False).indices
    for batch in work.batches(list(work.prompts.values()), top + sample):
        listed, new, base = [], [], []
        places = [groups[str(prompt.fact.id)] for prompt in batch.prompts]
        for prompt, at in zip(batch.prompts, places, strict=True):
            rows = table.iloc[at]
            numbers, why = choose_edges(rows.attributed.to_numpy(float), top, sample, str(prompt.fact.id), seed)
            known = ~np.isnan(exact[at[numbers]])
            bar.update(int(known.sum()))
            here = chosen[at[numbers]]
            chosen[at[numbers]] = np.where(here == CHOSEN.index("all"), here, why)
            listed.append(listed_of(work, rows))
            new.append(numbers[~known])
            base.append(float(rows.base_measure.iloc[0]))
        for at, numbers, found in zip(places, new, work.cut(batch, listed, new, base), strict=True):
            exact[at[numbers]] = found
    return table.assign(exact=exact, chosen=np.array(CHOSEN, object)[chosen])


def uncertified(table: pd.DataFrame) -> pd.DataFrame:
    """A flow's table without what cuts have shown."""
    return table.assign(exact=np.nan, chosen=CHOSEN[0])


def listed_of(work: FlowWork, rows: pd.DataFrame) -> Listed:
    """A fact's rows as edges of its prompt."""
    number = {(mixer.layer, mixer.kind, path.names[0]): i for i, (mixer, path) in enumerate(work.where)}
    keys = zip(rows.layer, rows.mixer, rows.path, strict=True)
    where = np.array([number[int(layer), str(kind), str(path)] for layer, kind, path in keys])
    return Listed(where, rows.source.to_numpy(), rows.target.to_numpy())
