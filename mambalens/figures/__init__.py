"""Figures made to be read: a role or group of features looks the same everywhere."""

from mambalens.figures.curves import flow
from mambalens.figures.diagnostics import diagnostics
from mambalens.figures.spectra import causal_scatter, decay_spectrum, shares_by_layer
from mambalens.figures.tokens import attention_map, heatmap

__all__ = [
    "attention_map",
    "causal_scatter",
    "decay_spectrum",
    "diagnostics",
    "flow",
    "heatmap",
    "shares_by_layer",
]
