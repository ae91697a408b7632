"""Some processes on the loopback interface that run what they are sent."""

from __future__ import annotations

import importlib
import os
import runpy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300
"""Seconds, on a busy machine, to start and import, and to run what is sent; gloo gives up on a missing partner before."""


class Failed(Exception):
    """What a rank raised: the name of its class, and its message."""

    def __init__(self, kind: str, message: str, trace: str):
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


def answer(pipe: Any) -> None:
    """Run what a pipe sends, and send back what comes of it, until that is None."""
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((True, function(*args)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


def program(script: Path, port: int) -> None:
    """A whole program on each rank, with the variables that torchrun sets."""
    rank, world = os.environ["RANK"], str(dist.get_world_size())
    dist.destroy_process_group()  # it makes its own
    os.environ |= {"LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # who starts them has the store: it outlives rank 0
    os.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _serve(rank: int, world: int, store: str, pipe: Any, timeout: float) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank)}
    torch.set_num_threads(1)
    for slow in ("torch._dynamo", "precond"):
        importlib.import_module(slow)
    pipe.send("ready")
    pipe.recv()  # so that none waits in the group, for its timeout, while others are still importing
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    pipe.send("joined")
    answer(pipe)
    dist.destroy_process_group()


def _has_joined(pipe: Any) -> bool:
    try:
        return pipe.poll(PATIENCE) and pipe.recv() == "joined"
    except (EOFError, OSError):
        return False


class Pool:
    """The ranks; started anew where one of them does not answer.

    Args:
        timeout: of their process group, in seconds.
    """

    def __init__(self, folder: Path, world: int = 2, timeout: float = 60):
        self.folder, self.world, self.timeout, self._started, self._ranks = folder, world, timeout, 0, []

    def _start(self) -> None:
        """Gloo's first connections may fail on a busy machine: then once more."""
        for _ in range(3):
            self._fork()
            if all([_has_joined(pipe) for _, pipe in self._ranks]):
                return
            self.stop()
        raise TimeoutError("the ranks do not find each other")

    def _fork(self) -> None:
        self._started += 1
        # Forked from a process that has imported torch and computed nothing, a rank costs 0.9 s of a core before its first test, not 3.4.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["distributed.sharded", "torch._dynamo"])
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world, str(self.folder / f"store{self._started}"), there, self.timeout),
                daemon=True,
            )
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._ranks.append((process, here))
        for _, pipe in self._ranks:
            if not pipe.poll(PATIENCE):
                self.stop()
                raise TimeoutError("a rank does not start")
            pipe.recv()
        for _, pipe in self._ranks:
            pipe.send("all are ready")

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank, or a :class:`Failed`."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        found: list[Any] = []
        for _, pipe in self._ranks:
            if not pipe.poll(PATIENCE):
                self.stop()
                raise TimeoutError(f"{function.__name__}{args}: a rank does not answer")
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, ("Died", "the rank has ended", "")
            found.append(value if good else Failed(*value))
        if len({x.kind if isinstance(x, Failed) else None for x in found}) > 1:
            self.stop()  # the ranks stand at different collectives
        return found

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned on each rank; raises what a rank raised."""
        found = self.outcomes(function, *args)
        for value in found:
            if isinstance(value, Failed):
                raise value
        return found

    def stop(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []
