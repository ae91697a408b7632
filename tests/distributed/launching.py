"""Scripts started with torchrun; and what each of its processes runs, so that one that waits too long says where."""

from __future__ import annotations

import faulthandler
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SECONDS = 300
"""On a busy machine importing torch in three to five processes takes most of a minute alone."""


def torchrun(script: Path, processes: int, folder: Path, arguments: Sequence[str] = ()) -> None:
    """Run a script in a folder, on a port that is free; an error tells what it wrote.

    The address and the interface are given: else the machine's name is looked up, which takes as long as a network that does not answer likes.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}",
        __file__, str(script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS + 60, cwd=folder)
    assert done.returncode == 0, done.stderr[-5000:]


def in_two_processes(script: Path, folder: Path, recipes: Sequence[str]) -> Path:
    """The folder, in which a script that takes it and recipes has left what two processes found."""
    torchrun(script, 2, folder, [str(folder), *recipes])
    return folder


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # torch keeps gloo's threads after the group is destroyed (with its own optimizers too): one that drops a tensor while the interpreter
    # is taken down aborts the process
    os._exit(0)
