"""Figures of a flow: what is in them, not how their pixels are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from flows import made
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mambalens import Fact, Lens, MambalensError, load_facts
from mambalens.figures import certificate, faithfulness, flow_by_piece, graph
from mambalens.figures.flow_graph import HALO
from mambalens.figures.flow_pieces import pieces_of
from mambalens.figures.style import PATH_STYLES
from mambalens.flow.data import FlowData
from mambalens.flow.table import levels

LENS = Lens.load("atlas-mamba1")
SHORT = Fact("The capital of Peru is", "Peru", " Lima", "capital", "short")
FAR = load_facts("atlas").where(wording="far")[:6]
FLOW = made([SHORT, *FAR], LENS)
DEEP = made(FAR[:1], LENS, layers=24, paths=("main", "conv", "erase"))


def lines_of(figure: Figure) -> dict[int, Line2D]:
    """Lines of edges by their row in the table."""
    lines = [line for line in figure.axes[0].lines if str(line.get_gid()).startswith("edge:")]
    return {int(str(line.get_gid()).removeprefix("edge:")): line for line in lines}


def texts(figure: Figure) -> str:
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text")))


@pytest.mark.parametrize("flow", [FLOW, DEEP], ids=["12 layers", "24 layers"])
def test_a_graph_shows_the_strongest_edges_and_says_what_it_leaves_out(flow: FlowData) -> None:
    fact_id = flow.base.fact_id.iloc[-1]
    figure = graph(flow, fact_id, most=40)
    strongest = flow.strongest(40, fact_id)
    assert set(lines_of(figure)) == set(strongest.index)
    table = flow.table[flow.table.fact_id == fact_id]
    whole = table.exact.fillna(table.attributed).abs().sum()
    share = 100 * strongest.effect.abs().sum() / whole
    said = texts(figure)
    assert f"40 of {len(table):,} edges, {share:.0f} % of the absolute effect" in said
    assert f"{strongest.exact.notna().sum()} of the 40 are exact" in said
    base = flow.base[flow.base.fact_id == fact_id].iloc[0]
    assert flow.models[0] in said and f"= {base.prob:.3g}" in said and "log-odds of the target (nats)" in said


def test_an_edge_has_its_places_its_paths_colour_its_width_its_certificate_and_its_sign() -> None:
    figure = graph(FLOW, "short", most=60)
    strongest, lines = FLOW.strongest(60, "short"), lines_of(figure)
    widest = max(line.get_linewidth() for line in lines.values())
    for index, edge in strongest.iterrows():
        line = lines[index]
        (x0, x1), (y0, y1) = line.get_xdata(), line.get_ydata()
        assert (round(x0), round(x1)) == (edge.source, edge.target)
        # The scan reads behind the convolution of its layer.
        begin, end = (0, 0.5) if edge.path == "conv" else (0.5, 1)
        assert (y0, y1) == (pytest.approx(edge.layer + begin, abs=0.2), pytest.approx(edge.layer + end, abs=0.2))
        assert to_hex(line.get_color()).upper() == PATH_STYLES[edge.path][0]
        assert (line.get_linestyle() == "-") == bool(np.isfinite(edge.exact))
        relative = abs(edge.effect) / strongest.effect.abs().max()
        assert line.get_linewidth() == pytest.approx(max(relative * widest, 0.7))
    heads = [line.get_marker() for line in figure.axes[0].lines if line.get_marker() in ("|", ">")]
    assert heads.count("|") == (strongest.effect > 0).sum() > 0
    assert len(heads) == 60


def test_without_a_convolution_an_edge_goes_from_layer_to_layer() -> None:
    attention = FlowData(FLOW.table[FLOW.table.path == "main"], FLOW.skipped, FLOW.facts, FLOW.prompts, FLOW.configs)
    for alone in (attention.table, FLOW.table[FLOW.table.path == "conv"]):
        assert (levels(alone).begin == alone.layer).all() and (levels(alone).end == alone.layer + 1).all()
    assert lines_of(graph(attention, "short"))


def test_a_route_is_marked_and_shown_also_where_it_is_weak() -> None:
    table = FLOW.table[FLOW.table.fact_id == "short"]
    weak = table.loc[table.exact.fillna(table.attributed).abs().idxmin()]
    strong = FLOW.strongest(1, "short").iloc[0]
    route = [(int(edge.layer), edge.path, int(edge.source), int(edge.target)) for edge in (weak, strong)]
    figure = graph(FLOW, "short", route, most=10)
    assert set(lines_of(figure)) == {*FLOW.strongest(10, "short").index, weak.name}
    halos = [line for line in figure.axes[0].lines if line.get_color() == HALO]
    assert len(halos) >= 2 and "the marked route" in texts(figure)
    assert HALO not in {line.get_color() for line in graph(FLOW, "short").axes[0].lines}
    with pytest.raises(MambalensError, match=r"\(99, 'conv', 0, 1\) is not an edge .* 6 tokens and 12 layers"):
        graph(FLOW, "short", [(99, "conv", 0, 1)])


def test_of_a_hop_with_many_edges_those_are_marked_that_are_shown_and_its_strongest() -> None:
    strongest = FLOW.strongest(200, "short")
    names = [tuple(edge) for edge in strongest[["layer", "path", "source", "target"]].itertuples(index=False)]
    route = [[names[150], names[3], names[100]], [names[120], names[199]]]
    figure = graph(FLOW, "short", route, most=10)
    assert set(lines_of(figure)) == {*strongest.index[:10], strongest.index[120]}
    assert len([line for line in figure.axes[0].lines if line.get_color() == HALO and line.get_zorder() > 1]) == 2
    assert "the marked route\n(2 of its 5 edges)" in texts(figure)


def test_tokens_are_visible_with_the_subject_in_bold() -> None:
    figure = graph(FLOW, "short")
    labels = figure.axes[0].get_xticklabels()
    tokens, subject = FLOW.prompts.set_index("fact_id").loc["short", ["tokens", "subject"]]
    assert [label.get_text() for label in labels] == [token.replace(" ", "·") for token in tokens]
    assert [i for i, label in enumerate(labels) if label.get_fontweight() == "bold"] == list(subject)


@pytest.mark.parametrize("flow", [FLOW, DEEP], ids=["12 layers", "24 layers"])
def test_nothing_of_a_graph_is_cut_off_and_labels_do_not_overlap(flow: FlowData) -> None:
    for fact_id in flow.base.fact_id:
        figure = graph(flow, fact_id)
        figure.canvas.draw()
        whole = figure.bbox
        every = [*figure.texts, *figure.axes[0].get_xticklabels(), *figure.axes[0].texts, figure.axes[0].get_legend()]
        for one in every:
            box = one.get_window_extent()
            assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1, one
        legend = figure.axes[0].get_legend().get_window_extent()
        assert not legend.overlaps(figure.axes[0].texts[0].get_window_extent())


def test_a_graph_refuses_what_it_cannot_draw_and_says_what_to_do() -> None:
    with pytest.raises(MambalensError, match="fact_id='shirt' is not in the flow: .*'short'"):
        graph(FLOW, "shirt")
    with pytest.raises(MambalensError, match="most=0"):
        graph(FLOW, "short", most=0)
    two = FlowData(
        pd.concat([FLOW.table, FLOW.table.assign(model="other")], ignore_index=True), FLOW.skipped,
        FLOW.facts, FLOW.prompts, FLOW.configs,
    )  # fmt: skip
    with pytest.raises(MambalensError, match="several values of model .*name one, for example model='atlas-mamba1'"):
        graph(two, "short")
    assert lines_of(graph(two, "short", model="atlas-mamba1"))
    with pytest.raises(MambalensError, match="model='mamba' is not in the flow of 'short': .*'atlas-mamba1'"):
        graph(two, "short", model="mamba")
    for name, flow in (
        ("tokens", FlowData(FLOW.table, FLOW.skipped, FLOW.facts, FLOW.prompts.iloc[:0], FLOW.configs)),
    ):
        with pytest.raises(MambalensError, match=f"without the {name} of 'short'"):
            graph(flow, "short")


# --- over facts


def test_pieces_are_means_over_the_facts_that_have_both() -> None:
    found = pieces_of(FLOW, most=100)
    table = FLOW.by_piece()
    assert len(found.pairs) == found.of and found.share == pytest.approx(100) and found.facts == 7
    for row, (source, target) in enumerate(found.pairs):
        part = table[(table.source_piece == source) & (table.target_piece == target)]
        facts = part.fact_id.unique()
        assert found.n[row] == len(facts)
        for path, grid in found.means.items():
            for layer in (0, 4, 8, 11):
                cell = part[(part.path == path) & (part.layer == layer)].set_index("fact_id").effect
                expected = cell.reindex(facts).fillna(0).mean()
                assert grid[row, layer] == pytest.approx(expected, abs=1e-12)
        assert found.total[row][0] == pytest.approx(part.groupby("fact_id").effect.sum().mean())
    few = pieces_of(FLOW, most=4)
    assert len(few.pairs) == 4 and few.of == found.of and few.share < 100
    assert ("subject_last", "after_subject") in few.pairs and ("after_subject", "last") in few.pairs


def test_the_flow_by_piece_states_facts_and_what_is_left_out() -> None:
    figure = flow_by_piece(FLOW, most=5)
    said = texts(figure)
    found = pieces_of(FLOW, most=5)
    assert f"5 of {found.of} pairs of pieces, {found.share:.0f} % of the absolute mean effects" in said
    assert re.search(r"subject_last → after_subject +\(6\)|subject_last → last +\(7\)", said) and "of 7" in said
    assert "scan" in said and "convolution" in said
    assert len([axis for axis in figure.axes if axis.images]) == 2
    assert "all" in texts(flow_by_piece(FLOW, most=100)).split("pairs of pieces")[0]
    empty = FlowData(FLOW.table.iloc[:0], FLOW.skipped, FLOW.facts, FLOW.prompts, FLOW.configs)
    with pytest.raises(MambalensError, match="no edges"):
        flow_by_piece(empty)


def test_a_layer_without_a_path_is_not_a_layer_without_effect() -> None:
    table = FLOW.table[~((FLOW.table.path == "conv") & (FLOW.table.layer == 3))]
    hybrid = FlowData(table, FLOW.skipped, FLOW.facts, FLOW.prompts, FLOW.configs)
    means = pieces_of(hybrid).means
    assert np.isnan(means["conv"][:, 3]).all() and not np.isnan(np.delete(means["conv"], 3, 1)).any()
    assert not np.isnan(means["main"]).any()


# --- how far it can be trusted


def curve(models: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    rows = [
        (model, order, int(share * 5000), share, share / (share + half), share / (share + half) - 0.05, 1.0)
        for model in models
        for order, half in (("effect", 0.01), ("attention", 0.1), ("random", 0.5))
        for share in (0.0, 0.001, 0.01, 0.1, 1.0)
    ]
    return pd.DataFrame(rows, columns=["model", "order", "edges", "share_edges", "kept", "low", "high"])


def test_a_faithfulness_curve_has_a_line_and_a_band_for_each_order_and_a_panel_for_each_model() -> None:
    table = curve()
    figure = faithfulness(table)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    for axis in figure.axes:
        assert axis.get_xscale() == "log" and len(axis.collections) == 3
        drawn = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
        assert set(drawn) == {"by effect", "by attention weight", "at random"}
        rows = table[(table.model == "a") & (table.order == "effect") & (table.edges > 0)]
        assert drawn["by effect"].get_xdata() == pytest.approx(100 * rows.share_edges.to_numpy())
        assert drawn["by effect"].get_ydata() == pytest.approx(rows.kept.to_numpy())
    assert "no edge kept" in texts(figure)
    with pytest.raises(MambalensError, match="has no kept and no low"):
        faithfulness(table.drop(columns=["kept", "low"]))
    with pytest.raises(MambalensError, match="order='weight' is not an order"):
        faithfulness(table.assign(order="weight"))
    with pytest.raises(MambalensError, match="no row"):
        faithfulness(table.iloc[:0])


def test_a_certificate_holds_attributed_against_exact_and_says_how_they_agree() -> None:
    figure = certificate(FLOW)
    cut = FLOW.table[FLOW.table.exact.notna()]
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])
    assert len(drawn) == len(cut)
    assert sorted(map(tuple, drawn)) == sorted(zip(cut.attributed, cut.exact, strict=True))
    strong = cut[cut.chosen == "top"] if "chosen" in cut else cut
    same = 100 * (np.sign(strong.attributed) == np.sign(strong.exact)).groupby(strong.fact_id).mean().median()
    rho = np.median([rows.attributed.corr(rows.exact, "spearman") for _, rows in strong.groupby("fact_id")])
    said = texts(figure)
    assert f"rank correlation {rho:.2f},\nsigns agree in {same:.0f} % in the median fact" in said
    assert f"{len(cut)} edges cut, of 7 facts" in said
    uncut = FlowData(FLOW.table.assign(exact=np.nan), FLOW.skipped, FLOW.facts, FLOW.prompts, FLOW.configs)
    with pytest.raises(MambalensError, match="nothing to compare"):
        certificate(uncut)


@pytest.fixture(autouse=True)
def no_figure_is_left_open() -> Iterator[None]:
    from matplotlib import pyplot as plt

    yield
    assert plt.get_fignums() == []
