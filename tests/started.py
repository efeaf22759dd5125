"""Python processes as a user starts them, each a fork of one that has imported torch and transformers: that takes seconds.

Of tests whose subject is not the start itself. Nothing of pytest or of this process is in them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` does and prints: a script, or `-m` and a module, with arguments."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        asked = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "said": [str(path) for path in said]}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in said))


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def _serve() -> None:
    """Fork for every line that is asked, and say how the fork ended."""
    sys.path[0] = str(Path.cwd())  # as `python -m` has it, for this file's folder
    import torch

    torch.set_num_threads(1)  # before any work: threads do not survive a fork
    from mambalens import Lens

    for name in ("atlas-mamba1", "atlas-mamba2", "atlas-gpt-neox"):
        Lens.load(name)  # for all that it imports
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(asked["arguments"], asked["cwd"], asked["said"])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(arguments: Sequence[str], cwd: str, said: Sequence[str]) -> None:
    """Be the process that is asked for, and end."""
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = list(arguments[1:]), cwd
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(arguments), str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
