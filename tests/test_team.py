"""Work on PyTorch's own threads, or on a pool where those cannot be had."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mambalens.hooks import team


@pytest.fixture(params=["PyTorch's", "a pool"], autouse=True)
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both on three threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param == "a pool":
        monkeypatch.setattr(team, "_parallel", lambda: None)
    elif team._parallel() is None:
        assert sys.platform != "linux"
        pytest.skip("another system's OpenMP")
    yield
    team._pool.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_every_number_is_worked_on_once(count: int) -> None:
    done: list[int] = []
    team.each(count, done.append)
    assert sorted(done) == list(range(count))


def test_work_is_done_side_by_side() -> None:
    """Three that wait for each other: they come together or never."""
    together = threading.Barrier(3, timeout=20)
    team.each(3, lambda number: together.wait())
    assert not together.broken


@pytest.mark.parametrize(("count", "least", "sizes"), [(7, 1, [2, 2, 3]), (7, 3, [3, 4]), (7, 8, [7]), (2, 1, [1, 1]), (0, 1, [0])])  # fmt: skip
def test_parts_lie_side_by_side(count: int, least: int, sizes: list[int]) -> None:
    found: list[tuple[int, int]] = []
    team.parts(count, lambda begin, end: found.append((begin, end)), least)
    found.sort()
    assert [end - begin for begin, end in found] == sizes
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == count


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_goes_wrong_is_raised(kind: type[BaseException]) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise kind("number 1")
        time.sleep(0.02)
        done.append(number)

    with pytest.raises(kind, match="number 1"):
        team.each(50, work)
    assert len(done) < 40, "the others ran on"
    team.each(3, done.append)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_leaves_its_parents_threads_alone() -> None:
    team.each(3, lambda number: None)
    child = os.fork()
    if not child:
        signal.alarm(60)  # one that waits in vain ends by it
        done: list[int] = []
        team.each(6, done.append)
        os._exit(0 if team._forked and sorted(done) == list(range(6)) else 1)
    assert os.waitpid(child, 0)[1] == 0 and not team._forked


def test_all_threads_are_asked_also_for_less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller team would end threads that PyTorch's next operation needs."""
    asked: list[int] = []

    def run(body: Callable[[object], object], data: None, threads: int, flags: int) -> None:
        asked.append(threads)
        body(None)

    monkeypatch.setattr(team, "_parallel", lambda: run)
    done: list[int] = []
    team.each(2, done.append)
    assert asked == [3] and done == [0, 1]
