"""Softmax attention of any transformers model whose attention takes an attention mask; Geva et al. 2023, section 4.

The module's own code runs, eager or sdpa, with sinks and soft-capping. A hook before it adds the knockout to the
causal, sliding-window and padding mask that the model made. A target that has no source left gets zeros: softmax has
no answer there, so its mask is left alone and its heads' outputs are set to zero before the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mambalens.hooks.attention_edges import AttentionArrivals
from mambalens.hooks.attention_reading import (
    Beside,
    BesideCache,
    Other,
    Probe,
    changed_reading,
    others_beside,
    reads_by_function,
    watched_reading,
)
from mambalens.hooks.calls import RESIDUAL, cache_argument, signature_of
from mambalens.hooks.edges import Arrivals, Weakened
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.fixed_scales import FixedScales
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, blocked_entries, on
from mambalens.hooks.mixer import Captured, Mixer, Pass, replace_forward
from mambalens.hooks.resume import Base, Replaced, Rows, Seen
from mambalens.hooks.summands import Summands
from mambalens.hooks.token_mixing import TokenMixing
from mambalens.hooks.values import Written

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")


class AttentionMixer(Mixer):
    """A feature is a query head."""

    kind = "attention"
    has_keys = True
    tested = frozenset({
        "BailingHybridAttention", "BambaAttention", "BloomAttention", "CohereAttention", "DeepseekV2Attention",
        "DeepseekV3Attention", "FalconAttention",
        "FalconH1Attention", "GPT2Attention", "GPTJAttention", "GPTNeoXAttention", "Gemma2Attention", "Gemma3Attention",
        "GptOssAttention", "GraniteMoeHybridAttention", "JambaAttention", "KimiLinearAttention", "Lfm2Attention",
        "Lfm2MoeAttention", "Lfm3Attention", "LlamaAttention", "MiniMaxAttention", "MistralAttention",
        "MixtralAttention",
        "NemotronHAttention", "OPTAttention", "Olmo2Attention", "OlmoHybridAttention", "Phi3Attention",
        "Qwen2Attention", "Qwen3Attention", "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention",
        "RecurrentGemmaAttention",
        "SmolLM3Attention", "StableLmAttention", "Zamba2Attention", "ZambaAttention",
    })  # fmt: skip

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if _output_projection(module) is None:
            return False
        if hasattr(module, "indexer"):
            # Which sources a target reads is chosen among all of them: one that is cut still takes another's place.
            return False
        arguments = signature_of(type(module)).parameters
        causal = getattr(module, "is_causal", False) or "alibi" in arguments
        return causal and "attention_mask" in arguments and cache_argument(type(module)) is not None

    @property
    def n_features(self) -> int:
        return int(getattr(self.module, "num_heads", None) or self.module.config.num_attention_heads)

    @property
    def _takes_booleans(self) -> bool:
        """Whether masks are boolean (sdpa), and not added to the scores."""
        return getattr(getattr(self.module, "config", None), "_attn_implementation", "eager") == "sdpa"

    def attach(self, current: Callable[[], Pass]) -> Callable[[], None]:
        signature = signature_of(type(self.module))
        projection = _output_projection(self.module)
        assert projection is not None
        silent: list[Tensor | None] = [None]  # targets without any source left, of the running call

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            silent[0] = None
            running = current()
            active = [cut for cut in running.cuts_of(self, Paths.MAIN) if cut.instead is None]
            if not active:
                return None
            bound = signature.bind(module, *args, **kwargs)
            hidden = next(v for v in bound.arguments.values() if isinstance(v, Tensor))
            mask, silent[0] = self.cut_mask(
                bound.arguments.get("attention_mask"), [cut.to(hidden.device) for cut in active], hidden, running.past
            )
            if "attention_mask" in kwargs or len(args) < list(signature.parameters).index("attention_mask"):
                return args, kwargs | {"attention_mask": mask}
            index = list(signature.parameters).index("attention_mask") - 1
            return (*args[:index], mask, *args[index + 1 :]), kwargs

        def before_projection(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if silent[0] is None:
                return None
            return (self._silenced(args[0], silent[0]), *args[1:])

        def replacing(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                returned = original(*args, **kwargs)
                active = [cut for cut in current().cuts_of(self, Paths.MAIN) if cut.instead is not None]
                return self._with_others(original, args, kwargs, returned, active) if active else returned

            return forward

        restore = replace_forward(self.module, replacing)
        handles = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            projection.register_forward_pre_hook(before_projection),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()
            restore()

        return detach

    def cut_mask(
        self, mask: Any, cuts: Sequence[Cut], hidden: Float[Tensor, "batch time hidden"], past: int
    ) -> tuple[Shaped[Tensor, "#batch #feature time key"], Bool[Tensor, "batch feature time"] | None]:
        """The model's mask with the cuts added.

        Equation: Attention knockout
            scores^-S[t, s] = -inf    for t in T, s in S, in the heads F, in every layer of the window
            alpha^-S[t, s] = exp(scores[t, s]) / sum_{r<=t, r not in S} exp(scores[t, r])    for s not in S, else 0
            y_t = sum_s alpha^-S[t, s] v_s    0 if no source is left

            Source: Geva et al. 2023, arXiv:2304.14767, section 4

            Unlike in a scan the weights that are left grow, so that they add up to 1 again. v_s are the values.

        Args:
            mask: what the module was to get: None, or boolean or additive [batch, heads or 1, T, S].
            cuts: over all columns so far.
            hidden: the module's input, for its shape, dtype and device.
            past: columns held by a cache.

        Returns:
            The mask, and the targets that it would leave without any source, which it leaves alone.
        """
        time, seen = hidden.shape[1], past + hidden.shape[1]
        mask = self._own_mask(mask, hidden, past)
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        blocked = blocked_entries(cuts)[:, :, past:]  # [B, 1 or H, T, columns so far]
        keys = mask.shape[-1]
        # A sliding cache holds the last columns only; a static cache has room for columns to come.
        blocked = blocked[..., seen - keys :] if keys <= seen else F.pad(blocked, (0, keys - seen))
        empty = allowed.any(-1) & ~(allowed & ~blocked).any(-1)  # [B, 1 or H, T]
        blocked = blocked & ~empty[..., None]
        if mask.dtype == torch.bool:
            mask = mask & ~blocked
        else:
            mask = mask.expand(torch.broadcast_shapes(mask.shape, blocked.shape))
            mask = mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
        silent = empty.expand(hidden.shape[0], self.n_features, time) if empty.any() else None
        return mask, silent

    def _own_mask(
        self, mask: Any, hidden: Float[Tensor, "batch time hidden"], past: int
    ) -> Shaped[Tensor, "#batch #feature time key"]:
        """The model's mask, also where it leaves it to the module."""
        if mask is None:
            seen = past + hidden.shape[1]
            query = torch.arange(past, seen, device=hidden.device)
            mask = query[:, None] >= torch.arange(seen, device=hidden.device)  # [T, S]
            mask = mask[None, None]
            if not self._takes_booleans:
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise MambalensError(
                f"layer {self.layer}: {type(self.module).__name__} was given a mask of type {type(mask).__name__}"
                f"{list(mask.shape) if isinstance(mask, Tensor) else ''}, which cannot block single positions: load "
                "the model with attn_implementation='sdpa' or 'eager'."
            )
        return mask

    def _with_others(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        returned: Any,
        cuts: Sequence[Cut],
    ) -> Any:
        """What the module gives, at targets computed again with other values in the place of the sources'."""
        given = Captured(args, kwargs, returned, None).arguments(self.module)
        hidden = next(v for v in given.values() if isinstance(v, Tensor))
        time = hidden.shape[1]
        cuts = [cut.to(hidden.device) for cut in cuts]
        own = _added(self._own_mask(given.get("attention_mask"), hidden, 0)[..., :time], hidden.dtype)
        others = []
        for cut in cuts:
            assert cut.instead is not None and cut.instead.main is not None
            keys = None if cut.instead.keys is None else cut.instead.keys.transpose(1, 2)
            others.append(Other(keys, cut.instead.main.transpose(1, 2), blocked_entries([cut])))
        beside = Beside.of(others, own)
        more: dict[str, Any] = {"attention_mask": own}
        cache: Any = Probe()
        if not reads_by_function(self.module):
            cache, more["attention_mask"] = BesideCache(cache, beside), beside.mask
            if given.get("alibi") is not None:
                more["alibi"] = torch.cat([given["alibi"][..., :time]] * (1 + len(others)), -1)
        args, kwargs = self._handed(cache, more, args, kwargs)
        with self._reading_beside(beside):
            replaced = original(*args, **kwargs)[0]
        at = torch.stack([cut.targets for cut in cuts]).any(0)[..., None]
        return (torch.where(at, replaced, returned[0]), *returned[1:])

    @contextmanager
    def _reading_beside(self, beside: Beside) -> Iterator[None]:
        """While the block runs, the function that reads, where the module has one, finds others beside its own."""
        if not reads_by_function(self.module):
            yield  # it finds them in what stands in for its cache
            return
        with self._openly(), others_beside(self.module, beside):
            yield

    @contextmanager
    def probing(self) -> Iterator[Probe]:
        """The model computes its attention weights openly, and values and output are kept, while the block runs."""
        probe = Probe()
        projection = _output_projection(self.module)
        assert projection is not None

        def watch_output(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not hasattr(probe, "output"):
                probe.output = args[0]

        handle = projection.register_forward_pre_hook(watch_output)
        try:
            with self._openly(), self._with_cache(probe), watched_reading(self.module, probe):
                yield probe
        finally:
            handle.remove()

    @contextmanager
    def writing(self) -> Iterator[Probe]:
        if reads_by_function(self.module):
            with self.probing() as probe:
                yield probe
            return
        probe = Probe()
        with self._with_cache(probe):  # and the model computes as it does
            yield probe

    @contextmanager
    def _openly(self) -> Iterator[None]:
        """The module computes its attention weights while the block runs."""
        config = getattr(self.module, "config", None)  # without one there is one implementation only
        before = getattr(config, "_attn_implementation", None)
        if config is not None:
            config._attn_implementation = "eager"
        try:
            yield
        finally:
            if config is not None:
                config._attn_implementation = before

    @contextmanager
    def _with_cache(self, cache: Any, **arguments: Any) -> Iterator[None]:
        """The module is handed an object of ours as its cache, and other arguments, while the block runs."""

        def hand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._handed(cache, arguments, args, kwargs)

        handle = self.module.register_forward_pre_hook(hand, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _handed(
        self, cache: Any, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call with an object of ours as its cache, and other arguments."""
        signature = signature_of(type(self.module))
        name = cache_argument(type(self.module))
        assert name is not None
        bound = signature.bind(self.module, *args, **kwargs)
        given = {k: v for k, v in arguments.items() if k in bound.arguments or k == "attention_mask"}
        bound.arguments.update({name: cache} | given)
        bound.arguments = {p: bound.arguments[p] for p in signature.parameters if p in bound.arguments}
        return bound.args[1:], bound.kwargs

    def _silenced(
        self, heads: Float[Tensor, "batch time head_width"], silent: Bool[Tensor, " batch #feature time"]
    ) -> Float[Tensor, "batch time head_width"]:
        """Outputs of the heads, zero at the targets without any source."""
        heads = rearrange(heads, "batch time (head width) -> batch time head width", head=self.n_features)
        gone = rearrange(silent, "batch head time -> batch time head 1").to(heads.device)
        return rearrange(heads.masked_fill(gone, 0), "batch time head width -> batch time (head width)")

    def written(self, call: Captured) -> Written:
        return Written(call.probe.values.transpose(1, 2), None, call.probe.keys.transpose(1, 2))

    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        """Weights come from the module's own eager code."""
        alpha = call.output[1]  # [B, H, T, T]
        main = [cut.to(alpha.device) for cut in on(Paths.MAIN, cuts)]
        if main:
            # Exact zeros, also in the rows that have no source left, which the module computed uncut.
            alpha = alpha.masked_fill(blocked_entries(main), 0.0)
        values = call.probe.values  # [B, key/value heads, T, width]
        group = self.n_features // values.shape[1]  # query heads that read the same values
        values = repeat(values, "batch group time width -> batch time (group head) width", head=group)
        output = rearrange(call.probe.output, "batch time (head width) -> batch time head width", head=self.n_features)
        if main:  # what is read of no source at all is silenced behind the function that the probe watches
            read = rearrange((alpha != 0).any(-1), "batch head time -> batch time head 1")
            output = output.masked_fill(~read, 0.0)
        diagonal = rearrange(alpha.diagonal(dim1=-2, dim2=-1), "batch head time -> batch time head")
        skip = output.new_zeros(self.n_features)
        return TokenMixing(values, skip, output, diagonal, lambda features: alpha[:, features], None)

    @contextmanager
    def keeping(self, base: Base) -> Iterator[list[Kept]]:
        with self._seeing(lambda seen: _kept(*seen, base.to(seen.keys.device))) as kept:
            yield kept

    @contextmanager
    def watching(self, around: Sequence[Cut] = ()) -> Iterator[list[Seen]]:
        with self._seeing(lambda seen: seen) as found:
            yield found

    @contextmanager
    def _seeing(self, keep: Callable[[SeenPrompts], Any]) -> Iterator[list[Any]]:
        """Around a pass: what is kept of the keys and values of the module's first call."""
        found: list[Any] = []
        probe = Probe()

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = Captured(args, kwargs, output, None).arguments(module)
            found.append(keep(SeenPrompts(probe.keys, probe.values, given.get("attention_mask"), given.get("alibi"))))
            del probe.keys, probe.values
            caching.close()  # rows come next
            handle.remove()

        handle = self.module.register_forward_hook(after, with_kwargs=True)
        with ExitStack() as caching:
            caching.enter_context(self._with_cache(probe))
            try:
                yield found
            finally:
                handle.remove()

    def kept_numbers(self, time: int, sets: int) -> int:
        return 4 * time * self.n_features * int(getattr(self.module, "head_dim", 64))

    @contextmanager
    def resuming(self, kept: Kept, base: Base, rows: Rows) -> Iterator[None]:
        here, cuts = base.to(kept.keys.device), rows.to(kept.keys.device)
        known = rows.known.main
        told = zip(here.instead, base.known.instead, strict=True)
        others = [other for other, on_host in told if on_host.sources[known].any()]
        free, silent = _free_of_rows(kept, here, cuts)
        if others:
            with self._resuming_beside(kept, here, cuts, others, free), self._silencing(silent):
                yield
            return
        mask = _over_keys(free, here)
        if kept.bias is not None or not self._takes_booleans:
            low = torch.finfo(kept.keys.dtype).min
            added = mask.new_zeros((), dtype=kept.keys.dtype) if kept.bias is None else kept.bias
            added = added if kept.bias is None else _with_own_keys(added, here, len(rows)).repeat(1, 1, len(rows), 1)
            mask = torch.where(mask, added, low)
        arguments = {"attention_mask": mask}
        if kept.alibi is not None:
            arguments["alibi"] = _alibi_of_rows(kept.alibi, here, len(rows))
        with self._with_cache(_RowCache(kept), **arguments), self._silencing(silent):
            yield

    @contextmanager
    def _silencing(self, silent: Bool[Tensor, " batch #feature row_time"]) -> Iterator[None]:
        """While the block runs, what the heads read is zero at some positions."""
        # To ask a device whether any is silent would be to wait for it.
        if silent.is_cpu and not silent.any():
            yield
            return

        def silence(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (self._silenced(args[0], silent), *args[1:])

        projection = _output_projection(self.module)
        assert projection is not None
        handle = projection.register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _resuming_beside(
        self,
        kept: Kept,
        base: Base,
        rows: Rows,
        others: Sequence[Replaced],
        free: Bool[Tensor, " batch #feature row length time"],
    ) -> Iterator[None]:
        """`resuming` where other values stand in the place of some sources'.

        Args:
            kept, base, rows: as there.
            others: these values.
            free: which positions of the prompt the rows may read.
        """
        allowed = _over_keys(free, base)
        own = _added(allowed, kept.keys.dtype)
        if kept.bias is not None:
            bias = _with_own_keys(kept.bias, base, len(rows)).repeat(1, 1, len(rows), 1)
            own = torch.where(allowed, bias, own)

        def of_keys(values: Float[Tensor, "batch time group width"]) -> Float[Tensor, "batch group key width"]:
            """Those of the base's positions, then those of the rows'."""
            own = base.own_columns(values).repeat(1, len(rows), 1, 1)
            return torch.cat([values[:, : kept.keys.shape[2]], own], 1).transpose(1, 2)

        found = []
        for written, sources in others:
            assert written.main is not None
            keys = None if written.keys is None else of_keys(written.keys)
            entries = _over_keys(_blocked_of_rows(base, rows, sources), base)
            found.append(Other(keys, of_keys(written.main), entries))
        beside = Beside.of(found, own)
        cache: Any = _RowCache(kept)
        arguments: dict[str, Any] = {"attention_mask": own}
        if not reads_by_function(self.module):
            cache, arguments["attention_mask"] = BesideCache(cache, beside), beside.mask
            if kept.alibi is not None:
                arguments["alibi"] = torch.cat([_alibi_of_rows(kept.alibi, base, len(rows))] * (1 + len(found)), -1)
        with self._with_cache(cache, **arguments), self._reading_beside(beside):
            yield

    @contextmanager
    def attributing(
        self,
        weakened: Weakened | None = None,
        features: Bool[Tensor, " feature"] | None = None,
        around: Sequence[Cut] = (),
    ) -> Iterator[list[Arrivals]]:
        if any(cut.instead is not None for cut in around):
            raise MambalensError(
                f"layer {self.layer} is attention inside a knockout that has instead=..., and edges are not attributed "
                "by gradients there: ask outside the block, or knock out to zero."
            )
        found: list[Arrivals] = []
        projection = _output_projection(self.module)
        assert projection is not None
        sink = any("sink" in name for name, _ in self.module.named_parameters(recurse=False))

        def arrive(
            weights: Float[Tensor, "batch head time key"],
            values: Float[Tensor, "batch group key width"],
            read: Float[Tensor, "batch time head width"],
        ) -> Float[Tensor, "batch time head width"]:
            arrivals = AttentionArrivals(weights, values, read, weakened, features, sink)
            found.append(arrivals)
            return arrivals.arrived

        def forward(original: Callable[..., Any]) -> Callable[..., Any]:
            """Where no function of the module's file reads, weights are known when all is over: it runs twice."""

            def twice(*args: Any, **kwargs: Any) -> Any:
                probe = Probe()
                args, kwargs = self._handed(probe, {}, args, kwargs)
                # Weights want a gradient only where something is cut by them.
                with nullcontext() if weakened is not None else torch.no_grad():
                    weights = original(*args, **kwargs)[1]

                def before_projection(module: nn.Module, given: tuple[Any, ...]) -> Any:
                    read = rearrange(given[0], "batch time (head width) -> batch time head width", head=self.n_features)
                    return (arrive(weights, probe.values, read).flatten(2), *given[1:])

                # Before what silences targets without any source, whose weights are those without the cut.
                handle = projection.register_forward_pre_hook(before_projection, prepend=True)
                try:
                    return original(*args, **kwargs)
                finally:
                    handle.remove()

            return twice

        with ExitStack() as stack:
            stack.enter_context(self._openly())
            if not stack.enter_context(changed_reading(self.module, arrive)):
                stack.callback(replace_forward(self.module, forward))
            yield found

    def summands(
        self,
        call: Captured,
        at: Int[Tensor, " batch"],
        direction: Float[Tensor, "batch hidden"],
        cuts: Sequence[Cut] = (),
    ) -> Summands:
        """The module runs again, as it is or is cut; its own code leads from what the heads read to the output."""
        if any(cut.instead is not None for cut in cuts) and not reads_by_function(self.module):
            raise MambalensError(
                f"layer {self.layer}: {type(self.module).__name__} reads by code of its own, in which other values "
                "cannot be told from its own sources': ask for contributions in a knockout without instead (zero)."
            )
        rows = torch.arange(len(at), device=at.device)
        args, kwargs = _without_residual(self.module, call.args, call.kwargs)
        projection = _output_projection(self.module)
        assert projection is not None
        with torch.enable_grad(), FixedScales(), self.attributing() as found:
            output = self.module.forward(*args, **kwargs)[0]
            at_last = (direction * output[rows, at]).sum()
            nodes = [arrivals.nodes[Paths.MAIN] for arrivals in found]
            gradients = torch.autograd.grad(at_last, nodes, allow_unused=True)  # [B, T, H, P]
        time = output.shape[1]
        shares = direction.new_zeros(())
        # Where other values stand behind its own the module reads twice, and targets that are cut what it read then.
        for arrivals, gradient in zip(found, gradients, strict=True):
            assert isinstance(arrivals, AttentionArrivals)
            if gradient is not None:
                weights, values = arrivals.weights.detach()[rows, :, at], arrivals.values.detach()  # [B, H, (S P)]
                handed = torch.einsum("bhsp,bhp->bhs", values.to(gradient.dtype), gradient[rows, at]) * weights
                shares = shares + rearrange(handed, "batch head (run time) -> run batch time head", time=time).sum(0)

        def nothing(module: nn.Module, given: tuple[Any, ...]) -> Any:
            return (torch.zeros_like(given[0]), *given[1:])

        handle = projection.register_forward_pre_hook(nothing)
        try:
            with torch.no_grad():
                empty = self.module.forward(*args, **kwargs)[0][rows, at]
        finally:
            handle.remove()
        return Summands(Paths.MAIN, shares, None, (direction * empty).sum(-1))

    def parity(self, call: Captured) -> float:
        mixing = self.token_mixing(call, ())
        ours = torch.einsum("bfts,bsfp->btfp", mixing.alpha, mixing.values)
        return float((ours - mixing.output).abs().max() / mixing.output.abs().max().clamp_min(1e-30))


class Kept(NamedTuple):
    """What rows resume from in an attention layer."""

    keys: Float[Tensor, "batch group time width"]
    """Of the heads that keys and values have."""
    values: Float[Tensor, "batch group time value_width"]
    allowed: Bool[Tensor, " batch #feature length time"]
    """What the model lets the replayed positions read."""
    bias: Float[Tensor, " batch #feature length time"] | None
    """What the model's mask adds where it allows to read; None where it adds nothing."""
    alibi: Float[Tensor, " ..."] | None
    """Bias for every key [batch x heads, 1, T] or [batch, heads, 1, T], in models with ALiBi."""
    most_cuts: int
    """See `Mixer.keeping`."""


def _kept(
    keys: Float[Tensor, "batch group time width"],
    values: Float[Tensor, "batch group time value_width"],
    mask: Shaped[Tensor, "#batch #feature time key"] | None,
    alibi: Float[Tensor, " ..."] | None,
    base: Base,
) -> Kept:
    """What rows resume from, with the part of the model's mask that belongs to their positions."""
    batch, time = base.sources.shape[1:]
    bias = None
    if mask is None:
        allowed = base.columns[:, None, :, None] >= torch.arange(time, device=keys.device)
    else:  # a sliding window, or whatever else the model masks
        mask = mask[..., :time].expand(batch, *mask.shape[1:3], time)
        mask = mask[torch.arange(batch, device=mask.device)[:, None], :, base.columns].transpose(1, 2)
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if mask.dtype != torch.bool:
            bias = mask.masked_fill(~allowed, 0.0)
            bias = None if bias.is_cpu and not bias.any() else bias  # a device is not asked, which would be waiting
    # Rows of a prompt see their own tokens only: many at once would be mostly mask.
    most = max(1, max(time, 256) // base.length)
    return Kept(keys, values, allowed, bias, alibi, most)


class SeenPrompts(NamedTuple):
    """What attention has seen of whole prompts; see `resume.Seen`."""

    keys: Float[Tensor, "batch group time width"]
    values: Float[Tensor, "batch group time value_width"]
    mask: Shaped[Tensor, "#batch #feature time key"] | None
    """The model's."""
    alibi: Float[Tensor, " ..."] | None

    def kept(self, base: Base, prompts: Int[Tensor, " batch"]) -> Kept:
        """What rows resume from: the keys and values of these prompts."""
        base, prompts = base.to(self.keys.device), prompts.to(self.keys.device)
        mask, alibi = self.mask, self.alibi
        if mask is not None and len(mask) > 1:
            mask = mask[prompts]
        if alibi is not None and len(alibi) > 1:
            heads = len(alibi) // len(self.keys)  # of a prompt, where they lie in the first dimension
            alibi = alibi.unflatten(0, (len(self.keys), heads))[prompts].flatten(0, 1)
        return _kept(self.keys[prompts], self.values[prompts], mask, alibi, base)


class _RowCache:
    """Stands in for a cache: the rows of a prompt see its keys and values once, then their own."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def update(
        self,
        keys: Float[Tensor, "batch group time width"],
        values: Float[Tensor, "batch group time value_width"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch group all_time width"], Float[Tensor, "batch group all_time value_width"]]:
        """Keys and values of the base, those of the rows behind them."""
        return torch.cat([self.kept.keys, keys], 2), torch.cat([self.kept.values, values], 2)


def _free_of_rows(
    kept: Kept, base: Base, rows: Rows
) -> tuple[Bool[Tensor, " batch #feature row length time"], Bool[Tensor, " batch #feature row_time"]]:
    """Which positions of the prompt the rows may read, where something else may stand.

    Returns:
        These, and the positions that their cut leaves without any source; their mask is as without the cut.
    """
    allowed = kept.allowed[:, :, None]  # [B, 1 or H, 1, L, T]
    free = allowed & ~_blocked_of_rows(base, rows, base.sources)
    silent = ~free.any(-1)  # [B, 1 or H, R, L]
    return torch.where(silent[..., None], allowed, free), silent.flatten(2, 3)


def _blocked_of_rows(
    base: Base, rows: Rows, sources: Bool[Tensor, "sourceset batch time"]
) -> Bool[Tensor, " batch #feature row length time"]:
    """Which positions of the prompt the rows are cut from by source sets."""
    blocked = torch.zeros((), dtype=torch.bool, device=base.first.device)
    for number, (source, target) in enumerate(zip(rows.on(Paths.MAIN), rows.target, strict=True)):
        read = sources[source].transpose(0, 1)  # [B, R, T]
        at = base.targets[target].transpose(0, 1)  # [B, R, L]
        pair = (at[..., None] & read[:, :, None])[:, None]  # [B, 1, R, L, T]
        blocked = blocked | (pair if rows.features is None else pair & rows.features[number].T[None, :, :, None, None])
    return blocked


def _over_keys(
    free: Bool[Tensor, " batch #feature row length time"], base: Base
) -> Bool[Tensor, " batch #feature row_time key"]:
    """What holds for positions of the prompt, over the base's T keys and those of the rows."""
    cuts, length = free.shape[2], base.length
    from_base = (free & base.before[:, None, None, None]).flatten(2, 3)  # [B, 1 or H, R L, T]
    columns = base.columns[:, None, None, None].expand(*free.shape[:-1], length)
    own = free.gather(-1, columns)  # [B, 1 or H, R, L, L]
    same = torch.eye(cuts, dtype=torch.bool, device=own.device)[:, None, :, None]  # [R, 1, R, 1]
    from_rows = own[..., None, :] & same  # [B, 1 or H, R, L, R, L]
    return torch.cat([from_base, from_rows.flatten(4, 5).flatten(2, 3)], -1)


def _alibi_of_rows(alibi: Float[Tensor, " ..."], base: Base, cuts: int) -> Float[Tensor, " ..."]:
    """A bias for every key, of the base's keys and the rows'."""
    bias = alibi
    if bias.ndim == 3:
        bias = rearrange(bias, "(batch head) one time -> batch head one time", batch=len(base.first))
    bias = _with_own_keys(bias, base, cuts)
    return bias if alibi.ndim == 4 else bias.flatten(0, 1)


def _without_residual(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, the input with a gradient to come, and nothing where a module takes the residual stream."""
    given = signature_of(type(module)).bind(module, *args, **kwargs)
    first = next(name for name, value in given.arguments.items() if isinstance(value, Tensor))
    given.arguments[first] = given.arguments[first].detach().requires_grad_()
    if given.arguments.get(RESIDUAL) is not None:
        given.arguments[RESIDUAL] = torch.zeros_like(given.arguments[RESIDUAL])
    return given.args[1:], given.kwargs


def _with_own_keys(
    bias: Float[Tensor, " batch #feature query time"], base: Base, cuts: int
) -> Float[Tensor, " batch #feature query key"]:
    """A bias over the base's keys with that over the rows' own keys behind it."""
    columns = base.columns.repeat(1, cuts)[:, None, None]  # [B, 1, 1, R L]
    return torch.cat([bias, bias.gather(-1, columns.expand(*bias.shape[:3], -1))], -1)


def _added(mask: Shaped[Tensor, " ..."], dtype: torch.dtype) -> Float[Tensor, " ..."]:
    """A mask as it is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _output_projection(module: nn.Module) -> nn.Module | None:
    """The submodule that mixes the heads' outputs, by the names it has in transformers."""
    return next((getattr(module, name) for name in OUTPUT_PROJECTIONS if hasattr(module, name)), None)
