"""The replay engine: a whole sweep from one base pass, where the target is the last position.

A knockout of the last position in a window that starts at layer a changes nothing below a and nothing left of it. So
the base runs once; before layer l, a copy of the base's hidden state at the last position joins for every knockout
whose window starts there; every layer runs once for all joined rows, one token each, which resume from what the base
left. The layers' norms, MLPs and residuals stay the model's own code; what mixers keep and how rows resume is the
adapters' part (`Mixer.remember`, `Mixer.resuming`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mambalens.hooks import HookManager, Mixer
from mambalens.hooks.mixer import Captured, replace_forward
from mambalens.hooks.rows import Base, Rows

TILE_BYTES = 256 * 2**20
"""Memory for what rows copy of the base pass at a time; rows go through a layer in tiles of that size."""


class LastKnockout(NamedTuple):
    """One knockout of the last position, for every prompt of a batch."""

    layers: Sequence[int]
    source: int
    """Number of the source set, from 1."""
    main: bool
    conv: bool
    features: dict[int, Tensor | None]
    """Mask by layer; None for every feature."""


class _LayerCall(NamedTuple):
    hidden: Tensor
    """Input of the layer in the base pass [batch, T, width]."""
    kwargs: dict[str, Any]
    output: Any


class Replay:
    """One batch of right-padded prompts, ready to answer knockouts of their last positions.

    Args:
        hooks: the model's hook manager.
        ids: [batch, T].
        last: last position of every prompt [batch].
        sources: source sets [sets, batch, T].
    """

    @torch.no_grad()
    def __init__(self, hooks: HookManager, ids: Tensor, last: Tensor, sources: Tensor) -> None:
        self.hooks, self.model = hooks, hooks.model
        device = self.model.get_input_embeddings().weight.device
        empty = torch.zeros_like(sources[:1])
        self.base = Base(last.to(device), torch.cat([empty, sources]).to(device))
        self.layers = layers_of(hooks)
        self.calls: list[_LayerCall] = []
        self.mixer_calls: dict[Mixer, Captured] = {}
        self._run_base(ids.to(device))

    def _run_base(self, ids: Tensor) -> None:
        calls: dict[int, _LayerCall] = {}

        def keep_layer(number: int, layer: nn.Module) -> Any:
            signature = inspect.signature(type(layer).forward)

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                given = dict(signature.bind(module, *args, **kwargs).arguments)
                rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
                given |= given.pop(rest, {})
                names = list(given)
                calls[number] = _LayerCall(given[names[1]], {name: given[name] for name in names[2:]}, output)

            return hook

        def keep_mixer(mixer: Mixer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.mixer_calls[mixer] = Captured(args, kwargs, output, None)

            return hook

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(keep_layer(number, layer), with_kwargs=True).remove)
            for mixer in self.hooks.mixers:
                stack.callback(mixer.module.register_forward_hook(keep_mixer(mixer), with_kwargs=True).remove)
            if "attention" in self.hooks.kinds:
                # Without a configuration no layer is sliding: rows need every key the base has.
                self.model.base_model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
            else:
                self.model.base_model(input_ids=ids, use_cache=False)
        self.calls = [calls[number] for number in range(len(self.layers))]

    @torch.no_grad()
    def logits(self, cuts: Sequence[LastKnockout]) -> Iterator[Tensor]:
        """Logits behind the last token under every cut.

        Yields:
            Logits [batch, vocabulary] for one cut after the other.
        """
        batch = len(self.base.last)
        start = torch.tensor([min(cut.layers) for cut in cuts])
        order = torch.argsort(start, stable=True)  # joined rows stand in front
        hidden = None
        mixers = {mixer.layer: mixer for mixer in self.hooks.mixers}
        for number, layer in enumerate(self.layers):
            call, mixer = self.calls[number], mixers[number]
            joined = [cuts[i] for i in order.tolist() if start[i] <= number]
            new = sum(min(cut.layers) == number for cut in joined)
            if new:
                fresh = call.hidden[torch.arange(batch, device=call.hidden.device), self.base.last][:, None]
                fresh = fresh.repeat(new, 1, 1)  # [new x batch, 1, width]
                hidden = fresh if hidden is None else torch.cat([hidden, fresh])
            if hidden is None:
                continue
            memory = mixer.remember(self.mixer_calls[mixer], self.base)
            rows = self._rows(joined, number, mixer)
            parts = []
            size = max(1, TILE_BYTES // memory.row_bytes)
            for begin in range(0, len(rows), size):
                tile = slice(begin, begin + size)
                with mixer.resuming(memory, self.base, rows.part(tile), call.kwargs) as kwargs:
                    parts.append(_hidden(layer(hidden[tile], **kwargs)))
            hidden = torch.cat(parts)
        assert hidden is not None
        hidden = hidden.unflatten(0, (len(cuts), batch))[
            torch.argsort(order).to(hidden.device)
        ]  # [cuts, batch, 1, width]
        # The head's weights are read once a call: as many cuts at a time as their logits fit.
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        for part in hidden.split(max(1, TILE_BYTES // (4 * batch * vocabulary))):
            yield from self._head(part.flatten(0, 1)).unflatten(0, (len(part), batch))

    def _rows(self, joined: Sequence[LastKnockout], number: int, mixer: Mixer) -> Rows:
        """The rows of all joined cuts in one layer, cut by cut."""
        batch, device = len(self.base.last), self.base.last.device
        inside = torch.tensor([number in cut.layers for cut in joined])
        source = torch.tensor([cut.source for cut in joined]) * inside
        main = torch.tensor([cut.main for cut in joined]) & inside
        conv = torch.tensor([cut.conv for cut in joined]) & inside & mixer.has_conv
        masks = [cut.features.get(number) for cut in joined]
        features = None
        if any(mask is not None for mask in masks):
            everything = torch.ones(mixer.n_features, dtype=torch.bool)
            features = torch.stack([everything if mask is None else mask.cpu() for mask in masks])
            features = features.repeat_interleave(batch, 0).to(device)
        source, main, conv = (t.repeat_interleave(batch).to(device) for t in (source, main, conv))
        return Rows(torch.arange(batch, device=device).repeat(len(joined)), source, main, conv, features)

    def _head(self, hidden: Tensor) -> Tensor:
        """What the model's own code behind its layers makes of rows [rows, 1, width]."""

        def hand_on(like: Any) -> Callable[[Any], Any]:
            result = (hidden, *like[1:]) if isinstance(like, tuple) else hidden
            return lambda original: lambda *_, **__: result

        with ExitStack() as stack:
            for layer, call in zip(self.layers, self.calls, strict=True):
                stack.callback(replace_forward(layer, hand_on(call.output)))
            ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=self.base.last.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[:, 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def can_replay(hooks: HookManager) -> bool:
    """Whether the engine can walk the model: one list of layers, all on one device, no knockout running."""
    if hooks.cutting:  # rows would resume without the knockouts of the block around
        return False
    devices = {parameter.device for parameter in hooks.model.parameters()}
    if len(devices) > 1 or devices == {torch.device("meta")}:
        return False
    try:
        layers_of(hooks)
    except LookupError:
        return False
    return True


def layers_of(hooks: HookManager) -> list[nn.Module]:
    """The model's layers: the members of the list that its mixers live in."""
    for module in hooks.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) >= hooks.n_layers:
            inside = [set(layer.modules()) for layer in module]
            if all(mixer.module in inside[mixer.layer] for mixer in hooks.mixers):
                return list(module)
    raise LookupError("the mixers do not live in one list of layers")


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
