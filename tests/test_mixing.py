"""Exchange, enrichment, half-lives and effective attention, against explicit matrices and the scan itself."""

from __future__ import annotations

import math
import subprocess
import sys

import explicit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, LAYERS, SSM, tiny, token_ids
from torch import Tensor

from mambalens import Lens, load_facts
from mambalens.data import checkpoints
from mambalens.hooks import HookManager, MambalensError, TokenMixing, decay, scan
from mambalens.hooks.mixer import Mixer

MODELS = {name: tiny(name) for name in CONFIGS}
TOLERANCE = 1e-9


def seen(hooks: HookManager, ids: Tensor) -> dict[int, TokenMixing]:
    """What every layer mixes."""
    found: dict[int, TokenMixing] = {}
    hooks.watch(ids, lambda mixer, mixing: found.update({mixer.layer: mixing}))
    return found


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_exchange_and_enrichment_are_the_sums_off_and_on_the_diagonal(name: str, cut: bool) -> None:
    hooks = HookManager(MODELS[name])
    ids = token_ids(2, 9)
    sources, targets = ([1, 4], [4, 7, 8]) if cut else ([], [])
    with torch.no_grad(), hooks.knockout(sources, targets, [0, 2], features=[0, 3]):
        for layer, mixing in seen(hooks, ids).items():
            alpha = hooks.effective_attention(ids, layer)
            diagonal = alpha.diagonal(dim1=-2, dim2=-1)  # [B, F, T]
            own = torch.einsum("bft,btfp->btfp", diagonal, mixing.values) + mixing.skip[:, None] * mixing.values
            others = torch.einsum("bfts,bsfp->btfp", alpha - diagonal.diag_embed(), mixing.values)
            assert (mixing.enrichment - own).abs().max() < TOLERANCE
            assert (mixing.exchange - others).abs().max() < TOLERANCE
            assert (mixing.exchange + mixing.enrichment - mixing.output).abs().max() < TOLERANCE
            assert (alpha[0, 3, 4, 4] == 0) == (cut and layer in (0, 2))
            assert alpha[0, 1, 4, 4] != 0


@pytest.mark.parametrize("name", SSM)
def test_exchange_and_enrichment_equal_the_explicit_scan_with_entries_blocked(name: str) -> None:
    hooks = HookManager(MODELS[name])
    ids = token_ids(2, 8)
    inputs: dict[int, Tensor] = {}
    handles = [
        mixer.module.register_forward_hook(
            lambda m, args, kwargs, out, layer=mixer.layer: inputs.update(
                {layer: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for mixer in hooks.mixers
    ]
    with torch.no_grad():
        for layer, mixing in seen(hooks, ids).items():
            own = torch.eye(8, dtype=torch.bool)[None, :, :, None].expand(2, -1, -1, mixing.n_features)
            none = torch.zeros_like(own)
            module = hooks.mixers[layer].module
            alone = explicit.SCANS[name](module, inputs[layer], None, ~own, none)
            without = explicit.SCANS[name](module, inputs[layer], None, own, none)
            skip = mixing.skip[:, None] * mixing.values
            assert (mixing.enrichment.flatten(2) - alone).abs().max() < TOLERANCE
            assert (mixing.exchange.flatten(2) - (without - skip.flatten(2))).abs().max() < TOLERANCE
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_some_features_and_reductions_are_parts_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = HookManager(MODELS[name])
    ids = token_ids(2, 6)
    whole = hooks.effective_attention(ids, 1)
    monkeypatch.setattr("mambalens.hooks.token_mixing.CHUNK", 2 * 36 * 3)  # three features at a time
    for features, numbers in (("all", range(whole.shape[1])), (2, [2]), ([-1, 1], [1, whole.shape[1] - 1])):
        part = hooks.effective_attention(ids, 1, features=features)
        assert part.shape == (2, len(numbers), 6, 6)
        assert (part - whole[:, list(numbers)]).abs().max() < TOLERANCE
    mean = hooks.effective_attention(ids, 1, reduce="mean")
    assert (mean - whole.mean(1)).abs().max() < TOLERANCE
    some = hooks.effective_attention(ids, 1, features=[0, 1, 3], reduce="mean_abs")
    assert (some - whole[:, [0, 1, 3]].abs().mean(1)).abs().max() < TOLERANCE
    with pytest.raises(MambalensError, match="reduce='max' is not a reduction"):
        hooks.effective_attention(ids, 1, reduce="max")
    with pytest.raises(MambalensError, match="names no feature"):
        hooks.effective_attention(ids, 1, features=[])


def left_of_an_impulse(mixer: Mixer, mixing: TokenMixing, row: int, at: int, tokens: float, length: int) -> Tensor:
    """What the scan has left of a write after so many tokens, as L1 norm over the state, for one feature after another.

    The last of them counts in part: its step size is cut short.
    """
    assert mixing.decay is not None
    dt, A, B = mixing.decay
    features = dt.shape[2]
    left = torch.zeros(features, dtype=torch.float64)
    mean = dt[row, :length].mean(0)
    for f in range(features):
        count = float(tokens[f])
        steps = [dt[row, t, f] if t < length else mean[f] for t in range(at, at + 1 + math.ceil(count))]
        if count % 1:
            steps[-1] = steps[-1] * (count % 1)
        step = torch.stack(steps)[None, :, None]  # [1, n, 1]
        impulse = torch.zeros_like(step)
        impulse[:, 0] = 1.0
        spread = B[row, at].expand(1, step.shape[1], -1)
        for norm_at in (0, step.shape[1] - 1):
            part = slice(0, norm_at + 1)
            if A.shape[1] > 1:
                _, state = scan.selective_scan(
                    impulse[:, part], step[:, part], A[f : f + 1], spread[:, part], spread[:, part]
                )
            else:
                write = spread[:, part, None]
                _, state = scan.ssd_scan(impulse[:, part, :, None], step[:, part], A[f], write, write)
            assert state is not None
            norm = state.double().abs().sum()
            left[f] = norm if norm_at == 0 else norm / left[f]
    return left


@pytest.mark.parametrize("name", SSM)
def test_half_life_is_when_an_impulse_through_the_scan_has_halved(name: str) -> None:
    hooks = HookManager(MODELS[name])
    length = torch.tensor([9, 5])
    with torch.no_grad():
        for layer, mixing in seen(hooks, token_ids(2, 9)).items():
            lives = mixing.half_life(length)
            assert bool(lives[1, 5:].isnan().all()) and not bool(lives[1, :5].isnan().any())
            for row, at in ((0, 0), (0, 4), (0, 8), (1, 2), (1, 4)):
                left = left_of_an_impulse(hooks.mixers[layer], mixing, row, at, lives[row, at], int(length[row]))
                assert (left - 0.5).abs().max() < TOLERANCE


@pytest.mark.parametrize("model", [name for name in checkpoints() if "mamba" in name])
def test_half_life_of_a_trained_model(model: str) -> None:
    lens = Lens.load(model)
    prompt = lens.prompt(load_facts("atlas").where(wording="far")[0])
    length = len(prompt.ids)
    with torch.no_grad():
        for layer, mixing in seen(lens.hooks, torch.tensor([prompt.ids])).items():
            if layer not in (0, 7):
                continue
            lives = mixing.half_life(torch.tensor([length]))
            short = torch.where(lives < 200, lives, 1.0)  # a plain loop over every token of a long one takes minutes
            left = left_of_an_impulse(lens.hooks.mixers[layer], mixing, 0, 3, short[0, 3], length)
            assert (left[lives[0, 3] < 200] - 0.5).abs().max() < 1e-4
            assert int((lives[0, 3] < 200).sum()) > 0.8 * mixing.n_features or mixing.n_features < 20


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 4), st.floats(0.0, 6.0), st.integers(0, 10_000))
def test_half_time_solves_its_equation(state: int, features: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = -torch.exp(spread * torch.randn(features, state, dtype=torch.float64, generator=generator))
    B = torch.randn(1, 3, state, dtype=torch.float64, generator=generator)
    tau = decay.half_time(A, B)[0]  # [3, F]
    weight = B[0].abs() / B[0].abs().sum(-1, keepdim=True)
    left = torch.stack([(weight * torch.exp(A[f] * tau[:, f, None])).sum(-1) for f in range(features)], -1)
    assert (left - 0.5).abs().max() < TOLERANCE
    even = decay.half_time(A, torch.zeros_like(B))[0]
    mean = torch.stack([torch.exp(A[f] * even[:, f, None]).mean(-1) for f in range(features)], -1)
    assert (mean - 0.5).abs().max() < TOLERANCE


def test_attention_has_no_half_life() -> None:
    hooks = HookManager(MODELS["llama"])
    mixing = hooks.token_mixing(token_ids(1, 5), 0)
    assert bool(mixing.half_life(torch.tensor([5])).isnan().all())


def test_watching_shows_every_layer_once_and_changes_nothing() -> None:
    for name, model in MODELS.items():
        hooks, ids = HookManager(model), token_ids(2, 7)
        with torch.no_grad():
            before = model(ids).logits
            shown: list[int] = []
            hooks.watch(ids, lambda mixer, mixing, shown=shown: shown.append(mixer.layer))
            assert shown == list(range(LAYERS)), name
            shown.clear()
            hooks.watch(ids, lambda mixer, mixing, shown=shown: shown.append(mixer.layer), layers=[2, 1])
            assert shown == [1, 2]
            assert torch.equal(model(ids).logits, before)


PEAK = """
import torch
from transformers import AutoModelForCausalLM, MambaConfig
from mambalens.hooks import HookManager

def of(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=100, hidden_size=768, num_hidden_layers=1, state_size=16))
hooks, ids = HookManager(model.eval()), torch.arange(256)[None] % 100
before = of("VmRSS")
assert hooks.effective_attention(ids, 0).shape == (1, 1536, 256, 256)
print(of("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_effective_attention_of_a_wide_layer_needs_less_than_a_gigabyte() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1e9
