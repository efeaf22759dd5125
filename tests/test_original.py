"""Checkpoints of mamba_ssm, written here, give the logits of a plain implementation of mamba_ssm's own definitions."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from mambalens import Fact, Lens, MambalensError
from mambalens.data import checkpoints

TOKENIZER = next(iter(checkpoints().values()))
MAMBA1 = {"d_model": 20, "n_layer": 3, "vocab_size": 1997, "pad_vocab_size_multiple": 8, "rms_norm": True,
          "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": False,
          "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": True, "dt_min": 0.01}}  # fmt: skip
MAMBA2 = {"d_model": 24, "n_layer": 3, "vocab_size": 1997, "pad_vocab_size_multiple": 16, "rms_norm": True,
          "residual_in_fp32": True, "tie_embeddings": True,
          "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 4, "expand": 2, "ngroups": 3, "d_conv": 3,
                      "conv_bias": False, "dt_limit": [0.05, 1.5]}}  # fmt: skip
ONE_GROUP = MAMBA2 | {"ssm_cfg": MAMBA2["ssm_cfg"] | {"ngroups": 1}}


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under mamba_ssm's names."""
    torch.manual_seed(3)
    cfg, width = config["ssm_cfg"], config["d_model"]
    inner, state, kernel = cfg["expand"] * width, cfg["d_state"], cfg["d_conv"]
    rows = -(-config["vocab_size"] // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embedding.weight": (rows, width),
        "backbone.norm_f.weight": (width,),
    }
    for layer in range(config["n_layer"]):
        mixer = f"backbone.layers.{layer}.mixer."
        shapes[f"backbone.layers.{layer}.norm.weight"] = (width,)
        if cfg.get("layer") == "Mamba2":
            heads, groups = inner // cfg["headdim"], cfg["ngroups"]
            channels = inner + 2 * groups * state
            shapes |= {f"{mixer}A_log": (heads,), f"{mixer}D": (heads,), f"{mixer}dt_bias": (heads,),
                       f"{mixer}conv1d.weight": (channels, 1, kernel), f"{mixer}norm.weight": (inner,),
                       f"{mixer}in_proj.weight": (inner + channels + heads, width),
                       f"{mixer}out_proj.weight": (width, inner)}  # fmt: skip
        else:
            rank = cfg["dt_rank"]
            shapes |= {f"{mixer}A_log": (inner, state), f"{mixer}D": (inner,), f"{mixer}conv1d.weight": (inner, 1, kernel),
                       f"{mixer}conv1d.bias": (inner,), f"{mixer}in_proj.weight": (2 * inner, width),
                       f"{mixer}in_proj.bias": (2 * inner,), f"{mixer}x_proj.weight": (rank + 2 * state, inner),
                       f"{mixer}dt_proj.weight": (inner, rank), f"{mixer}dt_proj.bias": (inner,),
                       f"{mixer}out_proj.weight": (width, inner), f"{mixer}out_proj.bias": (width,)}  # fmt: skip
    found = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    for name in found:
        if name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            found[name] = 1 + 0.2 * found[name]
    found["lm_head.weight"] = (
        found["backbone.embedding.weight"] if config["tie_embeddings"] else torch.randn(rows, width)
    )
    return found


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal and depthwise, tap by tap, with SiLU [T, channels]."""
    out = torch.zeros_like(x)
    kernel = weight.shape[-1]
    for t in range(len(x)):
        for k in range(min(kernel, t + 1)):
            out[t] += weight[:, 0, kernel - 1 - k] * x[t - k]
    return F.silu(out if bias is None else out + bias)


def mamba1(u: Tensor, w: dict[str, Tensor], cfg: dict[str, Any]) -> Tensor:
    """Mamba-1's block as the paper's algorithm 2 has it, one step after the other [T, d_model]."""
    x, z = (u @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(2, -1)
    x = conv(x, w["conv1d.weight"], w["conv1d.bias"])
    dt, B, C = (x @ w["x_proj.weight"].T).split([cfg["dt_rank"], cfg["d_state"], cfg["d_state"]], -1)
    dt = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    A, h, y = -w["A_log"].exp(), torch.zeros_like(w["A_log"]), torch.zeros_like(x)
    for t in range(len(u)):
        h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        y[t] = h @ C[t] + w["D"] * x[t]
    return (y * F.silu(z)) @ w["out_proj.weight"].T + w["out_proj.bias"]


def mamba2(u: Tensor, w: dict[str, Tensor], cfg: dict[str, Any]) -> Tensor:
    """Mamba-2's block, one step and one head after the other [T, d_model]."""
    heads, width, state, groups = len(w["A_log"]), cfg["headdim"], cfg["d_state"], cfg["ngroups"]
    inner = heads * width
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * groups * state, heads], -1)
    x, B, C = conv(xBC, w["conv1d.weight"], None).split([inner, groups * state, groups * state], -1)
    dt = F.softplus(dt + w["dt_bias"]).clamp(*cfg["dt_limit"])
    y = torch.zeros_like(x)
    for head in range(heads):
        group, lanes = head * groups // heads, slice(head * width, (head + 1) * width)
        h = torch.zeros(width, state, dtype=u.dtype)
        for t in range(len(u)):
            b, c = (v[t, group * state : (group + 1) * state] for v in (B, C))
            h = torch.exp(-dt[t, head] * w["A_log"][head].exp()) * h + dt[t, head] * torch.outer(x[t, lanes], b)
            y[t, lanes] = h @ c + w["D"][head] * x[t, lanes]
    gated = (y * F.silu(z)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (normed.flatten(-2) * w["norm.weight"]) @ w["out_proj.weight"].T


def plain(config: dict[str, Any], given: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits [T, padded vocabulary] in float64."""
    given = {name: value.double() for name, value in given.items()}
    block = mamba2 if config["ssm_cfg"].get("layer") == "Mamba2" else mamba1
    hidden = given["backbone.embedding.weight"][ids]
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}.mixer."
        mixer = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        normed = rms(hidden, given[f"backbone.layers.{layer}.norm.weight"])
        hidden = hidden + block(normed, mixer, config["ssm_cfg"])
    return rms(hidden, given["backbone.norm_f.weight"]) @ given["lm_head.weight"].T


def written(folder: Path, config: dict[str, Any], given: dict[str, Tensor], file: str = "pytorch_model.bin") -> Path:
    """A checkpoint folder as state-spaces publishes them, with a tokenizer beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    if file.endswith(".bin"):
        torch.save(given, folder / file)
    else:
        save_file({name: value.clone() for name, value in given.items()}, folder / file)
    return folder


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("config", [MAMBA1, MAMBA2, ONE_GROUP], ids=["mamba1", "mamba2", "one group"])
def test_an_original_checkpoint_gives_the_logits_of_a_plain_implementation(
    config: dict, file: str, tmp_path: Path
) -> None:
    given = weights(config)
    folder = str(written(tmp_path / "original", config, given, file))
    if config is MAMBA2 and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(MambalensError, match="3 groups, and transformers"):
            Lens.load(folder)
        return
    lens = Lens.load(folder, dtype=torch.float64)
    assert lens.name == "original"
    ids = torch.randint(3, 1997, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lens.model(ids).logits
    assert logits.shape[-1] == {20: 2000, 24: 2000}[config["d_model"]]
    for row in range(2):
        expected = plain(config, given, ids[row].tolist())
        assert (
            logits[row] - expected
        ).abs().max() < 1e-5 * expected.abs().max()  # transformers' norms round to float32
    fact = Fact("The capital of Peru is", "Peru", " Lima")
    table = lens.sweep([fact], "subject", window=2, progress=False).table
    target = lens.tokenizer(fact.target)["input_ids"][0]
    prompt = torch.tensor([lens.prompt(fact).ids])
    for row in table.itertuples():
        with torch.no_grad(), lens.knockout(fact, layers=range(row.window_start, row.window_start + 2)):
            expected = lens.model(prompt).logits[0, -1].softmax(-1)[target]
        assert row.prob == pytest.approx(float(expected), rel=1e-4)
    assert table.window_start.tolist() == [0, 1]
    lens.hooks.check()


def test_what_mamba_ssm_fills_in_is_filled_in() -> None:
    from mambalens.loading.mamba_ssm import convert_config

    one = convert_config({"d_model": 100, "n_layer": 2, "vocab_size": 50277, "pad_vocab_size_multiple": 8}, "x")
    assert (one.state_size, one.conv_kernel, one.expand, one.time_step_rank) == (16, 4, 2, math.ceil(100 / 16))
    assert (one.vocab_size, one.use_bias, one.use_conv_bias, one.tie_word_embeddings) == (50280, False, True, True)
    two = convert_config({"d_model": 128, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}, "x")
    assert (two.state_size, two.head_dim, two.num_heads, two.n_groups) == (128, 64, 4, 1)
    assert two.time_step_limit == (0.0, float("inf"))


@pytest.mark.parametrize(("change", "message"), [
    ({"ssm_cfg": {"layer": "Mamba3"}}, "layer='Mamba3'"),
    ({"ssm_cfg": {"d_stat": 4}}, "'d_stat', which is not known"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "norm_before_gate": True}}, "norm_before_gate=True"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "headdim=7 does not divide"),
    ({"attn_layer_idx": [3]}, "own attention"), ({"d_intermediate": 8}, "MLPs"), ({"rms_norm": False}, "LayerNorms"),
])  # fmt: skip
def test_what_transformers_cannot_do_is_named(change: dict, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "odd", MAMBA1 | change, weights(MAMBA1))
    with pytest.raises(MambalensError, match=message):
        Lens.load(str(folder))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    given = weights(MAMBA1)
    lacking = {name: value for name, value in given.items() if "layers.1.mixer.D" not in name}
    with pytest.raises(MambalensError, match=r"weights lack backbone\.layers\.1\.mixer\.D"):
        Lens.load(str(written(tmp_path / "lacking", MAMBA1, lacking)))
    with pytest.raises(MambalensError, match=r"also have extra\.weight"):
        Lens.load(str(written(tmp_path / "more", MAMBA1, given | {"extra.weight": torch.ones(1)})))
    other = given | {"backbone.norm_f.weight": torch.ones(3)}
    with pytest.raises(MambalensError, match=r"norm_f\.weight has shape \[3\], its config.json makes it \[20\]"):
        Lens.load(str(written(tmp_path / "shape", MAMBA1, other)))
    folder = written(tmp_path / "broken", MAMBA1, given)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(MambalensError, match="cannot be read"):
        Lens.load(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(MambalensError, match=r"has none of model\.safetensors, pytorch_model\.bin"):
        Lens.load(str(folder))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = written(tmp_path / "bomb", MAMBA1, weights(MAMBA1))
    torch.save({"backbone.embedding.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(MambalensError, match="cannot be read"):
        Lens.load(str(folder))
    assert not (tmp_path / "ran").exists()
