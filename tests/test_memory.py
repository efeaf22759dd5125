"""What a sweep takes for free memory."""

from pathlib import Path

import psutil
import torch

from mambalens.system.memory import SHARE, _left_in_groups, budget


def group(folder: Path, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_limits_of_a_batch_job_count(tmp_path: Path) -> None:
    group(tmp_path, "max", 0, 0)
    group(tmp_path / "job", "4000", 1500, 500)
    group(tmp_path / "job" / "step", "max", 1000, 0)
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert _left_in_groups(tmp_path, own) == [3000]
    own.write_text("1:memory:/older\n")
    assert _left_in_groups(tmp_path, own) == []
    assert _left_in_groups(tmp_path, tmp_path / "absent") == []


def test_sizes_are_read_as_written() -> None:
    cpu = torch.device("cpu")
    assert budget(2**21, cpu) == budget("2MiB", cpu) == budget(str(2**21), cpu) == 2**21
    assert budget("4GB", cpu) == 4 * 10**9
    assert 2**20 <= budget(None, cpu) <= SHARE * psutil.virtual_memory().total
