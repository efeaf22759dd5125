"""Figures made to be read: a role or group of features looks the same everywhere."""

from mambalens.figures.contributions import contributions
from mambalens.figures.curves import flow
from mambalens.figures.diagnostics import diagnostics
from mambalens.figures.flow_checks import certificate, faithfulness
from mambalens.figures.flow_graph import graph
from mambalens.figures.flow_pieces import flow_by_piece
from mambalens.figures.logit_lens import logit_lens
from mambalens.figures.spectra import causal_scatter, decay_spectrum, shares_by_layer
from mambalens.figures.tokens import attention_map, heatmap

__all__ = [
    "attention_map",
    "causal_scatter",
    "certificate",
    "contributions",
    "decay_spectrum",
    "diagnostics",
    "faithfulness",
    "flow",
    "flow_by_piece",
    "graph",
    "heatmap",
    "logit_lens",
    "shares_by_layer",
]
