"""Contributions and the logit lens in folders: saved, loaded, gone on with, told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_interventions import LONG, ONE, TWO, lens_of

from mambalens import Fact
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.contribution_data import ContributionData
from mambalens.interventions.lens_data import LogitLensData
from mambalens.result import Contributions, LogitLens
from mambalens.runs.folder import PARTS

EMPTY = Fact("", "", "Lima", "capital", "empty")
FACTS = Facts([ONE, TWO, EMPTY, LONG], name="some")
"""One of them cannot be read."""


def contributed(out: Path | None, **changed: Any) -> Contributions:
    options: dict[str, Any] = {"measure": "logit_difference", "against": "Cusco", "block_size": 2}
    return lens_of("mamba1").contributions(changed.pop("facts", FACTS), out=out, **(options | changed))


def layered(out: Path | None, **changed: Any) -> LogitLens:
    options: dict[str, Any] = {"k": 2, "block_size": 2}
    return lens_of("mamba1").logits_by_layer(changed.pop("facts", FACTS), out=out, **(options | changed))


def by_the_second(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.topk(2).values[:, 1]


def same(one: Any, two: Any, exact: bool = False) -> None:
    tables = ["table", "skipped", "facts", "prompts", *(["scores"] if isinstance(one, ContributionData) else [])]
    for name in tables:
        left, right = (getattr(found, name).reset_index(drop=True) for found in (one, two))
        for column in ("top_tokens", "top_probs", "tokens", "subject"):
            if column in left:
                pd.testing.assert_series_equal(*(of.pop(column).explode(ignore_index=True) for of in (left, right)),
                                               check_dtype=False, rtol=0, atol=0 if exact else 1e-5)  # fmt: skip
        tolerance = {"check_exact": True} if exact else {"rtol": 0, "atol": 1e-5}
        pd.testing.assert_frame_equal(left, right, check_dtype=False, **tolerance)
    assert one.n_layers == two.n_layers == {"mamba1": 4} and one.config == two.config


BOTH = pytest.mark.parametrize("find", [contributed, layered])


@BOTH
def test_a_folder_has_what_is_found_without_one(find: Any, tmp_path: Path) -> None:
    whole, kept = find(None), find(tmp_path)
    same(kept, whole)
    assert len(list((tmp_path / PARTS).iterdir())) == 2 and kept.skipped.fact_id.tolist() == ["empty"]
    loaded = type(kept).load(tmp_path)
    same(loaded, kept, exact=True)
    again = type(kept).load(kept.save(tmp_path / "saved"))
    same(again, kept, exact=True)
    assert again.plot("peru").axes and loaded.plot().axes
    assert type(again.table.iloc[0][again.table.columns[-1]]) is type(whole.table.iloc[0][whole.table.columns[-1]])


def test_what_is_kept_says_scores_and_answers(tmp_path: Path) -> None:
    found = contributed(tmp_path / "parts", measure=by_the_second, against=None)
    assert found.measure == "by_the_second" and found.scores.target.tolist() == ["Lima", "Santiago", "Cusco"]
    sums = found.table.groupby("fact_id").contribution.sum()
    assert (sums[found.scores.fact_id].to_numpy() - found.scores.score).abs().max() < 1e-9
    part = found.where(fact_id="peru", part="mixer")
    again = Contributions.load(part.save(tmp_path / "saved"))
    same(again, part, exact=True)
    assert again.scores.score.tolist() == found.scores.score[:1].tolist()
    answers = {"peru": "Lima", "chile": "Santiago", "long": "Cusco"}
    assert layered(tmp_path / "layers").answers == layered(None).answers == answers
    with pytest.raises(MambalensError, match="A lambda has no name"):
        contributed(tmp_path / "none", measure=lambda logits, targets: logits[:, 0], against=None)
    assert not (tmp_path / "none").exists()


@BOTH
def test_finished_blocks_are_not_computed_again_and_missing_ones_are(find: Any, tmp_path: Path) -> None:
    whole = find(tmp_path)
    first, second = sorted((tmp_path / PARTS).iterdir())
    before = first.stat().st_mtime_ns
    second.unlink()
    part = type(whole).load(tmp_path)
    assert part.unfinished == 1 and 0 < len(part.table) < len(whole.table) and "1 block" in repr(part)
    again = find(tmp_path)
    assert first.stat().st_mtime_ns == before and not again.unfinished
    same(again, whole)


@BOTH
def test_a_block_without_a_usable_fact_is_a_block(find: Any, tmp_path: Path) -> None:
    facts = Facts([EMPTY, ONE])
    same(find(tmp_path, facts=facts, block_size=1), find(None, facts=facts))


@pytest.mark.parametrize(
    ("find", "changed", "named"),
    [
        (contributed, {"measure": "logit", "against": None}, "against: .*measure"),
        (contributed, {"against": "Lima"}, "against"),
        (contributed, {"against": None}, "against"),
        (contributed, {"features": True}, "features"),
        (contributed, {"block_size": 3}, "block_size"),
        (contributed, {"facts": Facts([ONE, TWO], name="some")}, "facts digest"),
        (layered, {"k": 3}, "k: 2 there, 3 now"),
        (layered, {"block_size": 3}, "block_size"),
        (layered, {"facts": Facts([ONE, TWO], name="some")}, "facts digest"),
    ],
)
def test_other_numbers_in_the_same_folder_are_refused(
    find: Any, changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    find(tmp_path)
    with pytest.raises(MambalensError, match=f"holds another run .*{named}"):
        find(tmp_path, **changed)


@BOTH
def test_inside_a_knockout_it_is_another_run(find: Any, tmp_path: Path) -> None:
    lens = lens_of("mamba1")
    find(tmp_path)
    with lens.knockout(ONE, "subject"), pytest.raises(MambalensError, match="running blocks"):
        find(tmp_path, facts=FACTS)


def test_kinds_are_kept_apart(tmp_path: Path) -> None:
    found = contributed(tmp_path / "one")
    with pytest.raises(MambalensError, match=r"holds a contribution \(contribution.json\)"):
        layered(tmp_path / "one")
    with pytest.raises(MambalensError, match="holds a run: a result is not written over it"):
        found.save(tmp_path / "one")
    with pytest.raises(MambalensError, match="holds no logit"):
        LogitLensData.load(tmp_path / "one")
    contributed(tmp_path / "two", against=None)
    with pytest.raises(MambalensError, match="holds 2 folders of contributions: name one of them"):
        Contributions.load(tmp_path)
