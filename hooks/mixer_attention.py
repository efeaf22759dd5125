"""Softmax attention of any transformers model whose attention takes an attention mask; Geva et al. 2023, section 4.

The module's own code runs, eager or sdpa, with sinks and soft-capping. A hook before it adds the knockout to the
causal, sliding-window and padding mask that the model made. A target that has no source left gets zeros: softmax has
no answer there, so its mask is left alone and its heads' outputs are set to zero before the output projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Cut
from mambalens.hooks.mixer import Captured, CutsOf, Mixer, Pass, TokenMixing
from mambalens.hooks.rows import Base, Rows
from mambalens.hooks.ssm import blocked_entries

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")


class AttentionMixer(Mixer):
    """A feature is a query head."""

    kind = "attention"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if not getattr(module, "is_causal", False) or _output_projection(module) is None:
            return False
        return "attention_mask" in inspect.signature(type(module).forward).parameters

    @property
    def n_features(self) -> int:
        return int(getattr(self.module, "num_heads", None) or self.module.config.num_attention_heads)

    def attach(self, cuts: CutsOf, current: Callable[[], Pass]) -> Callable[[], None]:
        signature = inspect.signature(type(self.module).forward)
        projection = _output_projection(self.module)
        assert projection is not None
        silent: list[Tensor | None] = [None]  # targets without any source left, of the running call

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            silent[0] = None
            running = current()
            active = [cut for cut in cuts(self) if cut.main and cut.targets[:, running.past :].any()]
            if not active or not any(cut.sources.any() for cut in active):
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
            heads = args[0].unflatten(-1, (self.n_features, -1))  # [B, T, H, width]
            gone = silent[0].transpose(1, 2)[..., None].to(heads.device)
            return (heads.masked_fill(gone, 0).flatten(-2), *args[1:])

        handles = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            projection.register_forward_pre_hook(before_projection),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def cut_mask(self, mask: Any, cuts: Sequence[Cut], hidden: Tensor, past: int) -> tuple[Tensor, Tensor | None]:
        """The model's mask with the cuts added.

        Args:
            mask: what the module was to get: None, or boolean or additive [batch, heads or 1, T, S].
            cuts: over all columns so far.
            hidden: the module's input, for its shape, dtype and device.
            past: columns held by a cache.

        Returns:
            The mask, and the targets that it would leave without any source [batch, heads, T], which it leaves alone.
        """
        time, seen = hidden.shape[1], past + hidden.shape[1]
        if mask is None:
            query = torch.arange(past, seen, device=hidden.device)
            mask = query[:, None] >= torch.arange(seen, device=hidden.device)  # [T, S]
            mask = mask[None, None]
            if self.module.config._attn_implementation != "sdpa":
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise MambalensError(
                f"layer {self.layer}: {type(self.module).__name__} was given a mask of type {type(mask).__name__}"
                f"{list(mask.shape) if isinstance(mask, Tensor) else ''}, which cannot block single positions: load "
                "the model with attn_implementation='sdpa' or 'eager'."
            )
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

    @contextmanager
    def probing(self) -> Iterator[_Probe]:
        """The model computes its attention weights openly, and values and output are kept, while the block runs."""
        probe = _Probe()
        projection = _output_projection(self.module)
        assert projection is not None

        def watch_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The values pass through the cache on their way from projection to attention, whatever the architecture.
            cache: Any = next(v for v in (*kwargs.values(), *args) if isinstance(v, Cache))
            update = cache.update

            def recording(*update_args: Any, **update_kwargs: Any) -> Any:
                keys, values = update(*update_args, **update_kwargs)
                probe.values = values
                return keys, values

            cache.update = recording
            probe.restore = lambda: setattr(cache, "update", update)

        def watch_output(module: nn.Module, args: tuple[Any, ...]) -> None:
            probe.output = args[0]
            probe.restore()

        hooks = [
            self.module.register_forward_pre_hook(watch_cache, with_kwargs=True),
            projection.register_forward_pre_hook(watch_output),
        ]
        config = self.module.config
        before = config._attn_implementation
        config._attn_implementation = "eager"
        try:
            yield probe
        finally:
            config._attn_implementation = before
            for hook in hooks:
                hook.remove()

    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        """Weights come from the module's own eager code."""
        alpha = call.output[1]  # [B, H, T, T]
        main = [cut.to(alpha.device) for cut in cuts if cut.main]
        if main:
            # Exact zeros, also in the rows that have no source left, which the module computed uncut.
            alpha = alpha.masked_fill(blocked_entries(main), 0.0)
        values = call.probe.values  # [B, key/value heads, T, width]
        values = values.repeat_interleave(self.n_features // values.shape[1], 1).transpose(1, 2)
        output = call.probe.output.unflatten(-1, (self.n_features, -1))
        return TokenMixing(alpha, values, output.new_zeros(self.n_features), output)

    def remember(self, call: Captured, base: Base) -> Memory:
        given = call.arguments(self.module)
        cache = next(v for v in given.values() if isinstance(v, Cache))
        kept = cache.layers[self.module.layer_idx]
        mask = given.get("attention_mask")
        allowed = base.before_last[:, None]  # [B, 1 or H, T]
        if mask is not None:  # a sliding window, or whatever else the model masks
            mask = mask.expand(len(base.last), *mask.shape[1:])[..., : kept.keys.shape[2]]
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            allowed = allowed & seen[torch.arange(len(base.last), device=seen.device), :, base.last]
        return Memory(kept.keys, kept.values, allowed)

    @contextmanager
    def resuming(self, memory: Memory, base: Base, rows: Rows, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        sources = base.sources[torch.where(rows.main, rows.source, 0), rows.prompt]  # [R, T]
        own = sources.gather(1, base.last[rows.prompt][:, None])
        blocked = torch.cat([sources, own], 1)[:, None]  # [R, 1, T + 1]
        if rows.features is not None:
            blocked = blocked & rows.features[..., None]
        allowed = memory.allowed[rows.prompt]
        allowed = torch.cat([allowed, torch.ones_like(allowed[..., :1])], -1)
        silent = ~(allowed & ~blocked).any(-1)  # [R, 1 or H]
        mask = (allowed & ~(blocked & ~silent[..., None]))[:, :, None]  # [R, 1 or H, 1, T + 1]
        if self.module.config._attn_implementation != "sdpa":
            low = torch.finfo(memory.keys.dtype).min
            mask = torch.zeros_like(mask, dtype=memory.keys.dtype).masked_fill(~mask, low)

        def silence(module: nn.Module, args: tuple[Any, ...]) -> Any:
            heads = args[0].unflatten(-1, (self.n_features, -1))  # [R, 1, H, width]
            return (heads.masked_fill(silent[:, None, :, None], 0).flatten(-2), *args[1:])

        last, time = base.last[rows.prompt], base.sources.shape[2]

        def at_rows(value: Any) -> Any:
            """Position ids and rotary angles [1 or B, T, ...] of the rows' own positions."""
            if isinstance(value, tuple):
                return tuple(at_rows(v) for v in value)
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == time:
                return value.expand(len(base.last), *value.shape[1:])[rows.prompt, last][:, None]
            return value

        replaced = {
            name: _RowCache(memory, rows.prompt) if isinstance(value, Cache) else at_rows(value)
            for name, value in kwargs.items()
        }
        projection = _output_projection(self.module)
        assert projection is not None
        handle = projection.register_forward_pre_hook(silence)
        try:
            yield replaced | {"attention_mask": mask}
        finally:
            handle.remove()

    def parity(self, call: Captured) -> float:
        mixing = self.token_mixing(call, ())
        ours = torch.einsum("bfts,bsfp->btfp", mixing.alpha, mixing.values)
        return float((ours - mixing.output).abs().max() / mixing.output.abs().max().clamp_min(1e-30))


class Memory(NamedTuple):
    """What rows resume from in an attention layer."""

    keys: Tensor
    """[batch, key/value heads, T, width]."""
    values: Tensor
    """As the keys."""
    allowed: Tensor
    """Positions left of the last that the model lets it read [batch, 1 or heads, T]."""

    @property
    def row_bytes(self) -> int:
        """What a row takes of memory: its prompt's keys and values, copied once more for grouped queries."""
        return 4 * self.keys[0].numel() * self.keys.element_size()


class _RowCache:
    """Stands in for a cache: a row sees its prompt's keys and values, then its own."""

    def __init__(self, memory: Memory, prompt: Tensor) -> None:
        self.memory, self.prompt = memory, prompt

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, T + 1, width]."""
        return (
            torch.cat([self.memory.keys[self.prompt], keys], 2),
            torch.cat([self.memory.values[self.prompt], values], 2),
        )


class _Probe:
    """What passes through one attention call."""

    values: Tensor
    output: Tensor
    restore: Callable[[], None]


def _output_projection(module: nn.Module) -> nn.Module | None:
    """The submodule that mixes the heads' outputs, by the names it has in transformers."""
    return next((getattr(module, name) for name in OUTPUT_PROJECTIONS if hasattr(module, name)), None)
