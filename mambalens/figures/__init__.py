"""Figures made to be read: a role or group of features looks the same everywhere."""

from mambalens.figures.curves import flow
from mambalens.figures.tokens import heatmap

__all__ = ["flow", "heatmap"]
