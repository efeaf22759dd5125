"""What is cut in one mixer of one forward pass, as masks, and their algebra.

A cut says of every target which sources it reads without. Targets that read without the same ones share a row of
sources: sources x targets has one such row, edges as many as differ. A scan costs one more scan for every row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mambalens.hooks.knockout import Paths
from mambalens.hooks.values import Written, standing_in


@dataclass(frozen=True, eq=False)
class Cut:
    """One knockout in one mixer of one forward pass, over all columns so far, also those that a cache holds."""

    code: Int[Tensor, "batch time"]
    """Number of the row of sources that each target reads without; 0 where nothing is cut."""
    rows: Bool[Tensor, "row batch source"]
    """Rows of sources; row 0 is empty."""
    features: Bool[Tensor, " feature"] | None
    """Which features are cut; None for every one."""
    paths: Paths
    instead: Written | None = None
    """What stands in the place of what its sources hand on, over the prompt's columns; None for nothing."""

    @classmethod
    def of(
        cls,
        sources: Bool[Tensor, "batch time"],
        targets: Bool[Tensor, "batch time"],
        features: Bool[Tensor, " feature"] | None = None,
        paths: Paths = Paths.MAIN,
    ) -> Cut:
        """Every edge from a source to a target."""
        return cls(targets.long(), torch.stack([torch.zeros_like(sources), sources]), features, paths)

    @classmethod
    def of_edges(
        cls,
        edges: Bool[Tensor, "batch time source"],
        features: Bool[Tensor, " feature"] | None = None,
        paths: Paths = Paths.MAIN,
    ) -> Cut:
        """Every edge of a mask, targets in its rows."""
        return cls(*distinct_rows(edges.tril()), features, paths)

    @property
    def targets(self) -> Bool[Tensor, "batch time"]:
        """Positions that lose something."""
        return self.code != 0

    def __contains__(self, path: Paths) -> bool:
        return bool(self.paths & path)

    def until(self, time: int) -> Cut:
        """The same over the first columns alone."""
        if time == self.code.shape[1]:
            return self
        instead = None if self.instead is None else self.instead.each(lambda part: part[:, :time])
        return Cut(self.code[:, :time], self.rows[..., :time], self.features, self.paths, instead)

    def of_prompts(self, prompts: Int[Tensor, " some"]) -> Cut:
        """The same of these prompts, which may be named several times."""
        instead = None if self.instead is None else self.instead.each(lambda part: part[prompts.to(part.device)])
        at = prompts.to(self.code.device)
        return Cut(self.code[at], self.rows[:, at], self.features, self.paths, instead)

    def to(self, device: torch.device) -> Cut:
        """The same cut on a device."""
        features = None if self.features is None else self.features.to(device)
        instead = None if self.instead is None else self.instead.each(lambda part: part.to(device))
        return Cut(self.code.to(device), self.rows.to(device), features, self.paths, instead)


def distinct_rows(
    edges: Bool[Tensor, "batch time source"],
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "row batch source"]]:
    """The different rows of every prompt's edges, numbered, the empty one first.

    Returns:
        Number of each target's row, and the rows; a prompt with fewer rows than another has empty ones behind its own.
    """
    codes, rows = [], []
    for of_prompt in edges:
        with_empty = torch.cat([torch.zeros_like(of_prompt[:1]), of_prompt])
        distinct, code = torch.unique(with_empty, dim=0, return_inverse=True)  # sorted: the empty row comes first
        codes.append(code[1:])
        rows.append(distinct)
    most = max(len(distinct) for distinct in rows)
    return torch.stack(codes), torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows], 1)


def on(path: Paths, cuts: Sequence[Cut]) -> list[Cut]:
    """Those of the cuts that cut a path, or one of several."""
    return [cut for cut in cuts if path in cut]


def patterns(cuts: Sequence[Cut]) -> Int[Tensor, "pattern cut"]:
    """The different ways in which targets are cut: a row's number for each cut, without the way that cuts nothing."""
    codes = torch.stack([cut.code for cut in cuts], -1).flatten(0, -2)  # [B T, cuts]
    found = torch.unique(codes, dim=0)
    return found[found.any(1)]


class Kept(NamedTuple):
    """What one way of being cut leaves of every source, feature by feature or for all of them."""

    values: Bool[Tensor, "batch source feature"] | None
    """1 where its value is read; None where all are."""
    erasures: Bool[Tensor, "batch source feature"] | None
    """1 where what it erases stays erased; None where all does."""
    instead: Float[Tensor, "batch source feature width"] | None = None
    """What is read in the place of values that are not; None for nothing."""


def in_patterns(
    cuts: Sequence[Cut], found: Int[Tensor, "pattern cut"]
) -> Iterator[tuple[Bool[Tensor, "batch time"], Kept]]:
    """Pattern by pattern, on the paths 'main' and 'erase'.

    Equation: Knockout
        x^-S_s = 0 if s in S, else x_s    h^-S_t = exp(dt_t A) h^-S_{t-1} + dt_t B_t x^-S_t

        Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2, which is linear in x

    Yields:
        The targets that are cut in this way, and what they keep of the sources.
    """
    codes = torch.stack([cut.code for cut in cuts], -1)  # [B, T, cuts]
    for pattern in found:
        kept: dict[Paths, Tensor | None] = {Paths.MAIN: None, Paths.ERASE: None}
        instead = None
        for path in kept:
            rows = [(cut, row) for cut, row in zip(cuts, pattern.tolist(), strict=True) if row and path in cut]
            if rows:
                each = [by_feature(cut.rows[row], cut.features) for cut, row in rows]
                kept[path] = ~reduce(operator.or_, each)
                if path is Paths.MAIN:
                    values = [None if cut.instead is None else cut.instead.main for cut, _ in rows]
                    instead = standing_in([dropped[..., None] for dropped in each], values)
        yield (codes == pattern).all(-1), Kept(kept[Paths.MAIN], kept[Paths.ERASE], instead)


def kept_at(cuts: Sequence[Cut], at: Int[Tensor, " batch"]) -> Kept:
    """What one position of every prompt keeps of the sources, on the paths 'main' and 'erase'.

    Args:
        cuts: of one mixer.
        at: the positions.
    """
    written = on(Paths.MAIN | Paths.ERASE, cuts)
    found = Kept(None, None)
    if not written:
        return found
    rows = torch.arange(len(at), device=at.device)
    for where, kept in in_patterns(written, patterns(written)):
        here = where[rows, at][:, None, None]  # [B, 1, 1]
        values = _where(here, kept.values, found.values, True)
        erasures = _where(here, kept.erasures, found.erasures, True)
        instead = _where(here[..., None], kept.instead, found.instead, 0.0)
        found = Kept(values, erasures, instead)
    return found


def _where(
    here: Bool[Tensor, " batch *ones"],
    value: Shaped[Tensor, " batch *rest"] | None,
    other: Shaped[Tensor, " batch *others"] | None,
    default: float | bool,
) -> Shaped[Tensor, " batch *found"] | None:
    """One where it holds, and the other elsewhere; what is None is the default."""
    if value is None and other is None:
        return None
    like = value if value is not None else other
    assert like is not None
    default_like = torch.full((), default, dtype=like.dtype, device=like.device)
    return torch.where(here, default_like if value is None else value, default_like if other is None else other)


def kept_taps(cuts: Sequence[Cut], kernel: int) -> list[Bool[Tensor, "batch time feature"]] | None:
    """For every distance k, 1 where the tap from t-k to t stays [batch, T, features or 1]; None if all do.

    Equation: Convolution
        keep_k[t] = 0 if t in T and t - k in S, else 1

        Source: this package

        A cut on the path 'conv' takes these taps out of the causal convolution.
    """
    if not cuts:
        return None
    return [~reduce(operator.or_, (_dropped(cut, k) for cut in cuts)) for k in range(kernel)]


def replaced_taps(cuts: Sequence[Cut], kernel: int) -> list[tuple[list[Bool[Tensor, "batch time feature"]], Tensor]]:
    """Taps through which another input comes: for every distance k, 1 where the tap from t-k to t reads it.

    Equation: Ablation
        out_t = sum_k keep_k[t] w[K-1-k] inner[t-k] + (1 - keep_k[t]) w[K-1-k] inner~[t-k] + bias

        Source: this package, as for values; inner~ = 0 is the cut of a tap

        Of one channel of the causal convolution. Where knockouts that put something in meet one that zeroes, there is
        zero; where several put something in, the last one's is there.

    Returns:
        For every cut that puts something in, the taps that are its own, and the inputs that they read [batch, T,
        channels].
    """
    found = []
    taken = [[_dropped(cut, k) for cut in cuts] for k in range(kernel)]
    for number, cut in enumerate(cuts):
        if cut.instead is None or cut.instead.conv is None:
            continue
        stronger = [i for i, other in enumerate(cuts) if other.instead is None or i > number]
        own = [
            reduce(lambda left, i, at=of_tap: left & ~at[i], stronger, of_tap[number])  # type: ignore[misc]
            for of_tap in taken
        ]
        found.append((own, cut.instead.conv))
    return found


def _dropped(cut: Cut, k: int) -> Bool[Tensor, "batch time #feature"]:
    """Where a cut takes the tap from t-k to t."""
    time = cut.rows.shape[2]
    reached = F.pad(cut.rows[..., : max(time - k, 0)], (min(k, time), 0))  # rows[t-k] at t
    return by_feature(reached.gather(0, cut.code[None])[0], cut.features)


def blocked_entries(cuts: Sequence[Cut]) -> Bool[Tensor, "batch feature time source"]:
    """Entries alpha[t, s] that the cuts block [batch, features or 1, T, S].

    Equation: Knockout
        blocked[t, s, f] = OR over cuts of (t in T) (s in S) (f in F)

        Source: Geva et al. 2023, arXiv:2304.14767, section 4
        Source: Endy et al. 2025, arXiv:2505.24244, eq. 5

        Knockouts that hold at the same time unite. Edges say T and S one by one.
    """
    blocked = torch.zeros((), dtype=torch.bool, device=cuts[0].code.device)
    for cut in cuts:
        prompts = torch.arange(len(cut.code), device=cut.code.device)[:, None]
        pair = cut.rows[cut.code, prompts][:, None]  # [B, 1, T, S]
        blocked = blocked | (pair if cut.features is None else pair & cut.features[None, :, None, None])
    return blocked


def changed_positions(cuts: Sequence[Cut], kernel: int, remembers: bool = True) -> Bool[Tensor, "batch time"]:
    """Positions whose output the cuts can change.

    A cut of what the scan reads changes its targets. A cut tap changes what the target writes into the state, so
    everything from it on; its target alone where nothing is remembered.
    """
    changed = torch.zeros_like(cuts[0].targets)
    for cut in on(Paths.MAIN | Paths.ERASE, cuts):
        changed = changed | cut.targets
    taps = kept_taps(on(Paths.CONV, cuts), kernel)
    if taps is not None:
        cut_here = torch.stack([(~keep).any(-1) for keep in taps]).any(0)
        changed = changed | ((cut_here.long().cumsum(1) > 0) if remembers else cut_here)
    return changed


def by_feature(
    mask: Bool[Tensor, "*batch"], features: Bool[Tensor, "*#batch feature"] | None
) -> Bool[Tensor, "*batch #feature"]:
    """A mask for the given features, or one for all of them."""
    return mask[..., None] if features is None else mask[..., None] & features
