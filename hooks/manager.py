"""The hook manager: finds a model's token mixers, cuts between positions, reads effective attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mambalens.hooks.adapters import SUPPORTED, find_mixers
from mambalens.hooks.calls import cache_among
from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.groups import explicit_mask, for_layer, group_mask, parse_group
from mambalens.hooks.kernels import backend
from mambalens.hooks.knockout import (
    Cutting,
    Features,
    Knockout,
    Path,
    Paths,
    Positions,
    edge_mask,
    position_mask,
    refuse_keys,
)
from mambalens.hooks.leaks import refuse_leaks
from mambalens.hooks.masks import Cut
from mambalens.hooks.mixer import Captured, Mixer, Pass
from mambalens.hooks.steering import Addition, Steering, counts_back, plain
from mambalens.hooks.token_mixing import TokenMixing
from mambalens.hooks.values import Values, Written

PARITY_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative; several of transformers' norms and scans round to float32 whatever the model's dtype."""


@dataclass(eq=False)
class _Block:
    """A knockout whose `with` block is running."""

    knockout: Knockout
    cutting: Cutting
    reached: int = 0
    """Columns that the longest input so far had."""
    wanted: int = 0
    """Columns that its farthest position needs."""

    def masks(self, batch: int, running: Pass) -> tuple[Cut, list[int], bool]:
        """What is cut in a pass, of every feature; positions that it does not reach; whether any is generated."""
        given, columns = self.knockout, (batch, running.prompt, running.length)
        if given.edges is not None:
            mask, later, generated = edge_mask(given.edges, *columns)
            return Cut.of_edges(mask), later, self._of_prompt(generated)
        assert given.sources is not None and given.targets is not None
        sources, later_s, _ = position_mask(given.sources, "sources", *columns)
        targets, later_t, generated = position_mask(given.targets, "targets", *columns)
        # A target without a source at or left of it loses nothing, and keeps the module's output exactly.
        cut = Cut.of(sources, targets & (sources.long().cumsum(1) > 0))
        return cut, later_s + later_t, self._of_prompt(generated)

    def _of_prompt(self, generated: bool) -> bool:
        """Nothing stands in the place of what generated tokens do without."""
        if generated and self.knockout.instead is not None:
            raise MambalensError(
                "instead has values for the prompt's columns, but a target is a generated token: name targets in the "
                "prompt, or leave instead out."
            )
        return generated


class HookManager:
    """Knockout and effective attention on any loaded Hugging Face causal LM; no tokenizer needed.

    Args:
        model: the loaded model. It is changed only while a `knockout` or `add` block runs.
        check: run `check` also where every mixer is of a class that the tests know, in a layer of its own architecture;
            otherwise it runs anyway.

    Attributes:
        model: the model.
        layers: its layers, in order.
        mixers: their token mixers, in the order of the layers (see `mixer.Mixer`).

    Raises:
        MambalensError: naming the model's class, the layer or the module that is not supported.
    """

    def __init__(self, model: nn.Module, check: bool = False) -> None:
        self.model: Any = model
        self.trunk, self.layers, self.mixers = find_mixers(model)
        self._blocks: list[_Block] = []
        self._steering: list[Steering] = []
        self._aside = False
        self._pass: Pass | None = None
        self._prompts: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()  # cache -> prompt, columns so far
        if check or not all(self._familiar(mixer) for mixer in self.mixers):
            self.check()

    def __repr__(self) -> str:
        kinds = {kind: sum(mixer.kind == kind for mixer in self.mixers) for kind in self.kinds}
        return f"<HookManager of {type(self.model).__name__}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}>"

    def _familiar(self, mixer: Mixer) -> bool:
        """Whether the tests know the mixer's class and what is around it.

        Each of transformers' architectures has a module of its own, layers and mixers in it: a known mixer in a layer
        from elsewhere may have anything beside it, and so may a class from elsewhere that has a known one's name.
        """
        home = type(mixer.module).__module__
        return mixer.familiar and home.startswith("transformers.") and type(self.layers[mixer.layer]).__module__ == home

    @property
    def n_layers(self) -> int:
        """Number of layers, those without a token mixer included."""
        return len(self.layers)

    @property
    def kinds(self) -> list[str]:
        """The kinds of mixers that the model has."""
        return list(dict.fromkeys(mixer.kind for mixer in self.mixers))

    @property
    def paths(self) -> Paths:
        """The ways between positions that any of its mixers has."""
        return reduce(operator.or_, (mixer.paths for mixer in self.mixers))

    @property
    def backend(self) -> str:
        """What scans: 'torch', or 'mamba-ssm' (its CUDA kernels); '+compile' where Mamba-1's steps run compiled."""
        return backend(next(self.model.parameters()).device)

    @property
    def cutting(self) -> bool:
        """Whether a knockout block is running."""
        return bool(self._blocks)

    @property
    def depth(self) -> int:
        """How many knockout blocks are running."""
        return len(self._blocks)

    @property
    def steering(self) -> bool:
        """Whether a block that adds vectors is running."""
        return bool(self._steering)

    @contextmanager
    def knockout(
        self,
        sources: Positions | None = None,
        targets: Positions | None = None,
        layers: Sequence[int] | int | str | None = None,
        features: Features = "all",
        path: Path = "main",
        mixers: str | None = None,
        edges: Bool[Tensor, "*batch time time"] | None = None,
        instead: Values | None = None,
    ) -> Iterator[Knockout]:
        """Block what `sources` hand to `targets` while the block runs (Geva et al. 2023; Endy et al. 2025, eq. 5).

        Args:
            sources: positions (columns of `input_ids`, padding included; negative: from the end) as ints, a list of
                ints for each row, or a boolean mask [T] or [batch, T].
            targets: likewise. In `generate` both count the prompt's columns; a generated token is a target only if its
                column is named.
            layers: layer numbers, or a kind of mixer ('attention'); None: every layer.
            features: a group ('all', 'slow', 'middle', 'fast', 'context-dependent', 'context-independent', or a part
                such as 'slow:0.1'), a feature's number, a boolean mask or a list of numbers, or one of these for each
                layer (such as a `Selection`).
            path: 'main' (what sources write into the state, or attention), 'conv' (the convolution's taps from source
                to target), 'erase' (what sources remove from the state of a delta rule) or 'both' (all of these).
            mixers: only mixers of this kind, in models that have several kinds; None: all.
            edges: instead of sources and targets, any set of edges: a boolean mask [T, T] or [batch, T, T], targets in
                rows, sources in columns. What lies above the diagonal says nothing.
            instead: what targets read in the place of what sources hand on, column by column: what `values` found in
                another prompt, a mean of such, or any other; None: nothing (zero). In attention the weights stay as
                they are and the values are replaced, and the keys too where `values` was asked for them. What sources
                erase stays ('both' is 'main' and 'conv' then).

        Knockouts nest: what any of them blocks is blocked, and where several put something in the same place, it is
        the innermost one's. Leaving the block restores the model bit for bit.

        Raises:
            MambalensError: for a layer, position, feature or path that does not exist, quoting it.
        """
        with self.apply(Knockout(sources, targets, layers, features, path, mixers, edges, instead)) as knockout:
            yield knockout

    def resolve(
        self,
        layers: Sequence[int] | int | str | None = None,
        features: Features = "all",
        path: Path = "main",
        mixers: str | None = None,
        somewhere: bool = False,
    ) -> Cutting:
        """A knockout looked up in the model, whatever its positions; arguments as for `knockout`.

        With `somewhere`, layers without the path are no mistake as long as others in the model have it (a window of a
        sweep).
        """
        paths, chosen = Paths.named(path), self.mixers_of(layers, mixers)
        asked = self.mixers_of(None, mixers) if somewhere else chosen
        if asked and not any(paths & mixer.paths for mixer in asked):
            ways = {mixer.kind: " and ".join(map(repr, mixer.paths.names)) for mixer in asked}
            has = "; ".join(f"{kind} has {names}" for kind, names in sorted(ways.items()))
            raise MambalensError(f"path={path!r}, but none of the layers has it: {has}.")
        return Cutting(self.feature_masks(features, layers, mixers), paths)

    @contextmanager
    def apply(self, knockout: Knockout, cutting: Cutting | None = None) -> Iterator[Knockout]:
        """`knockout(...)` with its arguments in one object.

        Args:
            knockout: what is cut.
            cutting: the same looked up already, in whose place layers, features, path and mixers are not asked for.
        """
        if cutting is None:
            cutting = self.resolve(knockout.layers, knockout.features, knockout.path, knockout.mixers)
        if knockout.instead is not None:
            cutting = cutting.replacing()
        block = _Block(knockout, cutting)
        with ExitStack() as stack:
            if not self._running:
                stack.enter_context(self._watching_passes())
            if not self._blocks:
                stack.enter_context(self._attached())
            self._blocks.append(block)
            stack.callback(self._blocks.remove, block)
            yield knockout
            _refuse_unreached(block)

    @contextmanager
    def add(
        self,
        vector: Float[Tensor, "*rows hidden"],
        layers: Sequence[int] | int | str | None,
        positions: Positions | None = None,
        scale: float = 1.0,
    ) -> Iterator[Addition]:
        """Add a vector to the residual stream behind some layers while the block runs (Turner et al. 2023).

        Behind a layer means to its output, which the next layer reads.

        Args:
            vector: what is added [hidden]; one for each layer [layers, hidden], in the order of `layers`; one for each
                prompt [batch, hidden]; or both [layers, batch, hidden].
            layers: layer numbers, or a kind of mixer: the layers that have one; None: every layer.
            positions: columns of `input_ids` (padding included; negative: from the end of the prompt) as ints, a list
                of ints for each row, or a boolean mask [T] or [batch, T]; None: every position. In `generate` they are
                the prompt's; generated tokens are reached by None, or where their column is named.
            scale: how many times the vector is added; negative: it is taken away.

        Blocks nest, with each other and with knockouts: what is added adds up. Leaving the block restores the model bit
        for bit.

        Raises:
            MambalensError: for a vector of another width or number of prompts, and a layer or position that does not
                exist, quoting it.
        """
        addition = Addition(vector, layers, positions, scale)
        config = self.model.config
        width = getattr(config, "hidden_size", None) or self.model.get_input_embeddings().weight.shape[1]
        steering = Steering(addition, self.layer_numbers(layers), width)
        with ExitStack() as stack:
            if not self._running:
                stack.enter_context(self._watching_passes())
            for number in steering.layers:
                stack.callback(self.layers[number].register_forward_hook(steering.behind(number)).remove)
            self._steering.append(steering)
            stack.callback(self._steering.remove, steering)
            yield addition
            _refuse_unreached(steering)

    @property
    def _running(self) -> list[_Block | Steering]:
        """Every block that runs."""
        return [*self._blocks, *self._steering]

    def cuts_of(self, mixer: Mixer) -> list[Cut]:
        """What is cut of a mixer in the running pass."""
        return self._current().cuts_of(mixer) if self._blocks else []

    def added_behind(
        self, layer: int, hidden: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time hidden"] | None:
        """What running blocks add behind a layer in the running pass; None where none does.

        Args:
            layer: its number.
            hidden: what it gave, for shape, dtype and device.
        """
        of_layer = [steering for steering in self._steering if layer in steering.layers]
        if not of_layer:
            return None
        nothing = torch.zeros_like(hidden)
        return sum((steering.added(steering.layers.index(layer), nothing) for steering in of_layer), nothing)

    @property
    def inside(self) -> list[Any]:
        """What the running blocks were told, as JSON; empty where none runs."""
        cuts = [[plain(block.knockout), {f"{m.layer} {m.kind}": plain(f) for m, f in block.cutting.features.items()}]
                for block in self._blocks]  # fmt: skip
        return [*cuts, *([steering.layers, plain(steering.addition)] for steering in self._steering)]

    @property
    def counts_back(self) -> bool:
        """Whether a running block has positions that count from the end of a prompt, so that none may be filled up."""
        told = [(block.knockout.sources, block.knockout.targets) for block in self._blocks]
        return counts_back(told) or any(counts_back(steering.addition.positions) for steering in self._steering)

    @property
    def by_prompt(self) -> bool:
        """Whether a running block says something of its own of every prompt, so that batches are as they must be."""
        return any(block.knockout.by_prompt for block in self._blocks) or any(
            steering.by_prompt for steering in self._steering
        )

    def cuts_around(self, last: Int[Tensor, " batch"], time: int) -> dict[Mixer, list[Cut]]:
        """What the running knockouts cut in a pass of right-padded prompts, the outermost first.

        Args:
            last: last position of every prompt; nothing is cut behind it.
            time: columns.
        """
        if not self._blocks:
            return {}
        inside = torch.arange(time) <= last.cpu()[:, None]
        found = self._cuts(len(last), Pass(time, 0, time))[0]
        return {mixer: [replace(cut, code=cut.code * inside) for cut in cuts] for mixer, cuts in found.items()}

    @contextmanager
    def rows(self, at_rows: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the block runs, layers take rows of a replay: what is added is added at the rows' positions.

        What running knockouts cut of them is among what their mixers are told (see `Mixer.resuming`).

        Args:
            at_rows: picks what belongs to positions [batch, T, ...] for the rows [batch, cuts x length, ...].
        """
        with ExitStack() as stack:
            for steering in self._steering:
                stack.enter_context(steering.rows(at_rows))
            if self._pass is not None:
                stack.callback(setattr, self, "_pass", self._pass)
                self._pass = replace(self._pass, cuts={}, keep_history=False)
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While the block runs, passes are of other rows than the prompts: nothing is cut or added in them.

        Their columns are not counted either.
        """
        blocks, self._blocks = self._blocks, []
        with ExitStack() as stack:
            stack.callback(setattr, self, "_blocks", blocks)
            for steering in self._steering:
                stack.enter_context(steering.paused())
            self._aside = True
            stack.callback(setattr, self, "_aside", False)
            yield

    @contextmanager
    def short(self, time: int) -> Iterator[None]:
        """Around passes of so many positions: transformers' Mamba-2 fills prompts up to 256 positions on a CPU.

        The arithmetic is the same but for its rounding; zeros alone are left out.
        """
        with ExitStack() as stack:
            for mixer in self.mixers:
                stack.enter_context(mixer.short(time))
            yield

    def layer_numbers(self, layers: Sequence[int] | int | str | None) -> list[int]:
        """Layers as a list of numbers, checked against the model."""
        if layers is None:
            return list(range(self.n_layers))
        if isinstance(layers, str):
            if layers not in self.kinds:
                raise MambalensError(f"layers={layers!r} is not a kind of mixer here: {choose(layers, self.kinds)}.")
            return sorted({mixer.layer for mixer in self.mixers if mixer.kind == layers})
        numbers = [int(layer) for layer in ([layers] if isinstance(layers, int) else layers)]
        wrong = [layer for layer in numbers if not 0 <= layer < self.n_layers]
        if wrong:
            raise MambalensError(
                f"layers has {wrong}, but the model has {self.n_layers} layers: 0 to {self.n_layers - 1}."
            )
        return numbers

    def mixers_of(self, layers: Sequence[int] | int | str | None, kind: str | None = None) -> list[Mixer]:
        """The mixers of some layers, of one kind if one is named; `layers` may be a kind itself."""
        numbers = set(self.layer_numbers(layers))
        if kind is not None and kind not in self.kinds:
            raise MambalensError(f"mixers={kind!r} is not a kind of mixer here: {choose(kind, self.kinds)}.")
        if isinstance(layers, str):
            if kind not in (None, layers):
                raise MambalensError(f"layers={layers!r} and mixers={kind!r} name two kinds of mixers: give one.")
            kind = layers
        return [mixer for mixer in self.mixers if mixer.layer in numbers and kind in (None, mixer.kind)]

    def feature_masks(
        self, features: Features, layers: Sequence[int] | int | str | None, kind: str | None = None
    ) -> dict[Mixer, Bool[Tensor, " feature"] | None]:
        """Boolean masks of a knockout's features, for every mixer it cuts; None stands for every feature."""
        numbers = self.layer_numbers(layers)
        return {
            mixer: self._feature_mask(mixer, for_layer(features, mixer.layer, numbers, self.n_layers))
            for mixer in self.mixers_of(layers, kind)
        }

    def _feature_mask(self, mixer: Mixer, features: Any) -> Bool[Tensor, " feature"] | None:
        if not isinstance(features, str):
            return explicit_mask(features, mixer.n_features, mixer.layer)
        parse_group(features)
        return None if features == "all" else group_mask(mixer.decay_norm().cpu(), features)

    @contextmanager
    def _watching_passes(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self.trunk.register_forward_pre_hook(self._before_pass, with_kwargs=True).remove)
            stack.callback(self.trunk.register_forward_hook(self._after_pass, with_kwargs=True).remove)
            stack.callback(self._forget)
            yield

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for mixer in self.mixers:
                stack.callback(mixer.attach(self._current))
            yield

    def _forget(self) -> None:
        """Nothing of a finished or broken-off block is left."""
        self._prompts.clear()
        self._pass = None

    def _current(self) -> Pass:
        if self._pass is None:
            raise MambalensError("A layer was called on its own inside a knockout: call the model.")
        return self._pass

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out which columns of this pass the positions of the running blocks are."""
        if self._aside:
            return
        ids = kwargs.get("input_ids")
        ids = ids if ids is not None else kwargs.get("inputs_embeds")
        ids = ids if ids is not None else args[0]
        batch, time = ids.shape[:2]
        cache = cache_among((*args, *kwargs.values()))
        prompt, past = self._prompts.get(cache, (time, 0)) if cache is not None else (time, 0)
        if cache is not None and not past and _holds_tokens(cache):
            raise MambalensError("The cache was filled before the block began: run the prompt inside the block.")
        running = Pass(prompt, past, past + time)
        whole = kwargs.get("use_cache") is False and cache is None
        for steering in self._steering:
            _reach(steering, steering.begin(batch, running), running, whole)
        cuts, later, generated = self._cuts(batch, running)
        for block, beyond in zip(self._blocks, later, strict=True):
            _reach(block, beyond, running, whole)
        self._pass = replace(running, keep_history=generated, cuts=cuts)

    def _cuts(self, batch: int, running: Pass) -> tuple[dict[Mixer, list[Cut]], list[list[int]], bool]:
        """What the running knockouts cut in a pass.

        Returns:
            The cuts of every mixer that is cut, the outermost first; for every block the positions behind the pass; and
            whether any target is generated.
        """
        cuts: dict[Mixer, list[Cut]] = {}
        beyond, keep_history = [], False
        for block in self._blocks:
            cut, later, generated = block.masks(batch, running)
            beyond.append(later)
            keep_history |= generated
            instead = block.knockout.instead
            if instead is not None and not running.past:
                _check_columns(instead, batch, running.prompt)
            for mixer, features in block.cutting.features.items():
                paths = block.cutting.paths & mixer.paths
                if paths and (features is None or features.any()):
                    written = None if instead is None else _written(instead, mixer, batch, running)
                    cuts.setdefault(mixer, []).append(replace(cut, features=features, paths=paths, instead=written))
        return cuts, beyond, keep_history

    def _after_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._aside:
            return
        for steering in self._steering:
            steering.end()
        cache = cache_among((*args, *kwargs.values()))
        if cache is None:
            cache = cache_among(output.values()) if isinstance(output, Mapping) else None
        if cache is not None and self._pass is not None:
            self._prompts[cache] = (self._pass.prompt, self._pass.length)
        self._pass = None

    @torch.no_grad()
    def effective_attention(
        self,
        input_ids: Int[Tensor, "batch time"],
        layer: int,
        attention_mask: Shaped[Tensor, "batch time"] | None = None,
        features: Features = "all",
        reduce: str | None = None,
        mixers: str | None = None,
    ) -> Float[Tensor, "batch feature time time"] | Float[Tensor, "batch time time"]:
        """How much feature f of position s enters the output at t: `alpha[t, s, f]` (Ali et al. 2024, eq. 12).

        Inside a `knockout` block, blocked entries are zero. Softmax weights in attention; in Mamba the scan's, signed.
        Memory grows with features x T^2, never with the state too; with `reduce`, with T^2 alone.

        Args:
            input_ids: tokens.
            layer: layer number.
            attention_mask: 0 at padding.
            features: a group, a feature's number, a mask or a list.
            reduce: 'mean' or 'mean_abs' (mean of absolute values) over these features.
            mixers: which kind of mixer, in layers that have two.

        Returns:
            Targets t in rows, sources s in columns.
        """
        mixer = self.mixer_of(layer, mixers)
        mask = self.feature_masks(features, layer, mixer.kind)[mixer]
        mixing = self.token_mixing(input_ids, layer, attention_mask, mixer.kind)
        chosen = torch.arange(mixing.n_features) if mask is None else mask.nonzero().flatten()
        return mixing.attention(chosen, reduce)

    def mixer_of(self, layer: int, kind: str | None = None) -> Mixer:
        """The one mixer of a layer; where it has two, the kind says which.

        Raises:
            MambalensError: if there is none, or more than one.
        """
        found = self.mixers_of(layer, kind)
        if len(found) != 1:
            has = ", ".join(mixer.kind for mixer in self.mixers_of(layer)) or "no token mixer"
            raise MambalensError(f"layer {layer} has {has}: name one of its mixers with mixers='...'.")
        return found[0]

    @torch.no_grad()
    def values(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Shaped[Tensor, "batch time"] | None = None,
        layers: Sequence[int] | int | str | None = None,
        keys: bool = False,
    ) -> Values:
        """What the mixers hand on at every position of these tokens, for `knockout(..., instead=...)`.

        Args:
            input_ids: tokens.
            attention_mask: 0 at padding.
            layers: of which layers; None: all.
            keys: keep the keys of attention too, which then stand in with the values. A key has its position in it
                where the model has rotary positions: the other prompt's stay what they were there. Recurrences keep
                their k and B (`refuse_keys`).

        Raises:
            MambalensError: inside a knockout, or for keys where none of the layers has attention.
        """
        if self._blocks:
            raise MambalensError("Values are those of a pass without a knockout: ask for them outside the block.")
        if keys:
            refuse_keys([Cutting(dict.fromkeys(self.mixers_of(layers)), Paths.MAIN)])
        found: dict[Mixer, Written] = {}

        def keep(mixer: Mixer, call: Captured) -> None:
            written = mixer.written(call)
            found[mixer] = written if keys else written._replace(keys=None)

        self._capture(self.mixers_of(layers), input_ids, attention_mask, keep, lambda mixer: mixer.writing())
        return Values(found)

    @torch.no_grad()
    def token_mixing(
        self,
        input_ids: Int[Tensor, "batch time"],
        layer: int,
        attention_mask: Shaped[Tensor, "batch time"] | None = None,
        mixers: str | None = None,
    ) -> TokenMixing:
        """What a layer's features move between positions of these tokens, see `TokenMixing`."""
        mixer = self.mixer_of(layer, mixers)
        found: list[TokenMixing] = []

        def keep(shown: Mixer, mixing: TokenMixing) -> None:
            if shown is mixer:
                found.append(mixing)

        self.watch(input_ids, keep, layer, attention_mask)
        return found[-1]

    @torch.no_grad()
    def watch(
        self,
        input_ids: Int[Tensor, "batch time"],
        see: Callable[[Mixer, TokenMixing], None],
        layers: Sequence[int] | int | str | None = None,
        attention_mask: Shaped[Tensor, "batch time"] | None = None,
    ) -> None:
        """Run the model once and show every layer's token mixing when the layer has run; none is kept.

        Args:
            input_ids: tokens.
            see: called with the mixer and its `TokenMixing`.
            layers: which to show; None: all.
            attention_mask: 0 at padding.
        """
        if any(block.knockout.instead is not None for block in self._blocks):
            raise MambalensError(
                "Effective attention says how sources enter, and not what stands in their place: leave the block whose "
                "knockout has instead=..., or knock out to zero."
            )

        def show(mixer: Mixer, call: Captured) -> None:
            see(mixer, mixer.token_mixing(call, self._current().cuts.get(mixer, []) if self._blocks else ()))

        self._capture(self.mixers_of(layers), input_ids, attention_mask, show)

    def _capture(
        self,
        mixers: Sequence[Mixer],
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Shaped[Tensor, "batch time"] | None,
        show: Callable[[Mixer, Captured], None],
        around: Callable[[Mixer], AbstractContextManager[Any]] = lambda mixer: mixer.probing(),
    ) -> None:
        def watched(mixer: Mixer, probe: Any) -> Callable[..., None]:
            return lambda module, args, kwargs, output: show(mixer, Captured(args, kwargs, output, probe))

        with ExitStack() as stack:
            for mixer in mixers:
                hook = watched(mixer, stack.enter_context(around(mixer)))
                stack.callback(mixer.module.register_forward_hook(hook, with_kwargs=True).remove)
            # Nobody asks what the head makes of it, which for many short prompts costs as much as some layers.
            self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    @torch.no_grad()
    def check(self) -> None:
        """Compare every adapter's arithmetic with the module's own output, and see that knockouts leave no way past.

        Four forward passes on random tokens: in three every edge into two targets is cut, and what a layer gives at
        these must not change with the other tokens (see `leaks`); one compares the arithmetic. The model is left as it
        was.

        Raises:
            MambalensError: naming the model's class, the layer and the module that still mixes positions; or the first
                layer whose arithmetic differs, or that cannot be compared.
        """
        device = next(self.model.parameters()).device
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (1, 7), generator=generator).to(device)

        def compare(mixer: Mixer, call: Captured) -> None:
            difference = mixer.parity(call)
            if difference > PARITY_TOLERANCE.get(self.model.dtype, 5e-2):
                why = "this version of transformers is not one" if mixer.familiar else "its class is not one"
                raise MambalensError(
                    f"layer {mixer.layer}: the {mixer.kind} adapter differs from {type(mixer.module).__name__} by "
                    f"{difference:.1e} (relative); {why} it was made for."
                )

        # First, since it runs the model as it is: parity asks mixers for more, and they are not all made for that.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # no dropout
        try:
            refuse_leaks(self.model, self.layers, self.mixers, self.knockout)
            self._capture(self.mixers, ids, None, compare)
        except (AttributeError, TypeError, LookupError, RuntimeError) as error:
            strange = sorted({type(mixer.module).__name__ for mixer in self.mixers if not self._familiar(mixer)})
            if not strange or isinstance(error, torch.OutOfMemoryError):
                raise
            raise MambalensError(
                f"{type(self.model).__name__}: {', '.join(strange)} cannot be compared with the adapters: "
                f"{type(error).__name__}: {error}. Supported: {SUPPORTED}."
            ) from error
        finally:
            for module in training:
                module.training = True


def _reach(block: _Block | Steering, later: list[int], running: Pass, whole: bool) -> None:
    """Note how far a pass goes and how far a block's positions do.

    Args:
        block: a running block.
        later: its positions behind the pass.
        running: the pass.
        whole: no other pass comes behind this one.

    Raises:
        MambalensError: if a position will never come.
    """
    if later and whole:
        raise MambalensError(
            f"Position {max(later)} is out of range: the input has {running.length} tokens (positions "
            f"{-running.length} to {running.length - 1})."
        )
    block.reached = max(block.reached, running.length)
    block.wanted = max(block.wanted, *(position + 1 for position in later), 0)


def _refuse_unreached(block: _Block | Steering) -> None:
    """Raise for a position that none of a block's passes had."""
    if 0 < block.reached < block.wanted:
        raise MambalensError(
            f"Position {block.wanted - 1} is out of range: the longest input had {block.reached} "
            f"tokens (positions {-block.reached} to {block.reached - 1})."
        )


def _check_columns(instead: Values, batch: int, time: int) -> None:
    """Values that stand in have the input's columns."""
    prompts, columns = instead.shape
    if prompts not in (1, batch) or columns < time:
        raise MambalensError(
            f"instead has values for {prompts} x {columns} positions, but the input has shape [{batch}, {time}]: "
            "bring them to its columns with `Values.at`."
        )


def _written(instead: Values, mixer: Mixer, batch: int, running: Pass) -> Written:
    """What stands in the place of what a mixer's sources hand on, over all columns; zero past the prompt's."""
    if mixer not in instead.of:
        raise MambalensError(
            f"layer {mixer.layer} is cut, but instead has no values for it: ask `values` for every layer that is cut."
        )

    def over_columns(part: Tensor) -> Tensor:
        wide = part[:, : running.prompt].expand(batch, *(-1 for _ in part.shape[1:]))
        later = running.length - running.prompt
        return torch.cat([wide, wide.new_zeros(batch, later, *wide.shape[2:])], 1) if later else wide

    return instead.of[mixer].each(over_columns)


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache has been filled already."""
    for layer in getattr(cache, "layers", []):
        previous = getattr(layer, "has_previous_state", None)
        if isinstance(previous, dict) and any(previous.values()):
            return True
        if hasattr(layer, "get_seq_length") and int(layer.get_seq_length()) > 0:
            return True
    return False
