"""A process of its own for the pretended device: what torch is told there is for good, and no other test shall hear of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from device.building import guard
from distributed.pool import Failed, answer

PATIENCE = 300  # seconds, on a busy machine


def _serve(pipe: Any) -> None:
    from device.pretended import pretending

    torch.set_num_threads(1)
    with pretending():
        answer(pipe)


class Process:
    """Runs module-level functions where ``cuda:0`` and ``cuda:1`` exist; another takes its place where it dies or does not answer.

    Raises:
        Unavailable: where they cannot.
    """

    def __init__(self) -> None:
        guard()
        self._process: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns there; raises :class:`distributed.pool.Failed` for what it raises."""
        if self._process is None:
            context = mp.get_context("spawn")
            self._pipe, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there,), daemon=True)
            self._process.start()
            there.close()
        self._pipe.send((function, args))
        try:
            if not self._pipe.poll(PATIENCE):
                raise TimeoutError(f"{function.__name__}{args}: the device's process does not answer")
            good, value = self._pipe.recv()
        except (TimeoutError, EOFError):
            self.stop()
            raise
        if not good:
            raise Failed(*value)
        return value

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(None)  # it ends by itself, as coverage wants it to, where it hears
                self._process.join(5)
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
