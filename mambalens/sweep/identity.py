"""What a sweep's run is: what it is called and labelled with, and everything that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from mambalens.facts.fact import Fact
from mambalens.facts.prompts import Prompt
from mambalens.facts.sequence import Facts
from mambalens.model import LoadedModel
from mambalens.runs.config import RunConfig
from mambalens.sweep.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

DEFINING = (
    "model",
    "n_layers",
    "facts",
    "n_facts",
    "sources",
    "target",
    "window",
    "features",
    "paths",
    "mixers",
    "dtype",
)
"""Fields of a run's configuration that define it."""


def configuration(model: LoadedModel, facts: Facts, plan: Plan, windows: Sequence[Sequence[int]]) -> RunConfig:
    """What is run.

    Args:
        model: the model.
        facts: all facts of the sweep.
        plan: what is knocked out.
        windows: the layers of every window.
    """
    return RunConfig(
        model=model.name,
        n_layers=model.n_layers,
        kinds=tuple(model.hooks.kinds),
        facts=facts.name,
        n_facts=len(facts),
        answered=facts.answered,
        sources=tuple(plan.sources),
        target=plan.target,
        window=plan.window if isinstance(plan.window, int) else tuple(map(tuple, windows)),
        features=plan.names,
        paths=tuple(plan.paths),
        mixers=plan.mixers,
        ablation=plan.ablation_name,
        dtype=str(model.model.dtype).removeprefix("torch."),
        measure=plan.measure_name,
    )


def definition(
    model: LoadedModel, facts: Facts, plan: Plan, windows: Sequence[Sequence[int]], config: RunConfig
) -> dict[str, Any]:
    """Everything that the numbers depend on, as JSON: runs with the same definition are the same run.

    Args:
        model: the model.
        facts: all facts of the sweep.
        plan: what is knocked out.
        windows: the layers of every window.
        config: the run's configuration.
    """
    masks = [
        None if isinstance(features, str) else [
            [mixer.layer, mixer.kind, None if mask is None else mask.nonzero().flatten().tolist()]
            for layers in windows
            for mixer, mask in model.hooks.feature_masks(features, layers, plan.mixers).items()
        ]
        for features in plan.features
    ]  # fmt: skip
    about = config.to_json()
    of_plan = {"windows": _digest(windows), "feature masks": _digest(masks)}
    # Folders of sweeps without one, and of older releases, have none of this.
    measured = {"measure": config.measure} if config.measure else {}
    return {key: about[key] for key in DEFINING} | of_plan | measured | model_and_facts(model, facts)


def model_and_facts(model: LoadedModel, facts: Iterable[Fact]) -> dict[str, Any]:
    """What tells a model's weights, what is done to it meanwhile, and some facts from others, as JSON."""
    weights = [
        (name, list(value.shape), str(value.dtype), _first_numbers(value))
        for name, value in model.model.state_dict().items()
    ]
    asked = [(fact.id, fact.prompt, fact.subject, fact.target) for fact in facts]
    inside = model.hooks.inside
    return {
        "model config": _digest(model.model.config.to_json_string()),
        "weights": _digest(sorted(weights)),
        "revision": getattr(model.model.config, "_commit_hash", None),
        "facts digest": _digest(asked),
    } | ({"running blocks": _digest(inside)} if inside else {})


def prompt_table(model: LoadedModel, prompts: Iterable[Prompt]) -> pd.DataFrame:
    """The prompts as the model reads them, with the columns of `folder.PROMPT`."""
    import pandas as pd

    from mambalens.runs.folder import PROMPT

    rows = [(model.name, prompt.fact.id, prompt.tokens, prompt.positions("subject")) for prompt in prompts]
    return pd.DataFrame(rows, columns=list(PROMPT))


def _first_numbers(value: Shaped[Tensor, " ..."]) -> list[float]:
    """A few of a weight's numbers: another checkpoint of the same shape has others. None where they lie on disk."""
    return [] if value.device.type == "meta" else value.flatten()[:8].double().tolist()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
