"""A run's folder: nothing lost, nothing done twice, whatever happens to processes, parts and disks."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from started import python

from mambalens import Lens, MambalensError, SweepResult, load_facts
from mambalens.runs.folder import PARTS, RunFolder
from mambalens.sweep.prediction import Prediction

FACTS = load_facts("atlas").where(wording="near").sample(9)
BLOCKS = 3


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.load("atlas-gpt-neox")


@pytest.fixture(scope="module")
def expected(lens: Lens) -> SweepResult:
    return swept(lens, None)


def swept(lens: Lens, out: Path | None, **changed: Any) -> SweepResult:
    options: dict[str, Any] = {"sources": ("subject", "context"), "window": 6, "progress": False, "block_size": BLOCKS}
    return lens.sweep(changed.pop("facts", FACTS), out=out, **(options | changed))


def in_forks(task: str, folder: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "runs_in_forks.py"
    done = python(str(script), task, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_random_moments_a_run_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    found = in_forks("killed", tmp_path)
    assert found["kills"] >= 24 and found["in the middle"] >= 10
    assert found["recomputed"] == 0


def test_one_two_and_three_processes_give_the_same_table_and_compute_every_block_once(tmp_path: Path) -> None:
    found = in_forks("shared", tmp_path)
    for processes in (1, 2, 3):
        same, computed, at_work = found[f"{processes} processes"]
        assert same and computed == 24
        assert at_work == processes
    same, computed = found["one killed"]
    assert same and computed == 24  # the block that the dead process was at is computed by the other


def test_a_full_disk_is_said_and_spoils_nothing(tmp_path: Path) -> None:
    found = in_forks("full", tmp_path)
    assert "could not be written" in found["said"] and "What was finished is kept" in found["said"]
    assert not [name for name in found["left"] if name.startswith(".")]
    assert found["same"]


def test_finished_blocks_are_not_computed_again(lens: Lens, expected: SweepResult, tmp_path: Path) -> None:
    first = swept(lens, tmp_path)
    pd.testing.assert_frame_equal(first.table, expected.table, check_exact=True)
    pd.testing.assert_frame_equal(first.skipped, expected.skipped)
    pd.testing.assert_frame_equal(first.facts, expected.facts)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / PARTS).iterdir()}
    assert len(parts) == 3
    (tmp_path / PARTS / "00001.parquet").unlink()
    half = SweepResult.load(tmp_path)
    assert half.unfinished == 1 and "1 block of facts to come" in repr(half)
    assert half.table.fact_id.nunique() == 6
    again = swept(lens, tmp_path)
    pd.testing.assert_frame_equal(again.table, expected.table, check_exact=True)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / PARTS).iterdir()}
    assert [path.name for path in parts if parts[path] != after[path]] == ["00001.parquet"]
    assert again.unfinished == 0
    everything = pd.read_parquet(tmp_path / PARTS)  # also without this package
    assert everything.fact_id.tolist() == expected.table.fact_id.tolist()
    assert everything.prob.tolist() == expected.table.prob.tolist()


def _flip_a_bit_that_matters(content: bytearray, part: Path) -> None:
    """From a third of the file on: some bytes of a parquet file say nothing of its rows."""
    rows = pd.read_parquet(part)
    for at in range(len(content) // 3, len(content)):
        content[at] ^= 16
        try:
            if not pd.read_parquet(io.BytesIO(content)).equals(rows):
                return
        except Exception:  # a damaged file may raise anything
            return
        content[at] ^= 16
    raise AssertionError("no bit of the part matters")


@pytest.mark.parametrize("damage", ["cut off", "bit flipped", "empty", "foreign", "no parquet"])
def test_a_damaged_part_is_set_aside_and_computed_again(
    damage: str, lens: Lens, expected: SweepResult, tmp_path: Path
) -> None:
    swept(lens, tmp_path / "run")
    part = tmp_path / "run" / PARTS / "00001.parquet"
    content = bytearray(part.read_bytes())
    if damage == "foreign":
        swept(lens, tmp_path / "other", facts=FACTS[1:])
        content = bytearray((tmp_path / "other" / PARTS / "00001.parquet").read_bytes())
    content = {
        "cut off": content[: len(content) // 2], "empty": bytearray(), "no parquet": bytearray(b"hello"), "foreign": content,
        "bit flipped": content,
    }[damage]  # fmt: skip
    if damage == "bit flipped":
        _flip_a_bit_that_matters(content, part)
    part.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"00001\.parquet' (cannot be read|is damaged|belongs to another run).* left out"
    ):
        assert SweepResult.load(tmp_path / "run").unfinished == 1
    with pytest.warns(UserWarning, match=r"it is set aside as 00001\.broken-\w+ and computed again"):
        again = swept(lens, tmp_path / "run")
    pd.testing.assert_frame_equal(again.table, expected.table, check_exact=True)
    (aside,) = (tmp_path / "run" / PARTS).glob("*.broken-*")
    assert aside.read_bytes() == content


def test_every_flipped_bit_of_a_part_is_noticed_or_harmless(lens: Lens, expected: SweepResult, tmp_path: Path) -> None:
    swept(lens, tmp_path)
    part = tmp_path / PARTS / "00000.parquet"
    whole = part.read_bytes()
    rows = expected.table[expected.table.fact_id.isin([fact.id for fact in FACTS[:BLOCKS]])].reset_index(drop=True)
    generator = torch.Generator().manual_seed(0)
    run = RunFolder(
        tmp_path, json.loads((tmp_path / "sweep.json").read_text())["definition"], {}, pd.DataFrame(), pd.DataFrame()
    )
    from mambalens.runs.folder import BrokenPart, read_part

    noticed = 0
    for place in torch.randint(0, len(whole), (150,), generator=generator).tolist():
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        part.write_bytes(content)
        try:
            table = read_part(part, run.digest).table
        except BrokenPart:
            noticed += 1
            continue
        pd.testing.assert_frame_equal(table, rows, check_exact=True)
    assert noticed > 75  # most of a part is numbers, of which every bit counts


def test_another_sweep_in_the_same_folder_is_refused_with_the_difference(lens: Lens, tmp_path: Path) -> None:
    swept(lens, tmp_path)
    with pytest.raises(
        MambalensError, match=r"holds another run \(window: 6 there, 5 now; windows: .*choose another folder"
    ):
        swept(lens, tmp_path, window=5)
    with pytest.raises(MambalensError, match="facts digest: "):
        swept(lens, tmp_path, facts=FACTS[:8])
    with pytest.raises(MambalensError, match="feature masks: "):
        swept(lens, tmp_path, features=([0, 1],))
    with pytest.raises(MambalensError, match=r"block_size: 3 there, 4 now"):
        swept(lens, tmp_path, block_size=4)
    other = Lens.load("atlas-gpt-neox", dtype=torch.bfloat16)
    with pytest.raises(MambalensError, match=r'dtype: "float32" there, "bfloat16" now'):
        swept(other, tmp_path)
    result = SweepResult.load(tmp_path)
    with pytest.raises(MambalensError, match="holds a run: a result is not written over it"):
        result.save(tmp_path)
    result.save(tmp_path / "saved")
    with pytest.raises(MambalensError, match="holds a saved result, which is no run"):
        swept(lens, tmp_path / "saved")


def test_another_checkpoint_of_the_same_shape_and_name_is_another_run(tmp_path: Path) -> None:
    lens = Lens.load("atlas-gpt-neox")
    swept(lens, tmp_path)
    with torch.no_grad():
        lens.model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(MambalensError, match="weights: "):
        swept(lens, tmp_path)


def test_facts_whose_columns_mix_kinds_of_values_are_kept(lens: Lens, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([
        {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target, "note": note, "n": number}
        for fact, note, number in zip(FACTS, [1, "two", [3], None, {"a": 1}, 2.5, True, "x", "y"], range(9), strict=True)
    ]))  # fmt: skip
    result = swept(lens, tmp_path / "run", facts=load_facts(tmp_path / "facts.json"))
    assert result.facts.note.tolist()[:3] == ["1", "two", "[3]"] and result.facts.n.tolist() == list(range(9))
    kept = SweepResult.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(kept.table, result.table, check_exact=True)
    pd.testing.assert_frame_equal(kept.facts, result.facts, check_exact=True)


def test_a_lock_that_nobody_holds_stops_nobody(lens: Lens, expected: SweepResult, tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    for name in ("run", "00000", "00002"):
        (tmp_path / "locks" / f"{name}.lock").write_text("12345")
    pd.testing.assert_frame_equal(swept(lens, tmp_path).table, expected.table, check_exact=True)


def test_folders_that_cannot_be_used_are_named(lens: Lens, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MambalensError, match="could not be written to .*file/run"):
        swept(lens, tmp_path / "file" / "run")
    with pytest.raises(MambalensError, match="does not exist"):
        SweepResult.load(tmp_path / "nothing")
    with pytest.raises(MambalensError, match="holds no sweep"):
        SweepResult.load(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(MambalensError, match="cannot be read"):
        SweepResult.load(tmp_path)
    (tmp_path / "sweep.json").write_text('{"configs": [], "blocks": 2}')
    with pytest.raises(MambalensError, match="no finished block yet"):
        SweepResult.load(tmp_path)


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    found = in_forks("read_only", tmp_path)
    assert "could not be written" in found["said"] and "Permission denied" in found["said"]


def test_accelerate_starts_processes_that_share_the_work(lens: Lens, tmp_path: Path) -> None:
    options = [
        "sweep",
        "atlas-gpt-neox",
        "--where",
        "wording=near",
        "--limit",
        "12",
        "--source",
        "subject",
        "--window",
        "6",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]  # fmt: skip
    for out, command in (("two", launch), ("one", [sys.executable, "-m"])):
        done = subprocess.run(
            [*command, "mambalens", *options, "--out", str(tmp_path / out)], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("The window that costs most") == 1  # one process speaks
    two, one = (SweepResult.load(tmp_path / out).table for out in ("two", "one"))
    pd.testing.assert_frame_equal(two, one, check_exact=True)


@contextmanager
def full_memory(lens: Lens, is_too_much: Callable[[int], bool], error: Exception) -> Iterator[list[int]]:
    """While the block runs, the model's first MLP refuses some batches; gives the sizes of those that it refused."""
    refused: list[int] = []

    def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        size = len(arguments[0])
        if is_too_much(size):
            refused.append(size)
            raise error

    handle = lens.hooks.layers[0].mlp.register_forward_pre_hook(hook)
    try:
        yield refused
    finally:
        handle.remove()


def test_a_batch_that_does_not_fit_is_halved_and_said(lens: Lens, expected: SweepResult) -> None:
    with (
        full_memory(lens, lambda size: size > 1, torch.OutOfMemoryError("too much")) as refused,
        pytest.warns(UserWarning, match="A batch of 3 prompts does not fit the memory") as seen,
    ):
        table = swept(lens, None).table
    assert refused == [3, 2]  # and never again, in the blocks that follow
    assert len(seen) == 1
    assert (table.prob - expected.table.prob).abs().max() < 1e-5
    assert table.fact_id.tolist() == expected.table.fact_id.tolist()


def test_memory_that_was_full_once_is_no_reason_to_give_up_replay(lens: Lens, expected: SweepResult) -> None:
    error = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
    calls = itertools.count()
    with (
        full_memory(lens, lambda _: next(calls) == 0, error) as refused,
        pytest.warns(UserWarning, match="going on with smaller ones") as seen,
    ):
        table = swept(lens, None, block_size=9).table
    assert len(refused) == len(seen) == 1
    assert (table.prob - expected.table.prob).abs().max() < 1e-5
    assert table.fact_id.tolist() == expected.table.fact_id.tolist()


def test_a_single_prompt_that_does_not_fit_ends_the_sweep(lens: Lens, expected: SweepResult) -> None:
    error = torch.OutOfMemoryError("far too much")
    with (
        full_memory(lens, lambda _: True, error) as refused,
        pytest.raises(torch.OutOfMemoryError, match="far too much"),
        pytest.warns(UserWarning, match="A batch of 3 prompts"),
    ):
        swept(lens, None)
    assert refused == [3, 2, 1]
    pd.testing.assert_frame_equal(swept(lens, None).table, expected.table, check_exact=True)  # the model is as before


def test_ctrl_c_waits_for_the_block_and_twice_it_does_not(
    lens: Lens, expected: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from mambalens.sweep.block import Work

    whole, presses, before = Work.block, [0, 1], signal.getsignal(signal.SIGINT)

    def pressed(self: Work, facts: Any) -> Any:
        for _ in range(presses.pop(0) if presses else 0):
            signal.raise_signal(signal.SIGINT)
        return whole(self, facts)

    monkeypatch.setattr(Work, "block", pressed)
    with pytest.raises(KeyboardInterrupt):
        swept(lens, tmp_path)
    assert "Finishing the current block" in capsys.readouterr().err
    assert SweepResult.load(tmp_path).unfinished == 1  # the second block was kept
    presses.append(2)
    with pytest.raises(KeyboardInterrupt):
        swept(lens, tmp_path)
    assert SweepResult.load(tmp_path).unfinished == 1
    assert signal.getsignal(signal.SIGINT) is before
    pd.testing.assert_frame_equal(swept(lens, tmp_path).table, expected.table, check_exact=True)


def test_nan_is_recorded_as_nan(lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Prediction.of

    def broken(logits: torch.Tensor, targets: torch.Tensor) -> Prediction:
        logits = logits.clone()
        logits[0] = torch.nan
        return of(logits, targets)

    monkeypatch.setattr(Prediction, "of", broken)
    table = swept(lens, None, block_size=9).table
    bad = table[table.prob.isna()]
    assert bad.fact_id.nunique() == 1
    assert bad.change_pct.isna().all() and bad["rank"].eq(0).all() and bad.base_rank.eq(0).all() and not bad.hit.any()
    assert table[table.prob.notna()]["rank"].ge(1).all()
