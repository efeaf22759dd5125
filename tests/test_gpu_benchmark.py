"""The benchmark of GPUs, tried where there is none: it stops and says so, or takes its whole path elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pretend_device
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import gpu


def test_without_a_gpu_it_stops_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"No GPU to measure: .*make gpu GPU='--device cpu --small'"):
        gpu.main(["--out", str(tmp_path / "gpu.md")])
    assert not list(tmp_path.iterdir())


def test_its_whole_path_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "gpu.md"
    assert gpu.main(["--device", "cpu", "--small", "--out", str(out)]) == 0
    report = out.read_text()
    for part in gpu.PARTS:
        assert f"## {part}\n" in report
    assert "| mamba-ssm | not installed |" in report and "kernels were not run: it is not installed" in report
    assert "layers spread over several were not run" in report
    assert report.count("| yes |") >= 6 and "NO" not in report.replace("GPU", "")
    assert "All numbers hold." in report


def test_it_measures_several_devices(tmp_path: Path) -> None:
    """Those that are pretended: what it makes itself has to lie on them."""
    devices = ",".join(f"{pretend_device.NAME}:{number}" for number in (0, 1))
    parts = [argument for part in ("machine", "kernels", "replay", "sizes") for argument in ("--part", part)]
    out = tmp_path / "gpu.md"
    with pretend_device.counted() as traffic:
        assert gpu.main(["--device", devices, "--small", *parts, "--out", str(out)]) == 0
    assert sum(traffic.launches.values()) > 1000
    assert "| pretend:1 |" in out.read_text()


def test_a_number_that_is_off_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "VERBS", {"sweep": gpu.VERBS["sweep"], "evaluate": gpu.VERBS["evaluate"]})
    asked = []

    def difference(found: object, expected: object) -> float:
        asked.append(found)
        return 1.0 if len(asked) == 1 else 0.0

    monkeypatch.setattr(gpu, "difference", difference)
    out = tmp_path / "gpu.md"
    assert gpu.main(["--device", "cpu", "--small", "--part", "parity", "--out", str(out)]) == 1
    assert "Not as they should be:" in out.read_text() and "sweep differs by 1.0e+00" in out.read_text()
