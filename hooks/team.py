"""Work on the threads that PyTorch has on a CPU.

Those wait for their next work without sleeping: beside them, threads of our own would get half of a processor. Where
theirs cannot be had (another system's OpenMP, a forked process), a pool of threads is what there is.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def each(count: int, work: Callable[[int], object]) -> None:
    """Work of every number below `count`, on PyTorch's number of threads.

    Python runs on one of them at a time: work is what leaves it, such as compiled code.

    Raises:
        Exception: the first that work raises; what has begun by then ends before.
    """
    threads = torch.get_num_threads()
    if min(count, threads) < 2:
        for number in range(count):
            work(number)
        return
    left, errors = itertools.count(), list[BaseException]()

    def some(_: object = None) -> None:
        try:
            while not errors and (number := next(left)) < count:
                work(number)
        except BaseException as error:  # an interrupt too: nothing can be raised through OpenMP
            errors.append(error)

    run = None if _forked else _parallel()
    if run is not None:
        # All of them, also for less work: OpenMP lets threads end that a team leaves out, and PyTorch's next operation
        # would have to start them again.
        run(BODY(some), None, threads, 0)
    else:
        list(_pool(threads).map(some, range(min(count, threads))))
    if errors:
        raise errors[0]


def parts(count: int, work: Callable[[int, int], object], least: int = 1) -> None:
    """Work from one number to another, below `count`, a part for each of PyTorch's threads.

    Args:
        count: of what is to be done.
        work: begins and ends.
        least: how much is worth a thread.
    """
    threads = max(1, min(torch.get_num_threads(), count // least))
    ends = [count * part // threads for part in range(threads + 1)]
    each(threads, lambda part: work(ends[part], ends[part + 1]))


@cache
def _parallel() -> Callable[..., Any] | None:
    """OpenMP's entry for code that GCC compiles, as the library has it that PyTorch itself runs on."""
    if sys.platform != "linux":
        return None
    try:
        run = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mambalens")


def _after_fork() -> None:
    """A fork has none of its parent's threads, and would wait for them in vain."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
