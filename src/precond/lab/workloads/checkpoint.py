"""Where an interrupted training goes on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from precond.lab.workloads.files import write_atomically


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another training; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """One file, replaced atomically.

    Args:
        path: the file.
        seconds: the shortest time between two writes.
    """

    path: Path
    seconds: float = 10.0

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file.

        Raises:
            WriteError: where it cannot be written; the file is as it was.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None.

        Raises:
            CheckpointError: where the file is damaged.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            # Onto the CPU: the optimizer and the model move what they load.
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.path} is damaged ({len(content):,} bytes, {type(error).__name__}); delete it to repeat this "
                "training from its start, or start all over with --no-resume"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path} is no checkpoint but a {type(state).__name__}; delete it")
        return state

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
