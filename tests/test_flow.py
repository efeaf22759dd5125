"""Flows: edges cut exactly, what is kept of them, routes and circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flows import made
from models import in_double

from mambalens import Fact, Facts, Lens, MambalensError, load_facts
from mambalens.facts.pieces import piece_of
from mambalens.facts.prompts import Batch
from mambalens.flow.agreement import agreement
from mambalens.flow.circuits import Ablated
from mambalens.flow.data import FlowData
from mambalens.flow.exact import Edge, ExactCuts, without_edges
from mambalens.flow.routes import Hop, Losses, Route, by_pieces, ways
from mambalens.flow.stability import CLASS, stability
from mambalens.flow.table import EDGE
from mambalens.flow.verbs import FlowVerbs
from mambalens.flow.work import Flowing, FlowWork, choose_edges
from mambalens.hooks.knockout import Paths
from mambalens.result import Flow
from mambalens.runs.stored import kind_of
from mambalens.system.progress import tqdm

MODELS = ("atlas-mamba1", "atlas-mamba2", "atlas-gpt-neox", "atlas-deltanet")


def facts_of(lens: Lens, count: int = 3, **where: Any) -> Facts:
    return lens.known(load_facts("atlas").where(**where), limit=count, progress=False, seed=5)


def work_of(lens: Lens, facts: Facts, **asked: Any) -> FlowWork:
    return FlowWork(lens, facts, Flowing(**asked), None, None, tqdm(disable=True))


@pytest.fixture(scope="module", params=MODELS)
def lens(request: pytest.FixtureRequest) -> Lens:
    return Lens.load(request.param, dtype="float64")


@pytest.fixture(scope="module")
def far() -> tuple[Lens, Facts]:
    lens = Lens.load("atlas-mamba1")
    return lens, facts_of(lens, 3, wording="far")


@pytest.fixture(scope="module")
def flow(far: tuple[Lens, Facts]) -> Flow:
    lens, facts = far
    return lens.flow(facts, certify=12, sample=8, progress=False)


def logits_of(exact: ExactCuts, batch: Batch, cuts: Sequence[Sequence[Sequence[Edge]]]) -> list[torch.Tensor]:
    return exact.scores(batch, cuts, lambda logits, targets: logits)


def without(lens: Lens, batch: Batch, cut: Sequence[Edge]) -> torch.Tensor:
    """The logits of one prompt in a pass whose hooks cut some edges."""
    masks: dict[Any, torch.Tensor] = {}
    for edge in cut:
        mask = masks.setdefault((edge.mixer, edge.path), torch.zeros(2 * batch.ids.shape[1:], dtype=torch.bool))
        mask[edge.target, edge.source] = True
    with in_double(lens.model), without_edges(lens, masks, dict.fromkeys(lens.hooks.mixers)):
        return lens.last_logits(batch)[0]


def test_cuts_of_one_and_many_edges_by_replay_equal_passes_with_hooks(lens: Lens) -> None:
    """Prompts of different length side by side, each with its own: single edges of every layer and path, and sets of
    them over layers, paths and targets; one prompt with few, and one with none.
    """
    facts = Facts([*facts_of(lens, 2, wording="far"), *facts_of(lens, 2, wording="near")])
    work = work_of(lens, facts)
    batch = next(lens.batches(list(work.prompts.values())))
    assert len(set(batch.last.tolist())) > 1
    cuts: list[list[list[Edge]]] = []
    for i, prompt in enumerate(batch.prompts):
        listed, draw = work.edges(len(prompt.ids)), np.random.default_rng(i)
        single = [np.flatnonzero(listed.where == number) for number in range(len(work.where))]
        of_prompt = [[work.edge(listed, int(draw.choice(numbers)))] for numbers in single]
        of_prompt += [[work.edge(listed, int(n)) for n in draw.choice(len(listed.where), size, replace=False)]
                      for size in (2, 3, 5, 20, 200)]  # fmt: skip
        cuts.append([[], *of_prompt] if i < 2 else of_prompt[3:7] if i < 3 else [])
    exact, answered = ExactCuts(lens, 2**28), []
    with in_double(lens.model):
        answers = exact.scores(batch, cuts, lambda logits, targets: logits, answered.append)
    assert exact.checks.works and sum(answered) == sum(map(len, cuts))
    for i, of_prompt in enumerate(cuts):
        assert len(answers[i]) == len(of_prompt)
        for cut, answer in zip(of_prompt, answers[i], strict=True):
            own = without(lens, batch.part([i]).trimmed(), cut)
            assert float((answer - own).abs().max()) < 1e-9 * float(own.abs().max())


def test_memory_for_few_source_sets_changes_nothing(lens: Lens) -> None:
    facts = facts_of(lens, 2)
    work = work_of(lens, facts)
    batch = next(lens.batches(list(work.prompts.values())))
    draw = np.random.default_rng(0)
    cuts = []
    for prompt in batch.prompts:
        listed = work.edges(len(prompt.ids))
        cuts.append([[work.edge(listed, int(n))] for n in draw.choice(len(listed.where), 60, replace=False)])
    with in_double(lens.model):
        much, little = (torch.stack(logits_of(ExactCuts(lens, memory), batch, cuts)) for memory in (2**30, 2**20))
    assert float((much - little).abs().max()) < 1e-9 * float(much.abs().max())


def test_one_row_of_a_replay_may_lack_a_write_and_another_erasure_for_one_target() -> None:
    lens = Lens.load("atlas-deltanet", dtype="float64")
    (fact,) = facts_of(lens, 1)
    batch = next(lens.batches([lens.prompt(fact)]))
    mixer = next(m for m in lens.hooks.mixers if Paths.ERASE in m.paths)
    last = batch.ids.shape[1] - 1
    both = [
        Edge(mixer, Paths.MAIN, 0, last),
        Edge(mixer, Paths.ERASE, 1, last),
        Edge(mixer, Paths.CONV, last - 1, last),
    ]
    exact = ExactCuts(lens, 2**28)
    with in_double(lens.model):
        (replayed,) = logits_of(exact, batch, [[both]])
        exact.checks.works = False
        (hooked,) = logits_of(exact, batch, [[both]])
    assert float((replayed - hooked).abs().max()) < 1e-9 * float(hooked.abs().max())


def test_a_model_that_replay_misses_is_answered_by_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens.load("atlas-mamba2")
    (fact,) = facts_of(lens, 1)
    work = work_of(lens, Facts([fact]))
    batch = next(lens.batches(list(work.prompts.values())))
    listed = work.edges(batch.ids.shape[1])
    cuts = [[work.edge(listed, number)] for number in (3, 77)]
    (right,) = logits_of(ExactCuts(lens, 2**28), batch, [cuts])
    monkeypatch.setattr("mambalens.sweep.checks.MULTIPLE", -1.0)
    exact = ExactCuts(lens, 2**28)
    with pytest.warns(UserWarning, match="without a cut it misses by"):
        (answers,) = logits_of(exact, batch, [cuts])
    assert not exact.checks.found[0].passed and torch.allclose(answers, right, atol=1e-3)


def test_every_edge_is_there_once_and_its_row_says_what_it_is(flow: Flow, far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    for fact in facts:
        prompt = lens.prompt(fact)
        rows = flow.table[flow.table.fact_id == fact.id]
        time, kernel = len(prompt.ids), lens.hooks.mixers[0].kernel
        pairs = time * (time - 1) // 2
        near = sum(t - s < kernel for t in range(time) for s in range(t))
        assert len(rows) == lens.n_layers * (pairs + near)
        assert not rows.duplicated(["layer", "path", "source", "target"]).any() and (rows.source < rows.target).all()
        pieces = piece_of(prompt)
        assert list(rows.source_piece) == [pieces[s] for s in rows.source]
        assert list(rows.target_piece) == [pieces[t] for t in rows.target]
        base = flow.base.set_index("fact_id").loc[fact.id]
        assert base.edges == len(rows) and base.measure == pytest.approx(np.log(base.prob / (1 - base.prob)), rel=1e-3)


def test_pieces_follow_the_subject() -> None:
    lens = Lens.load("atlas-mamba1")
    prompt = lens.prompt(Fact("The capital of Peru is", "Peru", "Lima"))
    assert piece_of(prompt)[-1] == "last" and "subject_last" in piece_of(prompt)
    assert piece_of(prompt).index("subject_last") == prompt.positions("subject")[-1]
    none = lens.prompt(Fact("The capital is", "Chile", "Lima"))
    assert set(piece_of(none)) == {"context", "last"}


def test_cutting_later_is_cutting_at_once(flow: Flow, far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    later = lens.flow(facts, progress=False).certify(12, 8, progress=False)
    assert later.table.chosen.astype(str).equals(flow.table.chosen.astype(str))
    np.testing.assert_allclose(later.table.exact, flow.table.exact, atol=1e-4)
    assert flow.table.groupby("fact_id").chosen.apply(lambda c: (c == "top").sum()).eq(12).all()


def test_the_agreement_of_a_fact_is_what_its_rows_say(flow: Flow) -> None:
    rows = flow.table[(flow.table.fact_id == flow.base.fact_id[0])]
    strong = rows[rows.chosen == "top"]
    found = agreement(flow).iloc[0]
    ranks = [np.argsort(np.argsort(strong[name])) for name in ("attributed", "exact")]
    assert found.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])
    drawn = rows[rows.chosen == "sample"].exact.abs().mean() * (len(rows) - len(strong))
    assert found.share_rest == pytest.approx(drawn / (drawn + strong.exact.abs().sum()))


def test_a_sample_is_the_same_whatever_is_cut_beside_it() -> None:
    effects = np.random.default_rng(0).normal(size=200)
    alone, _ = choose_edges(effects, 0, 30, "fact", 1)
    beside, why = choose_edges(effects, 50, 30, "fact", 1)
    assert set(beside[why == 2]) == set(alone) - set(beside[why == 1])
    assert set(beside[why == 1]) == set(np.argsort(-np.abs(effects))[:50])


def test_every_edge_can_be_cut_and_only_that_is_exact() -> None:
    lens = Lens.load("atlas-mamba2")
    (fact,) = facts_of(lens, 1, wording="near")
    found = lens.flow(fact, method="exact", paths="main", progress=False)
    assert found.table.exact.notna().all() and (found.table.chosen == "all").all()
    assert set(found.table.path) == {"main"}


def test_a_flow_goes_on_where_it_stopped_and_is_read_again(far: tuple[Lens, Facts], flow: Flow, tmp_path: Path) -> None:
    lens, facts = far
    whole = lens.flow(facts, out=tmp_path / "run", certify=12, sample=8, block_size=1, progress=False)
    part = tmp_path / "run" / "parts" / "00001.parquet"
    before = {path.name: path.stat().st_mtime_ns for path in part.parent.iterdir()}
    part.unlink()
    again = lens.flow(facts, out=tmp_path / "run", certify=12, sample=8, block_size=1, progress=False)
    after = {path.name: path.stat().st_mtime_ns for path in part.parent.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {part.name}
    np.testing.assert_allclose(again.table.attributed, whole.table.attributed, atol=1e-5)
    with pytest.raises(MambalensError, match="holds another run"):
        lens.flow(facts, out=tmp_path / "run", points=1, block_size=1, progress=False)
    saved = Flow.load(flow.save(tmp_path / "saved"))
    assert saved.table.astype(str).equals(flow.table.astype(str)) and saved.models == flow.models
    with pytest.raises(MambalensError, match=r"flow\.of\(lens, facts\)"):
        saved.certify(progress=False)
    assert (
        saved.of(lens, facts).certify(3, 0, progress=False).table.exact.notna().sum() >= flow.table.exact.notna().sum()
    )
    with pytest.raises(MambalensError, match="holds no sweep"):
        from mambalens import SweepResult

        SweepResult.load(tmp_path / "saved")


def test_a_flow_is_filtered_by_the_columns_of_its_facts(flow: Flow) -> None:
    relation = flow.facts.relation[0]
    part = flow.where(relation=relation)
    assert set(part.table.fact_id) == set(flow.facts.fact_id[flow.facts.relation == relation])
    assert part.where(path="conv", layer=[3, 4]).table.layer.isin([3, 4]).all()
    with pytest.raises(MambalensError, match=r"'wordin' is no column of the facts: did you mean 'wording'\?"):
        flow.where(wordin="far")
    with pytest.raises(MambalensError, match="No edge of the flow has layer=99"):
        flow.where(layer=99)


def test_the_same_edges_are_not_put_together_twice(flow: Flow) -> None:
    first, *others = flow.base.fact_id
    parts = [flow.where(fact_id=first), flow.where(fact_id=others)]
    assert len(Flow.concat(parts).table) == len(flow.table)
    assert len(Flow.concat([flow.where(path="conv"), flow.where(path="main")]).table) == len(flow.table)
    with pytest.raises(MambalensError, match=f"have the same edges .fact '{first}', model 'atlas-mamba1'"):
        Flow.concat([flow, parts[0]])
    other = Flow.with_verbs(parts[0])
    other.facts = other.facts.assign(target="another")
    with pytest.raises(MambalensError, match="Different facts have the id"):
        Flow.concat([parts[1], other])


def test_a_folder_holds_a_sweep_or_a_flow_and_says_which(flow: Flow, far: tuple[Lens, Facts], tmp_path: Path) -> None:
    lens, facts = far
    sweep = lens.sweep(facts, "subject", window=12, out=tmp_path / "sweep", progress=False)
    one = facts[:1]
    lens.flow(one, out=tmp_path / "flow", progress=False)
    assert [kind_of(tmp_path / name) for name in ("sweep", "flow")] == ["sweep", "flow"]
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))}
    for wrong in (
        lambda: lens.flow(one, out=tmp_path / "sweep", progress=False),
        lambda: flow.save(tmp_path / "sweep"),
        lambda: lens.sweep(facts, "subject", window=12, out=tmp_path / "flow", progress=False),
        lambda: sweep.save(tmp_path / "flow"),
    ):
        with pytest.raises(MambalensError, match=r"holds a (sweep|flow) .*is not written over it"):
            wrong()
    assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))}
    with pytest.raises(MambalensError, match="holds sweeps and flows"):
        kind_of(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        MambalensError, match=r"holds no sweep, flow, patch, trace, contribution or logit \(no sweep.json, no "
    ):
        kind_of(tmp_path / "empty")


def test_a_refusal_says_what_differs_in_the_words_of_the_command_line(far: tuple[Lens, Facts], tmp_path: Path) -> None:
    lens, facts = far
    lens.flow(facts[:1], out=tmp_path, certify=2, progress=False)
    with pytest.raises(MambalensError, match="certify: 2 there, 3 now; seed: 0 there, 5 now"):
        lens.flow(facts[:1], out=tmp_path, certify=3, seed=5, progress=False)


def test_the_features_of_the_strongest_edges_add_up_to_what_one_gradient_attributes(
    far: tuple[Lens, Facts], flow: Flow
) -> None:
    """And their strongest come first; of a group of features, only these."""
    lens, facts = far
    once = lens.flow(facts, points=1, progress=False)
    edge = ["fact_id", "layer", "mixer", "path", "source", "target"]
    whole = once.edge_features(4, 10**6, progress=False)
    added = whole.groupby(edge, sort=False, observed=True).effect.agg(["sum", "size"]).reset_index()
    strongest = once.strongest(4)
    assert added[edge].astype(str).equals(strongest[edge].astype(str).reset_index(drop=True))
    np.testing.assert_allclose(added["sum"], strongest.attributed, atol=1e-4)
    assert added["size"].eq(lens.hooks.mixers[0].n_features).all()
    few = once.edge_features(4, 3, progress=False)
    first = whole.groupby(edge, sort=False, observed=True).head(3).reset_index(drop=True)
    assert few.astype({"effect": "float32"}).round(3).equals(first.astype({"effect": "float32"}).round(3))
    slow = lens.flow(facts, features="slow", progress=False).edge_features(2, 10**6, progress=False)
    for layer, rows in slow.groupby("layer"):
        mask = lens.hooks.resolve([layer], "slow").features[lens.hooks.mixers[layer]]
        assert mask is not None and sorted(rows.feature.unique()) == mask.nonzero().flatten().tolist()
    for asked in ({"count": 0}, {"k": 0}):
        with pytest.raises(MambalensError, match="=0: ask for 1 or more"):
            flow.edge_features(**asked)
    with pytest.raises(MambalensError, match=r"flow\.of\(lens, facts\)"):
        Flow.with_verbs(flow).edge_features()


def test_a_routes_numbers_are_those_of_its_cuts(flow: Flow, far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    found = flow.routes(k=2, progress=False)
    best = found[found["rank"] == 1].iloc[0]
    fact = next(fact for fact in facts if fact.id == best.fact_id)
    work = work_of(lens, Facts([fact]))
    (prompt,) = work.prompts.values()
    batch = next(lens.batches([prompt]))
    last, subject = len(prompt.ids) - 1, prompt.positions("subject")
    stops = [subject, *best.relays, [last]]
    assert not set(subject) & {r for side in best.relays for r in side}
    masks = []
    for sources, targets in pairwise(stops):
        mask = torch.zeros(last + 1, last + 1, dtype=torch.bool)
        mask[np.ix_(targets, sources)] = True
        masks.append(mask.tril(-1))
    together = torch.stack(masks).any(0)
    losses = []
    with torch.no_grad():
        base = float(lens.last_logits(batch).softmax(-1)[0, prompt.target_id])
        for mask in (*masks, together):
            with lens.hooks.knockout(edges=mask, path="both"):
                prob = float(lens.last_logits(batch).softmax(-1)[0, prompt.target_id])
            losses.append(100 * (1 - prob / base))
    np.testing.assert_allclose([*best.hop_pct, best.joint_pct], losses, atol=0.05)
    shared = (sum(best.hop_pct) - best.joint_pct) / (len(best.hop_pct) - 1)
    assert best.carried_pct == pytest.approx(min(shared, *best.hop_pct))
    by_piece = flow.routes_by_piece(routes=found, progress=False)
    assert (by_piece.facts <= 3).all() and (by_piece.carried_pct.diff().dropna() < 2).all()


def test_a_piece_that_adds_nothing_comes_after_the_chain_without_it() -> None:
    hops = (Hop((0,), (1,)), Hop((1,), (2,)))
    chains = {"source → a → last": 0.3, "source → a + b → last": 0.9, "source → c → last": 0.91,
              "source → a + b + d → last": 0.905, "source → a + b + e → last": 0.95}  # fmt: skip
    table = by_pieces(
        "model", list(chains), [[Route(hops, (share, share), share) for share in chains.values()]], "zero"
    )
    assert list(table.pieces) == [
        "source → a + b + e → last", "source → c → last", "source → a + b → last", "source → a + b + d → last",
        "source → a → last",
    ]  # fmt: skip


def test_routes_where_a_path_does_not_reach_or_no_position_lies_between(far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    of_taps = lens.flow(facts[:1], paths="conv", progress=False).routes(k=1, progress=False)
    assert len(of_taps) == 1
    short = lens.flow(Fact("Peru is", "Peru", "Lima", id="short"), progress=False)
    assert "pieces" in short.routes(progress=False).columns
    with pytest.raises(MambalensError, match="is empty in every prompt"):
        lens.flow(Fact("Peru is", "Chile", "Lima", id="none"), progress=False).routes(progress=False)


def test_hops_that_lose_the_same_carry_it_and_independent_ones_nothing() -> None:
    hops = (Hop((0,), (1,)), Hop((1,), (2,)))
    assert Route(hops, (0.4, 0.4), 0.4).carried == pytest.approx(0.4)
    assert Route(hops, (0.2, 0.3), 0.5).carried == pytest.approx(0.0)


def test_a_route_carries_no_more_than_its_weakest_hop() -> None:
    hops = (Hop((0,), (1,)), Hop((1,), (2,)), Hop((2,), (3,)))
    assert Route(hops, (0.4, 0.4, 0.4), 0.4).carried == pytest.approx(0.4)
    assert Route(hops, (0.5, -0.0001, 0.5), 0.5).carried == pytest.approx(-0.0001)
    assert Route(hops[:2], (0.1, 0.6), 0.2).carried == pytest.approx(0.1)  # the first hop's cut undoes the second's


def test_the_ways_of_a_hop_are_told_by_path_and_layers() -> None:
    lens = Lens.load("atlas-mamba1")
    mixers = lens.hooks.mixers
    edges = [Edge(mixers[n], Paths.CONV, 0, 1) for n in (5, 7, 8, 9, 11)]
    assert ways(edges) == "conv of layers 5, 7-9, 11"


def kept(work: FlowWork, batch: Any, edges: Any) -> float:
    """The answer's probability with these edges alone, by plain knockouts, one for each layer and path."""
    time = batch.ids.shape[1]
    masks = {where: torch.ones(time, time, dtype=torch.bool).tril(-1) for where in work.where}
    for edge in edges:
        mixer = next(m for m in work.lens.hooks.mixers if m.layer == edge.layer)
        masks[mixer, Paths.named(edge.path)][edge.target, edge.source] = False
    with without_edges(work.lens, masks, work.features):
        return float(work.lens.last_logits(batch).softmax(-1)[0, batch.targets[0]])


def test_a_circuit_keeps_the_answer_and_can_spare_no_edge() -> None:
    lens = Lens.load("atlas-mamba2")
    facts = facts_of(lens, 2, wording="near")
    flow = lens.flow(facts, certify=40, progress=False)
    found = flow.circuit(0.9, progress=False)
    for fact in facts:
        rows = found[found.fact_id == fact.id]
        assert (rows.kept >= 0.9).all() and (rows.edges == len(rows)).all() and len(rows) < rows.of.iloc[0]
        work = work_of(lens, Facts([fact]))
        (prompt,) = work.prompts.values()
        batch = next(lens.batches([prompt]))
        prob = float(flow.base.set_index("fact_id").prob[fact.id])
        edges = list(rows.itertuples())
        assert kept(work, batch, edges) / prob == pytest.approx(rows.kept.iloc[0], abs=1e-3)
        for number in range(min(3, len(edges))):
            without = kept(work, batch, edges[:number] + edges[number + 1 :]) / prob
            assert without < 0.9 and rows.cost.iloc[number] == pytest.approx(rows.kept.iloc[0] - without, abs=1e-3)
    curve = flow.faithfulness(progress=False)
    assert set(curve.order) == {"effect", "attention", "random"}
    assert np.allclose(curve[curve.share_edges == 1.0].kept, 1.0, atol=1e-3)
    with pytest.raises(MambalensError, match="keep=0"):
        flow.circuit(0)


def test_all_edges_kept_is_the_model(far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    work = work_of(lens, facts[:1])
    (prompt,) = work.prompts.values()
    batch = next(lens.batches([prompt]))
    listed = work.edges(len(prompt.ids))
    prob = float(lens.last_logits(batch).softmax(-1)[0, prompt.target_id])
    everything = np.arange(len(listed.where))
    assert Ablated(work, batch, listed, prob).kept([everything]) == pytest.approx(1.0, abs=1e-5)
    assert Losses(work, batch, listed, prob).of([[]]) == pytest.approx([0.0], abs=1e-5)


def test_measures_and_mistakes_are_said(far: tuple[Lens, Facts]) -> None:
    lens, facts = far
    one = facts[:1]
    assert lens.flow(one, measure="logit", points=1, progress=False).measure == "Logit of the target"
    for given, said in (
        ({"measure": "odds"}, "measure='odds'"), ({"method": "fast"}, "method='fast'"), ({"points": 0}, "points=0"),
        ({"certify": -1}, "certify=-1: give 0 or more"),
        ({"target": "first"}, "target='first'"), ({"paths": "erase"}, "path='erase'"),
    ):  # fmt: skip
        with pytest.raises(MambalensError, match=said):
            lens.flow(one, progress=False, **given)


def circuits_of(flow: FlowData, *numbers: Sequence[int]) -> pd.DataFrame:
    """Some edges of each fact, by their numbers among the fact's own."""
    tables = [rows.iloc[list(some)] for (_, rows), some in
              zip(flow.table.groupby("fact_id", sort=False), numbers, strict=True)]  # fmt: skip
    return pd.concat(tables)[["model", "fact_id", *EDGE]]


@pytest.fixture(scope="module")
def alike() -> FlowData:
    """Four prompts of the same tokens in the same pieces, so that an edge's number says its class."""
    fact = load_facts("atlas").where(wording="far")[0]
    lens = Lens.load("atlas-mamba1")
    return made([replace(fact, id=str(n)) for n in range(4)], lens, layers=3)


def test_circuits_that_are_the_same_agree_wholly_and_disjoint_ones_not_at_all(alike: FlowData) -> None:
    count = len(alike.table) // 4
    some = list(range(0, count, 7))
    same = stability(alike, circuits_of(alike, *[some] * 4), 20).iloc[0]
    assert (same.facts, same.splits) == (4, 20)
    assert same.agreement == same.agreement_low == same.agreement_high == 1
    assert 0 < same.by_chance_low <= same.by_chance <= same.by_chance_high < 0.9
    kinds = alike.table.head(count).groupby(CLASS, observed=True, sort=False).ngroup().to_numpy()
    apart = [np.flatnonzero(kinds % 4 == n).tolist() for n in range(4)]
    none = stability(alike, circuits_of(alike, *apart), 20).iloc[0]
    assert none.agreement == none.agreement_high == 0 < none.by_chance


def test_the_agreement_of_halves_is_counted_by_hand(alike: FlowData) -> None:
    """Classes are counted once in a fact; halves of two and two facts, of three different ways to halve them."""
    kinds = alike.table.head(len(alike.table) // 4).groupby(CLASS, observed=True, sort=False).ngroup()
    first = [int(np.flatnonzero(kinds == n)[0]) for n in range(4)]
    twice = next(np.flatnonzero(kinds == n)[:2].tolist() for n in range(4, int(kinds.max())) if (kinds == n).sum() > 1)
    circuits = circuits_of(alike, [first[0], *twice], [first[0], twice[1]], [first[0], first[1]], [first[1]])
    # {a b} {a b} {a c} {c}: shares a 1, b 1 | a 1/2, c 1; and twice a 1, b 1/2, c 1/2 | a 1/2, b 1/2, c 1/2.
    wanted = [0.5 / 3, 1.5 / 2]
    found = stability(alike, circuits, 300, seed=3).iloc[0]
    assert [found.agreement_low, found.agreement_high] == pytest.approx(wanted)
    assert found.agreement == pytest.approx((wanted[0] + 2 * wanted[1]) / 3, abs=0.05)


def test_halves_are_those_of_the_seed_and_what_does_not_fit_is_refused(alike: FlowData) -> None:
    draw = np.random.default_rng(0)
    count = len(alike.table) // 4
    circuits = circuits_of(alike, *(draw.choice(count, 30, replace=False) for _ in range(4)))
    one, again, other = (stability(alike, circuits, 30, seed) for seed in (1, 1, 2))
    assert one.equals(again) and not one.equals(other)
    assert one.equals(stability(alike, circuits.astype({"mixer": str, "path": str}), 30, 1))
    whole = FlowVerbs.with_verbs(alike).stability(circuits, 30, 1)
    assert whole.equals(one)
    with pytest.raises(MambalensError, match="splits=0"):
        stability(alike, circuits, 0)
    with pytest.raises(MambalensError, match="no layer and no path"):
        stability(alike, circuits.drop(columns=["layer", "path"]))
    with pytest.raises(MambalensError, match="there for 1 fact: halves need two"):
        stability(alike, circuits[circuits.fact_id == "2"])
    with pytest.raises(MambalensError, match="no edge .* of '0' in 'atlas-mamba1'"):
        stability(alike, circuits.assign(layer=99))
