"""What the page needs of a lens. The lens itself calls this package, so that this package cannot import it."""

from __future__ import annotations

from typing import Any, Protocol


class Lens(Protocol):
    """A model and its verbs, see `mambalens.lens.Lens`."""

    model: Any
    tokenizer: Any
    hooks: Any
    name: str
    origin: Any

    @property
    def n_layers(self) -> int: ...

    @property
    def device(self) -> Any: ...

    @property
    def prompt(self) -> Any: ...

    @property
    def batches(self) -> Any: ...

    @property
    def last_logits(self) -> Any: ...

    @property
    def predict(self) -> Any: ...

    @property
    def sweep(self) -> Any: ...

    @property
    def flow(self) -> Any: ...

    @property
    def logits_by_layer(self) -> Any: ...

    @property
    def contributions(self) -> Any: ...
