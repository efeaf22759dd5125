"""Progress bars: widgets in a Jupyter that has them, text everywhere else."""

import warnings

with warnings.catch_warnings():
    # In a Jupyter without ipywidgets the bar is text, and the reader needs no warning of it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
