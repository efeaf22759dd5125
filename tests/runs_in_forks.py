"""Runs that are killed, that share a folder, or that meet a full disk, each in a child process of this one.

Started by test_folder.py with a task and a folder. A fresh process would take seconds to import what a fork has already.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)  # before any work: threads do not survive a fork

from mambalens import Lens, MambalensError, SweepResult, load_facts  # noqa: E402

LENS = Lens.load("atlas-gpt-neox")
FACTS = load_facts("atlas").where(wording="near").sample(48)
OPTIONS = {"sources": ("subject", "context"), "window": 6, "progress": False, "block_size": 2}


def sweep(out: Path | None) -> SweepResult:
    return LENS.sweep(FACTS, out=out, **OPTIONS)


def child(work: Callable[[], object], **environment: str) -> int:
    """Run work in a child process; its exit status is 0 unless it fails."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def status(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.parquet")}


def killed(folder: Path) -> dict[str, object]:
    """Kill runs at random moments until 24 were killed; every run is then finished and compared."""
    rng, kills, runs, recomputed, early = random.Random(0), 0, 0, 0, 0
    expected = sweep(None).table
    while kills < 24:
        runs += 1
        run = folder / str(runs)
        patience = 0.7
        while True:
            before = parts(run) if run.exists() else {}
            pid = child(lambda run=run: sweep(run))
            time.sleep(rng.uniform(0.05, patience))
            os.kill(pid, signal.SIGKILL)
            ended = status(pid)
            after = parts(run) if run.exists() else {}
            recomputed += sum(after.get(name) != when for name, when in before.items())
            if ended == 0:
                break
            patience *= 1.0 if len(after) > len(before) else 1.3  # a slow machine gets somewhere too
            kills += 1
            early += len(after) < 24
            if run.exists() and after:
                SweepResult.load(run)  # can be read while it is not whole
        assert SweepResult.load(run).table.equals(expected)
    return {"kills": kills, "runs": runs, "recomputed": recomputed, "in the middle": early}


def shared(folder: Path) -> dict[str, object]:
    """The same run by one, two and three processes, and by two of which one is killed."""
    expected = sweep(None).table
    found = {}
    for processes in (1, 2, 3):
        run = folder / str(processes)
        log = folder / f"{processes}.log"
        pids = [
            child(lambda run=run, log=log: counted(run, log), RANK=str(rank), WORLD_SIZE=str(processes))
            for rank in range(processes)
        ]
        assert [status(pid) for pid in pids] == [0] * processes
        lines = log.read_text().splitlines()
        found[f"{processes} processes"] = [
            SweepResult.load(run).table.equals(expected),
            len(lines),
            len({*map(pid_of, lines)}),
        ]
    run, log = folder / "one killed", folder / "killed.log"
    pids = [child(lambda: counted(run, log), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGKILL)
    assert status(pids[1]) == -signal.SIGKILL and status(pids[0]) == 0
    found["one killed"] = [SweepResult.load(run).table.equals(expected), len(log.read_text().splitlines())]
    return found


def pid_of(line: str) -> str:
    return line.split()[0]


def wait_for_all(run: Path) -> None:
    """Let no process begin before all of them have started."""
    run.mkdir(exist_ok=True)
    (run / f"started.{os.environ['RANK']}").touch()
    while len(list(run.glob("started.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.005)


def counted(run: Path, log: Path) -> None:
    """A run that notes every block it computes."""
    from mambalens.runs.folder import RunFolder

    write = RunFolder.write
    wait_for_all(run)

    def noted(self: RunFolder, block: int, *results: object) -> None:
        write(self, block, *results)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {block}\n")

    RunFolder.write = noted
    sweep(run)


def full(folder: Path) -> dict[str, object]:
    """A disk that is full after some parts."""
    run, said = folder / "run", folder / "said"
    smallest = 4000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest, smallest))
        try:
            sweep(run)
        except MambalensError as error:
            os.write(descriptor, str(error).encode())

    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY)
    assert status(child(limited)) == 0
    left = sorted(path.name for path in (run / "parts").iterdir()) if (run / "parts").exists() else []
    assert status(child(lambda: sweep(run))) == 0
    return {"said": said.read_text(), "left": left, "same": SweepResult.load(run).table.equals(sweep(None).table)}


def read_only(folder: Path) -> dict[str, object]:
    """A folder that its user may not write to."""
    said = folder / "said"
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY)
    folder.chmod(0o500)

    def refused() -> None:
        if os.geteuid() == 0:  # whom permissions do not stop
            os.seteuid(65534)
        try:
            sweep(folder / "run")
        except MambalensError as error:
            os.write(descriptor, str(error).encode())

    assert status(child(refused)) == 0
    folder.chmod(0o700)
    return {"said": said.read_text()}


if __name__ == "__main__":
    task = {"killed": killed, "shared": shared, "full": full, "read_only": read_only}[sys.argv[1]]
    print(json.dumps(task(Path(sys.argv[2]))))
