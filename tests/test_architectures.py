"""Every architecture the README names: knockouts equal their explicit form, replay equals the hooks, nothing is left.

The README's table is made here: `MAMBALENS_UPDATE_README=1 python -m pytest tests/test_architectures.py` rewrites it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import explicit
import pytest
import torch
import transformers
from models import ARCHITECTURES, VOCABULARY, architecture, in_double
from replays import Replayed, replayed
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mambalens.hooks import HookManager, Knockout, MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import Mixer

README = Path(__file__).parent.parent / "README.md"
CONSTRAINTS = README.with_name("constraints.txt")
TOLERANCE = 1e-9
CASES, BATCH, TIME = 12, 2, 8
TWO_MODELS = ("falcon-alibi", "gemma2")
"""Whose eager and sdpa code differ by themselves in some release: ALiBi added twice by the one, no soft-capping in the
other."""
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")
"""Without attention."""


def implementations(model_type: str) -> list[str]:
    """Attention code that the installed transformers has for an architecture; a model without attention has one."""
    config = AutoConfig.for_model(model_type.partition("-")[0], **ARCHITECTURES[model_type][1])
    both = model_type not in STATE_SPACE and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
    return ["eager", "sdpa"] if both else ["eager"]


WITH_CODE = [(model_type, attention) for model_type in ARCHITECTURES for attention in implementations(model_type)]
WITH_BOTH = [model_type for model_type, attention in WITH_CODE if attention == "sdpa"]


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    """Transformers computes in float64 here, also where its code rounds to float32."""
    with in_double(*(architecture(model_type) for model_type in ARCHITECTURES)):
        yield


class Case(NamedTuple):
    """A hooked model, what is asked of it, and what it was before."""

    model: Any
    hooks: HookManager
    ids: Tensor
    base: Tensor
    """Its logits before any knockout [batch, T, vocabulary]."""
    knockouts: list[Knockout]
    attributes: list[tuple[str, list[str]]]
    """Names of what every module held before any knockout."""


@cache
@torch.no_grad()
def case(model_type: str, attention: str = "eager") -> Case:
    """Made once for all tests that leave the model as it is."""
    model = architecture(model_type, attention=attention)
    before = attributes(model)
    hooks = HookManager(model, check=attention == "eager" or model_type not in TWO_MODELS)
    ids = torch.randint(3, VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(1))
    return Case(model, hooks, ids, model(ids).logits, knockouts(hooks), before)


@cache
@torch.no_grad()
def hooked(model_type: str, attention: str = "eager") -> list[Tensor]:
    """Logits under every knockout, by one hooked pass each [batch, T, vocabulary]."""
    model, hooks, ids, _, asked, _ = case(model_type, attention)
    found = []
    for knockout in asked:
        with hooks.apply(knockout):
            found.append(model(ids).logits)
    return found


@cache
def replays(model_type: str, attention: str) -> list[tuple[Tensor, Tensor]]:
    """Logits behind the last token by replaying nothing and every knockout, each in a replay of its own."""
    _, hooks, ids, _, asked, _ = case(model_type, attention)
    last = torch.full((BATCH,), TIME - 1)
    found = []
    for knockout in asked:
        one = Replayed(0, knockout.layers, knockout.features, knockout.path, knockout.mixers)
        answers = replayed(hooks, ids, last, knockout.sources[None], knockout.targets, [one])
        found.append((answers[0], answers[1]))
    return found


def attributes(model: Any) -> list[tuple[str, list[str]]]:
    return [(path, sorted(vars(module))) for path, module in model.named_modules()]


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def knockouts(hooks: HookManager) -> list[Knockout]:
    """Random knockouts of every kind of mixer, and of all together."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(CASES):
        sources, targets = torch.rand(2, BATCH, TIME, generator=generator) < (0.3, 0.6, 1.0)[number % 3]
        layers = torch.randperm(hooks.n_layers, generator=generator)[: 1 + number % hooks.n_layers].tolist()
        kind = [None, *hooks.kinds][number % (1 + len(hooks.kinds))]
        path = ("main", "both", "conv", "erase")[number // 3 % 4]
        mixers = hooks.mixers_of(layers, kind)
        if not any(Paths.named(path) & mixer.paths for mixer in mixers):
            path = "both"
        counts = {mixer.n_features for mixer in mixers}
        features: Any = "all"
        if kind is not None and len(counts) == 1 and number % 2:
            features = torch.rand(counts.pop(), generator=generator) < 0.5
        found.append(Knockout(sources, targets, layers, features, path, kind))
    return found


def entries(hooks: HookManager, knockout: Knockout) -> dict[tuple[int, str], torch.Tensor]:
    """What the knockout blocks, by layer and kind [batch, target, source, feature]."""
    found = {}
    for mixer in hooks.mixers:
        if mixer.layer not in knockout.layers or knockout.mixers not in (None, mixer.kind):
            continue
        features = torch.ones(mixer.n_features, dtype=torch.bool)
        if not isinstance(knockout.features, str):
            features = knockout.features
        pairs = knockout.targets[:, :, None] & knockout.sources[:, None, :]
        found[mixer.layer, mixer.kind] = pairs[..., None] & features
    return found


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@torch.no_grad()
def test_a_knockout_equals_its_explicit_form(model_type: str) -> None:
    model, hooks, ids, _, asked, _ = case(model_type)
    for knockout, logits in zip(asked, hooked(model_type), strict=True):
        blocked = entries(hooks, knockout)
        paths, has = Paths.named(knockout.path), {(mixer.layer, mixer.kind): mixer.paths for mixer in hooks.mixers}
        on = [{key: value for key, value in blocked.items() if path in paths & has[key]}
              for path in (Paths.MAIN, Paths.CONV, Paths.ERASE)]  # fmt: skip
        with explicit.blocked_everywhere(model, *on):
            assert largest(logits, model(ids).logits) < TOLERANCE


@pytest.mark.parametrize(("model_type", "attention"), WITH_CODE)
def test_a_knockout_of_every_kind_of_mixer_changes_the_prediction(model_type: str, attention: str) -> None:
    _, hooks, _, base, asked, _ = case(model_type, attention)
    changes: dict[str | None, float] = {}
    for knockout, logits in zip(asked, hooked(model_type, attention), strict=True):
        kind = knockout.mixers
        changes[kind] = max(changes.get(kind, 0.0), largest(logits, base))
    assert set(changes) == {None, *hooks.kinds}
    assert min(changes.values()) > 0.01


@pytest.mark.parametrize(("model_type", "attention"), WITH_CODE)
def test_replay_equals_the_hooks(model_type: str, attention: str) -> None:
    base = case(model_type, attention).base[:, -1]
    for (uncut, cut), logits in zip(replays(model_type, attention), hooked(model_type, attention), strict=True):
        assert largest(uncut, base) < TOLERANCE
        assert largest(cut, logits[:, -1]) < TOLERANCE


@pytest.mark.parametrize("model_type", WITH_BOTH)
def test_eager_and_sdpa_agree(model_type: str) -> None:
    if largest(case(model_type, "sdpa").base, case(model_type).base) >= TOLERANCE and model_type in TWO_MODELS:
        pytest.skip("without a knockout they differ in this release of transformers")
    assert largest(case(model_type, "sdpa").base, case(model_type).base) < TOLERANCE
    for one, other in zip(hooked(model_type, "sdpa"), hooked(model_type), strict=True):
        assert largest(one, other) < TOLERANCE


@pytest.mark.parametrize(("model_type", "attention"), WITH_CODE)
@torch.no_grad()
def test_nothing_is_left_behind(model_type: str, attention: str) -> None:
    model, _, ids, base, _, before = case(model_type, attention)
    hooked(model_type, attention), replays(model_type, attention)
    assert attributes(model) == before
    assert torch.equal(model(ids).logits, base)


NAMES = {
    "mamba1": "Mamba-1", "mamba2": "Mamba-2", "attention": "attention", "deltanet": "Gated DeltaNet",
    "kda": "Kimi Delta Attention", "shortconv": "short convolution", "lightning": "lightning attention",
    "rglru": "RG-LRU",
}  # fmt: skip
"""What the README calls each kind of mixer."""


def row(model_type: str) -> str:
    """A line of the README's table."""
    model, hooks = case(model_type)[:2]

    def mixers_of(layer: int) -> str:
        return " + ".join(sorted({words(mixer) for mixer in hooks.mixers if mixer.layer == layer}))

    def words(mixer: Mixer) -> str:
        return NAMES[mixer.kind]

    kinds = list(dict.fromkeys(mixers_of(layer) or "neither" for layer in range(hooks.n_layers)))
    layers = kinds[0] if len(kinds) == 1 else " or ".join(kinds)
    code = ", ".join(implementations(model_type)) if "attention" in hooks.kinds else ""
    return f"| {ARCHITECTURES[model_type][0]} | `{type(model).__name__}` | {layers} | {code} |"


def test_the_readme_shows_the_architectures() -> None:
    if f"transformers=={transformers.__version__}\n" not in CONSTRAINTS.read_text():
        pytest.skip("which attention code a model has differs from release to release; the table is of constraints.txt")
    table = "\n".join([
        "| architecture | class in transformers | a layer has | attention code |", "|---|---|---|---|",
        *(row(model_type) for model_type in ARCHITECTURES),
    ])  # fmt: skip
    block = f"<!-- architectures -->\n{table}\n<!-- end -->"
    wanted, places = re.subn(
        r"<!-- architectures -->.*?<!-- end -->", lambda _: block, README.read_text(), flags=re.DOTALL
    )
    assert places == 1
    if os.environ.get("MAMBALENS_UPDATE_README"):
        README.write_text(wanted)
    assert README.read_text() == wanted


@pytest.mark.parametrize(
    ("model_type", "options", "named"),
    [
        ("xlstm", {"num_heads": 4, "num_blocks": 2}, "xLSTMForCausalLM has no token mixer"),
        ("rwkv", {"attention_hidden_size": 24}, "RwkvForCausalLM has no token mixer"),
        ("t5", {"d_model": 24, "num_layers": 2, "num_heads": 4}, "encoder-decoder model"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(model_type: str, options: dict, named: str) -> None:
    shared = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 40}  # fmt: skip
    config = AutoConfig.for_model(model_type, **(shared | options))
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    with pytest.raises(MambalensError, match=named):
        HookManager(auto.from_config(config))


def test_a_mixer_that_only_looks_alike_is_refused() -> None:
    """A class that the tests do not know is compared with its own forward pass when the model is hooked."""
    model = architecture("mamba2")
    twin = type("Mamba2Twin", (type(model.backbone.layers[0].mixer),), {})
    for layer in model.backbone.layers:
        layer.mixer.__class__ = twin
    ids = torch.randint(3, VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), HookManager(model).knockout([1, 2], [-1], path="both"):
        renamed = model(ids).logits
    with torch.no_grad(), case("mamba2").hooks.knockout([1, 2], [-1], path="both"):
        assert torch.equal(renamed, case("mamba2").model(ids).logits)

    def doubled(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * twin.forward(self, hidden_states, *args, **kwargs)

    other = type("Mamba2Relative", (twin,), {"forward": doubled})
    model.backbone.layers[1].mixer.__class__ = other
    with pytest.raises(MambalensError, match="layer 1: the mamba2 adapter differs from Mamba2Relative"):
        HookManager(model)


@pytest.mark.parametrize("model_type", ["jamba", "falcon_h1", "zamba2"])
@torch.no_grad()
def test_one_kind_of_mixer_alone_and_the_rest_together_are_all(model_type: str) -> None:
    model = architecture(model_type)
    hooks = HookManager(model)
    ids = torch.randint(3, VOCABULARY, (1, TIME), generator=torch.Generator().manual_seed(2))
    state = next(kind for kind in hooks.kinds if kind != "attention")
    with hooks.knockout([1, 2], [-1]):
        everything = model(ids).logits
    with hooks.knockout([1, 2], [-1], "attention"), hooks.knockout([1, 2], [-1], mixers=state):
        assert (model(ids).logits - everything).abs().max() < TOLERANCE
    with hooks.knockout([1, 2], [-1], "attention"):
        by_layers = model(ids).logits
    with hooks.knockout([1, 2], [-1], range(hooks.n_layers), mixers="attention"):
        assert torch.equal(model(ids).logits, by_layers)
    assert (by_layers - everything).abs().max() > 1e-3
    for wrong in ({"mixers": "rwkv"}, {"layers": "attention", "mixers": state}):
        with pytest.raises(MambalensError, match="mixers="), hooks.knockout([1], [-1], **wrong):
            pass


def test_a_layer_with_two_mixers_asks_which_one() -> None:
    hooks = HookManager(architecture("falcon_h1"))
    ids = torch.randint(3, VOCABULARY, (1, TIME))
    with pytest.raises(MambalensError, match=r"layer 1 has mamba2, attention: name one"):
        hooks.effective_attention(ids, 1)
    assert hooks.effective_attention(ids, 1, mixers="attention").shape == (1, 4, TIME, TIME)
    assert hooks.effective_attention(ids, 1, mixers="mamba2").shape == (1, 6, TIME, TIME)
    with pytest.raises(MambalensError, match="no token mixer"):
        HookManager(architecture("nemotron_h")).effective_attention(ids, 1)


@pytest.mark.parametrize("model_type", ["jamba", "falcon_h1", "nemotron_h", "bloom", "opt"])
@torch.no_grad()
def test_generation_under_a_knockout_is_what_repeated_passes_give(model_type: str) -> None:
    model = architecture(model_type)
    hooks = HookManager(model)
    ids = torch.randint(3, VOCABULARY, (1, TIME), generator=torch.Generator().manual_seed(4))
    with hooks.knockout([1, 2], [4, 7], path="both"):
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    grown = ids
    for _ in range(3):
        with hooks.knockout([1, 2], [4, 7], path="both"):
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == grown.tolist()
