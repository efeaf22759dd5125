"""Defaults, said once for Python, the command line and TOML files."""

from __future__ import annotations

from typing import Literal

SOURCES = ("subject", "relation", "last", "first")
"""Roles that a sweep knocks out."""
SOURCE = "subject"
"""Role that is knocked out where there is one only."""
TARGET = "last"
"""Role that is not to receive the information."""
WINDOW = 9
"""Consecutive layers that a knockout covers (Endy et al. 2025, figure 1)."""
GROUP = "all"
"""Features that are cut."""
FEATURES = (GROUP,)
PATH: Literal["main"] = "main"
"""Path that is cut."""
PATHS = (PATH,)
ABLATIONS = ("zero", "mean", "resample")
"""What stands in the place of a source that is cut: nothing, its mean over facts, or another prompt's value."""
ABLATION = ABLATIONS[0]
WITH_KEYS = "+keys"
"""What tables call an ablation in which keys of attention are put in with the values ends with: 'mean+keys'."""
FACTS = "atlas"
"""Facts of the command line."""
DTYPE = "auto"
"""Precision of the command line: the checkpoint's own."""
BLOCK = 256
"""Facts of a block: what a run that is killed has to compute again at most."""
POINTS = 4
"""Gradients that a flow takes of every prompt."""
TOP = 40
"""Edges of a prompt that count as its strongest: those that are looked at twice, and cut exactly."""
MEASURE = "log_odds"
"""Measure that a flow is of."""
METHODS = ("gradient", "exact")
"""How a flow finds its effects; the first where nothing is said."""
TRACE_WINDOW = 10
"""Consecutive layers in which causal tracing restores a mixer or an MLP (Meng et al. 2022, figure 1)."""
NOISE = 3.0
"""Noise of causal tracing, in standard deviations of the subjects' embeddings (Meng et al. 2022, section 2.1)."""
SAMPLES = 10
"""Samples of that noise."""
CELL_BLOCK = 64
"""Facts, or pairs of them, of a block of patches or traces."""
SITE = "residual"
"""What is patched and restored."""
FLOW_BLOCK = 32
"""Facts of a flow's block."""
DETAILED = 100
"""Facts of a model whose edges go into a flow's page; its means are over all."""
DETAILS = 1000
"""Facts of a model whose own numbers go into a report; its curves are means over all."""
