"""Where measurements go: a sink is any function of (metrics, step)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

Metrics = Mapping[str, float]
Sink = Callable[[Metrics, int], Any]


class Jsonl:
    r"""One line of JSON per measurement, ``{"step": 100, "loss": 0.31, …}``; what is not finite is ``null``.

    An existing file is continued: after a resumed run, the last line of a step counts.

    Args:
        path: the file; its folder is made.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "run" / "metrics.jsonl"
        >>> sink = Jsonl(path)
        >>> sink({"loss": 0.5, "lambda_max": float("nan")}, 100)
        >>> sink.close(); path.read_text()
        '{"step": 100, "loss": 0.5, "lambda_max": null}\n'
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: TextIO | None = None

    def __call__(self, metrics: Metrics, step: int) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        row = {"step": step, **{name: x if math.isfinite(x) else None for name, x in metrics.items()}}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a further measurement opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Scalars under a common prefix.

    Args:
        writer: anything with ``add_scalar(name, value, step)``, such as ``torch.utils.tensorboard.SummaryWriter``; or a folder, for
            which one is made (then the package tensorboard is needed).
        prefix: of the names.

    Raises:
        ImportError: for a folder, where tensorboard is not installed.

    Example:
        >>> class Writer:  # in place of a SummaryWriter
        ...     def add_scalar(self, name, value, step):
        ...         print(name, value, step)
        >>> TensorBoard(Writer())({"loss": 0.5}, 100)
        precond/loss 0.5 100
    """

    def __init__(self, writer: Any, prefix: str = "precond/"):
        self._own = isinstance(writer, str | Path)
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard: a folder needs the package tensorboard (pip install tensorboard)") from error
            writer = SummaryWriter(str(writer))
        self._writer, self._prefix = writer, prefix

    def __call__(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(self._prefix + name, value, step)

    def close(self) -> None:
        """Close the writer, if it was made here."""
        if self._own:
            self._writer.close()


def as_sink(given: Any) -> Sink:
    """A path as JSONL, a writer as TensorBoard, a function as it is.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(given, str | Path):
        return Jsonl(given)
    if hasattr(given, "add_scalar"):
        return TensorBoard(given)
    if callable(given):
        return given
    raise TypeError(
        f"Monitor: a sink must be a path, a SummaryWriter, or a function of (metrics, step), got {type(given).__name__}"
    )
