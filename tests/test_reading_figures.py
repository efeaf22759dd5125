"""Figures of contributions and of the logit lens show the numbers of their tables."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
from matplotlib.axes import Axes
from test_contributions import FACTS, lens_on

from mambalens import MambalensError
from mambalens.figures.style import lines, signed, visible


def grid(axis: Axes) -> np.ndarray:
    return np.ma.filled(axis.images[0].get_array().astype(float), np.nan)


def test_bars_are_the_parts_of_layers_and_cells_the_sources_of_mixers() -> None:
    lens = lens_on("nemotron_h")  # layers 1 and 3 have no token mixer
    found = lens.contributions(FACTS)
    figure = found.plot("a")
    bars, _, mixers, _ = figure.axes
    table = found.table[found.table.fact_id == "a"]
    heights = sorted(float(bar.get_height()) for bar in bars.patches)
    shown = table[table.part != "bias"].groupby(["layer", "part"]).contribution.sum()
    np.testing.assert_allclose(heights, sorted(shown), atol=1e-12)
    values = grid(mixers)
    assert np.isnan(values[:, [1, 3]]).all() and not np.isnan(values[:, [0, 2, 4]]).any()
    here = table[(table.part == "mixer") & (table.layer == 2) & (table.source == 1)].contribution.sum()
    assert values[1, 2] == pytest.approx(here)
    names = [label.get_text() for label in mixers.get_yticklabels()]
    assert names == [visible(token) for token in lens.prompt(FACTS[0]).tokens]
    title = figure.get_suptitle().replace("\n", " ")
    assert "'Lima'" in title and signed(float(found.scores.score[0])) in title


def test_over_several_facts_cells_are_means_of_pieces() -> None:
    lens = lens_on("llama")
    found = lens.contributions(FACTS)
    mixers = found.plot().axes[2]
    summary = found.where(part="mixer").summary(by=("layer", "piece"))
    for row, label in enumerate(mixers.get_yticklabels()):
        piece, count = label.get_text().replace(")", "").split("  (")
        of_piece = summary[summary.piece == piece]
        assert (of_piece.n == int(count)).all()
        np.testing.assert_allclose(grid(mixers)[row], of_piece.sort_values("layer")["mean"], atol=1e-12)
    with pytest.raises(MambalensError, match="no contributions to the fact 'z'"):
        found.plot("z")


def test_the_logit_lens_has_a_cell_for_every_layer_and_token() -> None:
    lens = lens_on("lfm2")
    found = lens.logits_by_layer(FACTS)
    figure = found.plot("b", "rank")
    axis = figure.axes[0]
    table = found.table[found.table.fact_id == "b"]
    wanted = table.pivot(index="position", columns="layer", values="rank")
    np.testing.assert_array_equal(grid(axis), wanted)
    assert len(axis.texts) == wanted.size  # few layers: the top token stands in every cell
    assert not found.plot("b", words=False).axes[0].texts
    means = found.plot(metric="prob").axes[0]
    summary = found.summary("prob").pivot(index="piece", columns="layer", values="mean")
    first = means.get_yticklabels()[0].get_text().split("  (")[0]
    np.testing.assert_allclose(grid(means)[0], summary.loc[first], atol=1e-12)
    with pytest.raises(MambalensError, match="has no fact 'z'"):
        found.plot("z")
    with pytest.raises(MambalensError, match="'ranks' is not a metric"):
        found.plot("a", "ranks")


def beside(axis: Axes) -> dict[int, str]:
    """What stands at the right of rows."""
    (right,) = axis.child_axes
    return {round(at): label.get_text() for at, label in zip(right.get_yticks(), right.get_yticklabels(), strict=True)}


@pytest.mark.parametrize("metric", ["log_odds", "rank"])
def test_the_mean_logit_lens_says_the_interval_of_the_best_layer(metric: str) -> None:
    found = lens_on("llama").logits_by_layer(FACTS)
    axis = found.plot(metric=metric).axes[0]
    summary, said = found.summary(metric), beside(axis)
    frames = {round(frame.get_y() + 0.46): round(frame.get_x() + 0.46) for frame in axis.patches}
    for row, label in enumerate(axis.get_yticklabels()):
        of_piece = summary[summary.piece == label.get_text().split("  (")[0]].sort_values("layer")
        means = of_piece["mean"].to_numpy()
        best = of_piece.iloc[means.argmin() if metric == "rank" else means.argmax()]
        assert frames[row] == best.layer
        assert said[row].replace("−", "-") == f"{best['mean']:z.2f} [{best.low:z.2f}, {best.high:z.2f}]"


def test_contributions_of_several_facts_say_the_interval_of_the_largest_of_a_source() -> None:
    found = lens_on("llama").contributions(FACTS)
    mixers = found.plot().axes[2]
    summary, said = found.where(part="mixer").summary(by=("layer", "piece")), beside(mixers)
    assert said
    for row, text in said.items():
        of_piece = summary[summary.piece == mixers.get_yticklabels()[row].get_text().split("  (")[0]]
        known = of_piece[(of_piece.low > 0) | (of_piece.high < 0)]
        best = known.loc[known["mean"].abs().idxmax()]
        assert text.replace("−", "-") == f"{best['mean']:z.2f} [{best.low:z.2f}, {best.high:z.2f}]"


@pytest.mark.parametrize("width", [20, 40, 97, 400])
def test_titles_take_few_lines_of_about_one_length(width: int) -> None:
    text = "Log-odds of the target (nats): +7.61 = token mixers +11.38, MLPs +2.96, embedding +0.03, biases −6.77"
    shown = lines(text, width)
    assert " ".join(shown) == text and max(map(len, shown)) <= width
    assert len(shown) == len(textwrap.wrap(text, width))
    longest = max(map(len, text.split()))
    assert max(map(len, shown)) - min(map(len, shown)) <= 2 * longest
    assert lines("", width) == [] and lines("one", 2) == textwrap.wrap("one", 2)


def test_a_title_says_what_is_framed_where_something_is() -> None:
    found = lens_on("llama").contributions(FACTS)
    assert "framed: where a source does most" in found.plot().get_suptitle().replace("\n", " ")
    assert "framed" not in found.plot("a").get_suptitle()
