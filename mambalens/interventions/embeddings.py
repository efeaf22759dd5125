"""Embeddings with something added to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor


@contextmanager
def noisy_embeddings(model: Any, noise: Float[Tensor, "batch time hidden"] | None) -> Iterator[None]:
    """While the block runs, `noise` is added to what the model's embedding gives; None adds nothing."""
    if noise is None:
        yield
        return

    def add(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + noise[:, : output.shape[1]].to(output)  # of the columns that there are

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
