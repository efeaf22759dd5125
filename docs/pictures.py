"""Draws the pictures of the documentation from the bundled checkpoints: `python docs/pictures.py` (a few minutes)."""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from PIL import Image

from mambalens import Fact, Lens, load_facts
from mambalens.experiments.comparison import compare
from mambalens.figures import certificate
from mambalens.hooks.delta import DeltaInputs, delta_attention
from mambalens.result import Flow

# Okabe & Ito's palette. Hatches, markers and dashes say the same as colours, and numbers stand in cells.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, GREY, PALE = "#0072B2", "#D55E00", "#777777", "#DDDDDD"
DIVERGING = LinearSegmentedColormap.from_list("blue-white-vermillion", [BLUE, "#FFFFFF", VERMILLION])
OUT = Path(__file__).parent / "pages" / "pictures"


def cut_line() -> Line2D:
    """What a cut edge looks like, for legends."""
    return Line2D(
        [], [], color=VERMILLION, linewidth=1.6, linestyle=(0, (4, 3)), marker="x", markeredgewidth=2.2, markersize=9,
        label="knocked out",
    )  # fmt: skip


def near() -> Fact:
    """A short prompt whose subject, of three tokens, stands right before the last token."""
    return next(fact for fact in load_facts("atlas") if fact.prompt == "The capital of New Zealand is")


def far() -> Fact:
    """A prompt whose subject comes first and the relation last."""
    facts = load_facts("atlas").where(wording="far", relation="capital")
    return next(fact for fact in facts if fact.subject == "Argentina")


def words(tokens: Sequence[str]) -> list[str]:
    """Tokens with their spaces visible."""
    return [token.replace(" ", "·") for token in tokens]


def bare(axis: Any) -> None:
    """No frame and no ticks."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def open_frame(axis: Any) -> None:
    """The frame's left and lower side only."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def cell(
    axis: Any, column: int, row: int, size: tuple[float, float], colour: str = "", hatch: str | None = None
) -> None:
    """A field of a grid: outlined in grey where it has a colour, pale where not."""
    width, height = size
    axis.add_patch(
        Rectangle(
            (column - width / 2, row - height / 2), width, height, facecolor=colour or "white",
            edgecolor=GREY if colour else PALE, hatch=hatch, linewidth=0.8,
        )
    )  # fmt: skip


def roles() -> Figure:
    """Which positions each role names, in two prompts."""
    lens = Lens.load("atlas-mamba1")
    facts = [near(), Fact("On the map Mali is part of", "Mali", "Africa")]
    names = [
        "subject",
        "subject_first",
        "subject_last",
        "relation",
        "relation_minus_last",
        "context",
        "first",
        "last",
        "others",
        "all",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True, layout="constrained")
    for axis, fact in zip(axes, facts, strict=True):
        prompt = lens.prompt(fact)
        target = prompt.positions("last")
        for row, name in enumerate(names):
            found = prompt.positions(name, target)
            for column in range(len(prompt.ids)):
                inside = column in found
                cell(axis, column, row, (0.92, 0.84), SKY if inside else "")
                if inside:
                    axis.plot(column, row, "o", color=BLACK, markersize=4)
        axis.set_xlim(-0.6, len(prompt.ids) - 0.4)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), names, fontsize=9, family="monospace")
        axis.set_xticks(range(len(prompt.ids)), words(prompt.tokens), fontsize=9, rotation=30, ha="left")
        axis.xaxis.tick_top()
        for position in prompt.positions("subject"):
            axis.get_xticklabels()[position].set_fontweight("bold")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def attention_knockout() -> Figure:
    """Effective attention with and without subject → last, in a scan and in attention."""
    cases = [("atlas-mamba2", 10, 9, 100.0, "scan"), ("atlas-gpt-neox", 4, 4, 100.0, "attention")]
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 7.6), layout="constrained")
    for row, (name, layer, head, scale, mixer) in zip(axes, cases, strict=True):
        lens = Lens.load(name)
        prompt = lens.prompt(near())
        ids = torch.tensor([prompt.ids])
        sources, last = prompt.positions("subject"), len(prompt.ids) - 1
        whole = scale * lens.hooks.effective_attention(ids, layer, features=head)[0, 0].numpy()
        with lens.knockout(near(), "subject", "last", layer):
            cut = scale * lens.hooks.effective_attention(ids, layer, features=head)[0, 0].numpy()
        reach = float(np.abs(whole).max())
        for axis, alpha, title in zip(row, (whole, cut), ("as it is", "subject → last knocked out"), strict=True):
            shown = np.where(np.tril(np.ones_like(alpha)) > 0, alpha, np.nan)
            axis.imshow(shown, cmap=DIVERGING, vmin=-reach, vmax=reach, interpolation="nearest")
            axis.set_facecolor("#EEEEEE")
            for t in range(last + 1):
                for s in range(t + 1):
                    gone = alpha is cut and t == last and s in sources
                    colour = "white" if abs(alpha[t, s]) > 0.6 * reach else BLACK
                    text = "0" if gone else f"{alpha[t, s]:.1f}" if mixer == "scan" else f"{alpha[t, s]:.0f}"
                    text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
                    axis.text(
                        s,
                        t,
                        text,
                        ha="center",
                        va="center",
                        fontsize=9,
                        color=colour,
                        zorder=5,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if gone else None,
                    )
            if alpha is cut:
                for s in sources:
                    axis.add_patch(
                        Rectangle(
                            (s - 0.5, last - 0.5),
                            1,
                            1,
                            facecolor="white",
                            edgecolor=BLACK,
                            hatch="////",
                            linewidth=1.6,
                            zorder=3,
                        )
                    )
            axis.set_xticks(
                range(last + 1), words(prompt.tokens), fontsize=9, rotation=45, ha="right", rotation_mode="anchor"
            )
            axis.set_yticks(range(last + 1), words(prompt.tokens), fontsize=9)
            for position in sources:
                axis.get_xticklabels()[position].set_fontweight("bold")
                axis.get_yticklabels()[position].set_fontweight("bold")
            axis.set_title(f"{name}, layer {layer}, head {head}: {mixer}\n{title}", fontsize=9.5)
            axis.set_xlabel("source s", fontsize=9)
            axis.set_ylabel("target t", fontsize=9)
    figure.supxlabel("Numbers: 100 × alpha[t, s]. Hatched: entries set to zero. Grey: the future.", fontsize=9.5)
    return figure


def scan_state() -> Figure:
    """A channel's state over a prompt, with all inputs and without the subject's."""
    lens = Lens.load("atlas-mamba1")
    fact, layer = far(), 6
    prompt = lens.prompt(fact)
    mixing = lens.hooks.token_mixing(torch.tensor([prompt.ids]), layer)
    dt, A, B = mixing.decay
    kept = torch.ones(len(prompt.ids))
    kept[prompt.positions("subject")] = 0
    subject = prompt.positions("subject")
    half_lives = mixing.half_life(torch.tensor([len(prompt.ids)]))[0, subject[-1]]  # of what its last token writes
    order = half_lives.argsort()
    chosen = [int(order[round(part * (len(order) - 1))]) for part in (0.9, 0.3)]

    def states(channel: int, keep: torch.Tensor) -> torch.Tensor:
        """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, one position after the other [T, N]."""
        h, found = torch.zeros(A.shape[1]), []
        for t in range(len(keep)):
            write = dt[0, t, channel] * B[0, t] * mixing.values[0, t, channel] * keep[t]
            h = torch.exp(dt[0, t, channel] * A[channel]) * h + write
            found.append(h)
        return torch.stack(found)

    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.4), sharex=True, layout="constrained")
    positions = np.arange(len(prompt.ids))
    for column, channel in enumerate(chosen):
        whole, without = states(channel, torch.ones_like(kept)), states(channel, kept)
        above, below = axes[:, column]
        above.plot(positions, whole.abs().sum(1), "-o", color=BLACK, markersize=4.5, linewidth=1.4, label="all inputs")
        above.plot(
            positions,
            without.abs().sum(1),
            "--s",
            color=VERMILLION,
            markersize=4,
            linewidth=1.4,
            label="without the subject's inputs",
        )
        above.set_ylim(bottom=0)
        above.set_title(f"channel {channel}: half-life {half_lives[channel]:.0f} tokens", fontsize=10)
        difference = (whole - without).abs().sum(1)
        share = difference / difference.max()
        below.plot(positions[subject[0] :], share[subject[0] :], "-^", color=BLUE, markersize=4.5, linewidth=1.4)
        below.axhline(0.5, color=GREY, linewidth=0.9, linestyle=":")
        below.set_ylim(0, 1.08)
        below.set_xticks(positions, words(prompt.tokens), fontsize=7.5, rotation=90)
        for position in subject:
            below.get_xticklabels()[position].set_fontweight("bold")
        for axis in (above, below):
            axis.axvspan(
                subject[0] - 0.5,
                subject[-1] + 0.5,
                facecolor=ORANGE,
                alpha=0.25,
                hatch="..",
                edgecolor=ORANGE,
                linewidth=0,
            )
            axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            axis.margins(x=0.02)
            open_frame(axis)
            axis.tick_params(axis="x", labelsize=7.5)
    axes[0, 0].set_ylabel("|h$_t$|, sum over the state", fontsize=9)
    axes[1, 0].set_ylabel("what the subject left in h$_t$\n(part of its largest)", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Patch(facecolor=ORANGE, alpha=0.35, hatch="..", edgecolor=ORANGE, linewidth=0))
    figure.legend(handles, [*labels, "the subject"], loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def windows() -> Figure:
    """Which layers each window covers, and what a knockout in it costs."""
    lens = Lens.load("atlas-mamba2")
    facts = lens.known(load_facts("atlas").where(wording="far"), progress=False, limit=50)
    size = 6
    summary = lens.sweep(facts, "subject", window=size, progress=False).summary()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.6, 5.8), sharex=True, height_ratios=[1.5, 1], layout="constrained"
    )
    for start in summary.window_start:
        for layer in range(lens.n_layers):
            inside = start <= layer < start + size
            cell(above, start, layer, (0.84, 0.84), *((SKY, "///") if inside else ()))
    above.set_ylim(-0.6, lens.n_layers - 0.4)
    above.set_yticks(range(lens.n_layers))
    above.set_ylabel("Layer", fontsize=9)
    above.set_title(f"{lens.name}: hatched layers are cut together", fontsize=10)
    above.spines[:].set_visible(False)
    above.tick_params(length=0, labelsize=8)
    below.axhline(0, color="#999999", linewidth=0.8)
    below.fill_between(summary.window_start, summary.low, summary.high, color=VERMILLION, alpha=0.2, linewidth=0)
    below.plot(summary.window_start, summary["mean"], "-o", color=VERMILLION, markersize=5, linewidth=1.6)
    below.set_ylabel("Change of the target's\nprobability (%)", fontsize=9)
    below.set_xlabel(
        f"First layer of the window ({size} layers); subject → last, {len(facts)} facts, 95 % intervals", fontsize=9
    )
    below.set_xticks(summary.window_start)
    below.set_xlim(-0.6, lens.n_layers - size + 0.6)
    below.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    open_frame(below)
    return figure


def paths() -> Figure:
    """What the main path and the convolution path hand from source to target, and which of it a knockout cuts."""
    lens = Lens.load("atlas-mamba1")
    prompt = lens.prompt(Fact("The capital of Peru is", "Peru", "Lima"))
    kernel = int(lens.hooks.mixers[0].module.conv_kernel_size)
    count, sources = len(prompt.ids), prompt.positions("subject")
    last = count - 1
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 4.0), layout="constrained")
    rows = {"layer's input": 0.0, "after the convolution": 1.5, "after the scan": 3.0}
    for axis, cut in zip(axes, ("main", "conv"), strict=True):
        for s in range(count):
            taps = last - kernel < s
            if taps:
                arrow(
                    axis,
                    (s, rows["layer's input"]),
                    (last, rows["after the convolution"]),
                    gone=cut == "conv" and s in sources,
                )
            else:
                arrow(axis, (s, rows["layer's input"]), (s, rows["after the convolution"]), faint=True)
            if taps and s != last:
                arrow(axis, (s, rows["layer's input"]), (s, rows["after the convolution"]), faint=True)
            arrow(
                axis,
                (s, rows["after the convolution"]),
                (last, rows["after the scan"]),
                gone=cut == "main" and s in sources,
            )
        for y in rows.values():
            for s in range(count):
                if y < 3 or s == last:
                    subject = s in sources
                    axis.plot(
                        s,
                        y,
                        "s" if subject else "o",
                        markersize=11,
                        markerfacecolor=ORANGE if subject else "white",
                        markeredgecolor=BLACK,
                        zorder=6,
                    )
        for name, y in rows.items():
            axis.text(-0.75, y, name.replace(" ", "\n", 1), ha="right", va="center", fontsize=9)
        for s, token in enumerate(words(prompt.tokens)):
            axis.text(s, -0.42, token, ha="center", va="top", fontsize=9.5, fontweight="bold" if s in sources else None)
        axis.set_title(
            {"main": 'path="main": the scan is cut', "conv": 'path="conv": the taps are cut'}[cut], fontsize=10, x=0.62
        )
        axis.set_xlim(-2.9, last + 0.5)
        axis.set_ylim(-0.85, 3.35)
        bare(axis)
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.6, label="hands information to the last token"),
        cut_line(),
        Line2D(
            [],
            [],
            color="none",
            marker="s",
            markersize=9,
            markerfacecolor=ORANGE,
            markeredgecolor=BLACK,
            label="subject",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, handlelength=3.4)
    return figure


def arrow(
    axis: Any, start: tuple[float, float], end: tuple[float, float], gone: bool = False, faint: bool = False
) -> None:
    """An arrow between two positions; a cut one is dashed and crossed."""
    colour = VERMILLION if gone else PALE if faint else BLUE
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=10,
            color=colour,
            shrinkA=8,
            shrinkB=8,
            linewidth=1.0 if faint else 1.5,
            linestyle=(0, (4, 3)) if gone else "solid",
            zorder=1 if faint else 3,
        )
    )
    if gone:
        at = 0.38
        axis.plot(
            start[0] + at * (end[0] - start[0]),
            start[1] + at * (end[1] - start[1]),
            "x",
            color=VERMILLION,
            markersize=9,
            markeredgewidth=2.2,
            zorder=7,
        )


def relayed() -> Figure:
    """Why cutting the direct edge can show nothing: a token in between has picked the fact up."""
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.5), layout="constrained")
    tokens, places = ["subject", "comma", "…", "last"], [0, 1.3, 2.2, 3]
    cases = [
        ("as it is", set()),
        ("subject → last cut:\nthe relay still delivers", {"direct"}),
        ("others → last cut:\nnothing arrives", {"direct", "relay"}),
    ]
    for axis, (title, cut) in zip(axes, cases, strict=True):
        for x in places:
            axis.plot([x, x], [0, 3], color=PALE, linewidth=1.2, zorder=0)
        for x, y in [(0, 0), (0, 2.2), (1.3, 0.8), (1.3, 1.5), (3, 2.2), (3, 3)]:
            axis.plot(
                x,
                y,
                "s" if x == 0 else "o",
                markersize=10,
                markeredgecolor=BLACK,
                zorder=6,
                markerfacecolor=ORANGE if x == 0 else "white",
            )
        arrow(axis, (0, 0), (1.3, 0.8))
        arrow(axis, (1.3, 0.8), (1.3, 1.5))
        arrow(axis, (0, 0), (0, 2.2))
        arrow(axis, (0, 2.2), (3, 3), gone="direct" in cut)
        arrow(axis, (1.3, 1.5), (3, 2.2), gone="relay" in cut)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(places, tokens, fontsize=9)
        axis.set_yticks([0, 1, 2, 3], ["early", "", "", "late"], fontsize=9)
        axis.set_ylim(-0.35, 3.35)
        axis.set_xlim(-0.5, 3.4)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("Layer", fontsize=9)
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.6, label="the fact's way"),
        cut_line(),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.4)
    return figure


def exchange() -> Figure:
    """Which entries of effective attention are exchange, and which enrichment; and the shares that were measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.8), width_ratios=[1, 1.4], layout="constrained")
    time = 6
    for t in range(time):
        for s in range(time):
            kind = "future" if s > t else "enrichment" if s == t else "exchange"
            colour, hatch = {"future": ("", None), "enrichment": (ORANGE, "xx"), "exchange": (SKY, None)}[kind]
            cell(left, s, t, (0.94, 0.94), colour, hatch)
    left.set_xlim(-0.6, time - 0.4)
    left.set_ylim(time - 0.4, -0.6)
    left.set_aspect("equal")
    left.set_xticks(range(time))
    left.set_yticks(range(time))
    left.set_xlabel("source s", fontsize=9)
    left.set_ylabel("target t", fontsize=9)
    left.tick_params(length=0, labelsize=8)
    left.spines[:].set_visible(False)
    left.set_title("entries of alpha[t, s]", fontsize=10)
    kinds = [
        Patch(facecolor=SKY, edgecolor=GREY, label="exchange: s < t"),
        Patch(facecolor=ORANGE, edgecolor=GREY, hatch="xx", label="enrichment: s = t, and D"),
    ]
    figure.legend(handles=kinds, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    for name, colour, marker in (("atlas-mamba1", VERMILLION, "o"), ("atlas-mamba2", BLUE, "s")):
        lens = Lens.load(name)
        facts = lens.known(load_facts("atlas").where(wording="far"), progress=False, limit=50)
        table = lens.features(facts, progress=False)
        quartiles = table.groupby("layer").exchange_share_last.quantile([0.25, 0.5, 0.75]).unstack()
        right.fill_between(quartiles.index, quartiles[0.25], quartiles[0.75], color=colour, alpha=0.18, linewidth=0)
        right.plot(quartiles.index, quartiles[0.5], f"-{marker}", color=colour, markersize=5, linewidth=1.5, label=name)
    right.set_ylim(bottom=0)
    right.set_xticks(range(12))
    right.set_xlabel("Layer", fontsize=9)
    right.set_ylabel("Exchange share, last token", fontsize=9)
    right.set_title("measured: median and middle half", fontsize=10)
    right.legend(fontsize=8.5, frameon=False)
    right.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    open_frame(right)
    return figure


def delta_rule() -> Figure:
    """What a later position reads of three tokens under a delta rule: whole, cut in three ways, and by a heuristic."""
    # The third token's key is the first one's; the second one's lies between. The reader D asks along that key.
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    q = torch.tensor([[1.0, 0.0]] * 4)
    ones = torch.ones(1, 4, 1)
    inputs = DeltaInputs(
        torch.ones(1, 4, 1, 1), k[None, :, None], q[None, :, None], 0.9 * ones, 0.9 * ones, -0.05 * ones[..., None]
    )
    stays = torch.tensor([True, True, False, True])[None, :, None]  # all but what the third does
    cases = {
        "nothing cut": (inputs, "C has replaced\nwhat A wrote"),
        "path='main'": (inputs.cut(stays, None), "C's value is gone,\nso is A's"),
        "path='erase'": (inputs.cut(None, stays), "C erases nothing,\nA's is back"),
        "path='both'": (inputs.cut(stays, stays), "as if C were\nnot there"),
        "no removal": (inputs._replace(erase=0 * ones), "a heuristic: this is\nnot what is read"),
    }
    figure = plt.figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 4.2])
    plane = left.subplots()
    for name, end, colour, place in (("A, C", (1, 0), VERMILLION, (0.7, -0.25)), ("B", (0.6, 0.8), BLUE, (0.66, 0.86))):
        plane.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
        plane.text(*place, name, color=colour, fontsize=10, weight="bold")
    plane.set_xlim(-0.15, 1.25)
    plane.set_ylim(-0.4, 1.1)
    plane.set_aspect("equal")
    bare(plane)
    plane.set_title("keys of the tokens;\nD asks along A's", fontsize=9)
    axes = right.subplots(1, len(cases), sharey=True)
    for number, (axis, (name, (case, note))) in enumerate(zip(axes, cases.items(), strict=True)):
        entries = delta_attention(case)[0, 0, -1, :3] * case.x[0, :3, 0, 0]  # a cut value is 0
        bars = axis.bar(["A", "B", "C"], entries, color=[VERMILLION, BLUE, VERMILLION], edgecolor=GREY, linewidth=0.8)
        bars[2].set_hatch("//")
        axis.bar_label(bars, [f"{value:.2f}" for value in entries], fontsize=8, padding=1)
        axis.set_title(name, fontsize=9.5, style="italic" if number == len(cases) - 1 else "normal")
        axis.set_xlabel(note, fontsize=8.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0, labelsize=9)
        axis.set_yticks([])
    axes[0].set_ylim(0, 1.0)
    axes[0].set_ylabel("alpha[D, s]", fontsize=9)
    return figure


def half_life() -> Figure:
    """Decay norm is a number of the weights, half-life one of the data: they do not order features alike."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.0), sharey=True, layout="constrained")
    layer = 6
    for axis, name in zip(axes, ("atlas-mamba1", "atlas-mamba2"), strict=True):
        lens = Lens.load(name)
        facts = lens.known(load_facts("atlas").where(wording="far"), progress=False, limit=50)
        table = lens.features(facts, progress=False)
        of_layer = table[table.layer == layer]
        for group, colour, marker in (("slow", BLUE, "o"), ("middle", GREEN, "s"), ("fast", ORANGE, "^")):
            part = of_layer[of_layer.group == group]
            axis.plot(
                part.decay_norm,
                part.half_life,
                marker,
                color=colour,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=group,
            )
        rho = of_layer.decay_norm.rank().corr(of_layer.half_life.rank())
        what = {"mamba1": "channels", "mamba2": "heads"}[lens.hooks.kinds[0]]
        axis.set_title(f"{name}, layer {layer}\n{len(of_layer)} {what}, rank correlation {rho:.2f}", fontsize=9.5)
        axis.set_yscale("log")
        axis.set_xlabel("Decay norm (of the weights)", fontsize=9)
        axis.grid(color="#E5E5E5", linewidth=0.6)
        open_frame(axis)
    axes[0].set_ylabel("Half-life (tokens, measured)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="third by decay norm",
        title_fontsize=9,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def flow() -> Figure:
    """The curves of a sweep of two models, as `result.plot` draws them."""
    facts = load_facts("atlas").where(wording="far").sample(100)
    models = ["atlas-mamba2", "atlas-gpt-neox"]
    result = compare(models, facts, sources=("subject", "relation", "last", "first"), window=6, progress=False)
    return result.plot(rows="model")


def heatmap() -> Figure:
    """Every token of one prompt as the source, as `lens.heatmap` draws it."""
    return Lens.load("atlas-mamba1").heatmap(far(), window=6)


def relays() -> Figure:
    """The same prompt in two models: what each single token costs, in numbers."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 5.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("atlas-mamba1", "atlas-mamba2"), strict=True):
        lens = Lens.load(name)
        prompt = lens.prompt(far())
        table = lens.sweep(far(), "each", window=6, progress=False).table
        grid = table.pivot(index="position", columns="window_start", values="change_pct")
        axis.imshow(grid, cmap=DIVERGING.reversed(), vmin=-100, vmax=100, aspect="auto", interpolation="nearest")
        for t, row in enumerate(grid.to_numpy()):
            for start, change in enumerate(row):
                if abs(change) >= 1:
                    axis.text(
                        start,
                        t,
                        f"{change:.0f}".replace("-", "\N{MINUS SIGN}"),
                        ha="center",
                        va="center",
                        fontsize=8.5,
                        color="white" if change < -60 else BLACK,
                    )
        axis.set_xticks(range(grid.shape[1]), grid.columns, fontsize=9)
        axis.set_yticks(range(len(prompt.ids)), words(prompt.tokens), fontsize=9)
        axis.set_title(name, fontsize=10)
    for where in prompt.positions("subject"):
        axes[0].get_yticklabels()[where].set_fontweight("bold")
    figure.supxlabel("First layer of the window (6 layers)", fontsize=9)
    figure.supylabel("Source token", fontsize=9)
    return figure


def edges() -> Figure:
    """The strongest edges of one prompt and its route, as `flow.plot` draws them."""
    found = Lens.load("atlas-mamba1").flow(far(), certify=40, progress=False)
    return found.plot(route=found.routes(k=1, progress=False).edges[0])


def edges_by_piece() -> Figure:
    """The flow over many facts, as `flow.plot_pieces` draws it."""
    lens = Lens.load("atlas-mamba1")
    facts = lens.known(load_facts("atlas").where(wording="far"), limit=20, progress=False)
    return lens.flow(facts, certify=40, sample=40, progress=False).plot_pieces()


def edges_certified() -> Figure:
    """Attributed against exact effects, in two models."""
    facts = load_facts("atlas").where(wording="far").sample(40)
    flows = []
    for name in ("atlas-mamba1", "atlas-gpt-neox"):
        lens = Lens.load(name)
        known = lens.known(facts, limit=20, progress=False)
        flows.append(lens.flow(known, certify=40, sample=40, progress=False))
    return certificate(Flow.concat(flows))


def contributions() -> Figure:
    """What adds to one prompt's answer, as `Contributions.plot` draws it."""
    return Lens.load("atlas-mamba1").contributions(far()).plot()


def explore() -> bytes:
    """The page of `mambalens explore`: two models, a subject that is cut off, and a flow. Needs Chromium."""
    from playwright.sync_api import sync_playwright

    options = [
        "--prompt",
        "The capital of Peru is",
        "--subject",
        "Peru",
        "--target",
        "Lima",
        "--cut",
        "3-4>5:0-11:both",
    ]
    command = [sys.executable, "-m", "mambalens", "explore", "--no-browser", *options, "atlas-mamba1", "atlas-gpt-neox"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        assert server.stderr is not None
        address = server.stderr.readline().split()[-1]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1180, "height": 1560})
        tab.goto(address)
        tab.wait_for_selector(".card[data-model=atlas-gpt-neox] .big", timeout=120_000)
        tab.click("[data-reading=flow]")
        tab.wait_for_selector(".reading[data-shows=flow] svg", timeout=120_000)
        tab.evaluate("scrollTo(0, 0)")
        taken = tab.screenshot()
        browser.close()
        server.terminate()
    return few_colours(taken)


def few_colours(png: bytes) -> bytes:
    """A screenshot in 128 colours, a third of the size."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return small.getvalue()


PICTURES: dict[str, Callable[[], Figure | bytes]] = {
    function.__name__: function
    for function in (
        roles,
        attention_knockout,
        scan_state,
        windows,
        paths,
        relayed,
        exchange,
        delta_rule,
        half_life,
        flow,
        heatmap,
        relays,
        edges,
        edges_by_piece,
        edges_certified,
        contributions,
        explore,
    )
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *PICTURES], default=[], help="by default all")
    chosen = parser.parse_args().name or list(PICTURES)
    OUT.mkdir(exist_ok=True)
    plt.rcParams["hatch.linewidth"] = 0.7
    for name in chosen:
        figure = PICTURES[name]()
        if isinstance(figure, bytes):
            (OUT / f"{name}.png").write_bytes(figure)
        else:
            figure.savefig(OUT / f"{name}.png", dpi=150, facecolor="white")
            plt.close(figure)
        print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
