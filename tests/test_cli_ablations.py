"""What stands in the place of what is cut, on the command line and kept in folders of flows."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from test_cli import run

from mambalens import Fact, Lens, MambalensError, SweepResult, load_facts
from mambalens.cli.app import app
from mambalens.hooks.knockout import Paths
from mambalens.result import Flow
from mambalens.sweep.ablation import Asked, values_for

MODEL = "atlas-gpt-neox"
PERU = ["--prompt", "In Peru the capital is", "--subject", "Peru", "--target", "Lima"]
FACT = Fact("In Peru the capital is", "Peru", "Lima")
CHAD = ["--other", "In Chad the capital is", "--other-subject", "Chad"]
NEAR = ["--where", "wording=near", "--where", "relation=capital"]
FACTS = load_facts("atlas").where(relation="capital", wording="near").sample(3)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, MambalensError), done.output
    return str(done.exception)


def lost(lens: Lens, instead: Any, edges: torch.Tensor) -> float:
    """Share of the answer that is lost with edges cut by hooks in every layer and on every path."""
    prompt = lens.prompt(FACT)
    ids = torch.tensor([prompt.ids])
    with torch.no_grad(), ExitStack() as stack:
        base = lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id]
        for mixer in lens.hooks.mixers:
            for path in mixer.paths & (Paths.MAIN | Paths.CONV):
                cut = lens.hooks.knockout(layers=[mixer.layer], path=path.names[0], edges=edges, instead=instead)
                stack.enter_context(cut)
        return float(1 - lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id] / base)


@pytest.mark.parametrize("put_in", [["--ablation", "resample", "--keys", *CHAD],
                                    ["--ablation", "mean", "--over", "atlas", "--over-where", "wording=near",
                                     "--over-where", "relation=capital"]])  # fmt: skip
def test_a_heatmap_on_the_command_line_is_the_lens_own(
    put_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, heatmap = [], Lens.heatmap

    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn.append(heatmap(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(Lens, "heatmap", watched)
    run("heatmap", MODEL, *PERU, "--window", "6", *put_in, "--out", str(tmp_path / "a.png"))
    asked: dict[str, Any] = (
        {"ablation": "mean", "over": load_facts("atlas").where(relation="capital", wording="near")}
        if "mean" in put_in
        else {"ablation": "resample", "other": Fact("In Chad the capital is", "Chad", "N'Djamena"), "keys": True}
    )
    lens = Lens.load(MODEL)
    slow, zero = heatmap(lens, FACT, 6, **asked), heatmap(lens, FACT, 6)
    found, expected, without = (one.axes[0].images[0].get_array() for one in (drawn[0], slow, zero))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - without).max() > 1
    assert drawn[0].axes[0].get_title() == slow.axes[0].get_title()


def test_a_flow_on_the_command_line_cuts_with_the_ablation_throughout(tmp_path: Path) -> None:
    out = tmp_path / "flow"
    arguments = ["flow", MODEL, *NEAR, "--limit", "3", "--points", "1", "--certify", "4", "--routes", "1",
                 "--circuit", "0.8", "--out", str(out)]  # fmt: skip
    text = run(*arguments, "--ablation", "mean", "--keys")
    assert text.count("means put in, of keys too (mean ablation)") == 3  # edges, routes by piece, circuits
    flow = Flow.load(out)
    assert flow.ablation == "mean+keys" and flow.configs[0].ablation == "mean+keys"
    for name in ("routes", "routes_by_piece", "circuit"):
        assert set(pd.read_csv(out / f"{name}.csv").ablation) == {"mean+keys"}
    assert "of keys too" in (out / "flow.html").read_text()
    assert "mean ablation" in flow.plot_pieces()._suptitle.get_text()
    lens = Lens.load(MODEL)
    facts = lens.known(load_facts("atlas").where(wording="near", relation="capital"), limit=3, progress=False)
    other = lens.flow(facts, points=1, progress=False)
    certified = other.certify(4, 0, progress=False, ablation="mean", keys=True, over=facts)
    np.testing.assert_allclose(flow.table.exact, certified.table.exact, atol=1e-4)
    zero = other.certify(4, 0, progress=False)
    assert (flow.table.exact - zero.table.exact).abs().max() > 1e-2
    before = refused(*arguments, "--ablation", "mean")
    assert "holds another run (keys: true there, null now)" in before
    assert "holds another run" in refused(*arguments)


def test_a_flow_of_one_prompt_takes_another_prompt(tmp_path: Path) -> None:
    text = run("flow", "atlas-mamba1", *PERU, "--points", "1", "--certify", "6", "--routes", "2", *CHAD,
               "--ablation", "resample", "--circuit", "0.9", "--out", str(tmp_path / "flow"))  # fmt: skip
    assert "another prompt's values put in (resample ablation)" in text
    lens = Lens.load("atlas-mamba1")
    lens.model.requires_grad_(False)
    instead = values_for(
        lens, lens.prompt(FACT), Asked.of("resample", other=Fact("In Chad the capital is", "Chad", "."))
    )
    routes = pd.read_csv(tmp_path / "flow" / "routes.csv").assign(
        **{name: lambda table, name=name: table[name].map(json.loads) for name in ("relays", "hop_pct")}
    )
    time, start = len(lens.prompt(FACT).ids), lens.prompt(FACT).positions("subject")
    for row in routes.itertuples():
        stops = [start, *row.relays, [time - 1]]
        masks = [torch.zeros(time, time, dtype=torch.bool) for _ in stops[1:]]
        for mask, sources, targets, loss in zip(masks, stops, stops[1:], row.hop_pct, strict=False):
            for target in targets:
                mask[target, sources] = True
            assert abs(100 * lost(lens, instead, mask.tril(-1)) - loss) < 0.05
        together = torch.stack(masks).any(0).tril(-1)
        assert abs(100 * lost(lens, instead, together) - row.joint_pct) < 0.05
        assert row.ablation == "resample"


def test_a_flow_with_an_ablation_resumes_and_leaves_out_what_has_no_partner(tmp_path: Path) -> None:
    lens = Lens.load(MODEL)
    asked = {"points": 1, "certify": 3, "sample": 2, "ablation": "resample", "progress": False, "block_size": 1}
    pairs = FACTS.pairs(same=None)
    asked["other"] = pairs[:2]
    flow = lens.flow(FACTS, out=tmp_path / "kept", **asked)
    again = lens.flow(FACTS, out=tmp_path / "kept", **asked)
    pd.testing.assert_frame_equal(flow.table, again.table)
    alone = lens.flow(FACTS, **asked)
    np.testing.assert_allclose(flow.table.exact, alone.table.exact, atol=1e-5)
    assert flow.base.fact_id.nunique() == 2
    assert flow.skipped.reason.tolist() == ["nothing to put in: it is in none of the pairs"]
    with pytest.raises(MambalensError, match="holds another run .*others: "):
        lens.flow(FACTS, out=tmp_path / "kept", **asked | {"other": FACTS[0]})
    # What is asked for later begins with nothing again, and says so.
    assert flow.certify(3, 2, progress=False).ablation == "zero"
    assert set(flow.routes(k=1, progress=False).ablation) == {"zero"}
    with pytest.raises(MambalensError, match="The routes are of ablation 'zero', and not of 'mean'"):
        flow.routes_by_piece(routes=flow.routes(k=1, progress=False), progress=False, ablation="mean", over=FACTS)
    kept = flow.faithfulness(progress=False, ablation="mean", over=FACTS)
    assert set(kept.ablation) == {"mean"} and abs(kept.kept[kept.share_edges == 1] - 1).max() < 1e-4
    with pytest.raises(MambalensError, match="ablation='mean' is of edges that are cut, and none is"):
        lens.flow(FACTS, ablation="mean", progress=False)


def test_features_knocked_out_one_by_one_read_what_is_put_in(tmp_path: Path) -> None:
    lens = Lens.load(MODEL)
    lens.model.requires_grad_(False)
    asked: dict[str, Any] = {"ablation": "resample", "other": FACTS[2], "keys": True}
    found = lens.causal_features(FACTS[:2], layers=[1], progress=False, **asked)
    assert set(found.table.ablation) == {"resample+keys"}
    for number, features in enumerate(found.table.features):
        for fact, drop in zip(FACTS[:2], found.drops[:, number], strict=True):
            token = lens.prompt(fact).target_id
            base = lens.predict(fact, 500).set_index("token_id").prob[token]
            with lens.knockout(fact, layers=[1], features=list(features), **asked):
                prob = lens.predict(fact, 500).set_index("token_id").prob[token]
            assert abs(100 * (base - prob) / base - drop) < 2e-2
    run(
        "features",
        MODEL,
        *NEAR,
        "--limit",
        "4",
        "--causal",
        "--block",
        "4",
        "--ablation",
        "mean",
        "--out",
        str(tmp_path),
    )
    assert set(pd.read_csv(tmp_path / "causal.csv").ablation) == {"mean"}


def test_a_sweep_on_the_command_line_takes_keys_and_facts_to_average_over(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    arguments = ["sweep", MODEL, *NEAR, "--limit", "3", "--window", "10", "--source", "subject", "--ablation", "mean",
                 "--keys", "--over", "atlas", "--over-where", "wording=near"]  # fmt: skip
    run(*arguments, "--out", out)
    found = SweepResult.load(out)
    lens = Lens.load(MODEL)
    over = load_facts("atlas").where(wording="near")
    known = lens.known(load_facts("atlas").where(wording="near", relation="capital"), limit=3, progress=False)
    slow = lens.sweep(known, "subject", window=10, ablation="mean", keys=True, over=over, progress=False)
    np.testing.assert_allclose(found.table.prob, slow.table.prob, rtol=1e-3)
    assert set(found.table.ablation) == {"mean+keys"}
    dry = run(
        *arguments[:8], "--window", "10", "--source", "subject", "--ablation", "resample", "--dry-run", "--out", out
    )
    assert "Nothing was written" in dry


def test_what_makes_no_sense_is_refused_in_a_sentence(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "no")]
    one = [MODEL, *PERU, *out]
    for arguments, said in (
        (["heatmap", *one, "--ablation", "mean"], "--prompt is one alone: say which, --over"),
        (["heatmap", *one, "--ablation", "resample"], "give it with --other and --other-subject"),
        (["heatmap", *one, "--ablation", "resample", *CHAD[:2]], "give --other and --other-subject, both or neither"),
        (["heatmap", *one, *CHAD], "other is of ablation='resample', but ablation='zero'"),
        (["heatmap", *one, "--over", "atlas"], "--over names facts that means are taken over, but --ablation is zero"),
        (["heatmap", *one, "--over-where", "wording=near"], "give --over too"),
        (["heatmap", *one, "--keys"], "ablation='zero' puts in nothing"),
        (["heatmap", *one, "--ablation", "men"], "did you mean 'mean'"),
        (["flow", *one, "--ablation", "mean"], "--prompt is one alone: say which, --over"),
        (["flow", MODEL, *NEAR, *out, "--ablation", "mean", "--certify", "0"], "edges that are cut, and none is"),
        (
            ["features", MODEL, *out, "--ablation", "mean"],
            "Nothing is knocked out without --causal: leave out --ablation",
        ),
        (
            ["sweep", MODEL, *out, "--ablation", "zero", "--ablation", "mean", "--keys"],
            "ablation has 'zero', which puts in",
        ),
        (["sweep", MODEL, *out, "--over", "atlas"], "give ablation mean too"),
    ):
        assert said in refused(*arguments), arguments
    assert not (tmp_path / "no").exists()
