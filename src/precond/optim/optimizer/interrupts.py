"""Ctrl-C between steps, not within: what is half written is neither the old state nor the new one."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what signal wraps, which spends four fifths of the time on handlers' names
import signal
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any

import torch


class Uninterrupted:
    """A keyboard interrupt that comes within the block is raised at its end, a second one at once.

    The handler of SIGINT is exchanged and put back; elsewhere than in the main thread, which alone is interrupted, nothing is done.

    Example:
        >>> done = []
        >>> try:
        ...     with Uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done.append("all of it")
        ... except KeyboardInterrupt:
        ...     done.append("then stopped")
        >>> done
        ['all of it', 'then stopped']
    """

    __slots__ = ("_before", "_came")

    def __enter__(self) -> None:
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None
        if torch.compiler.is_compiling() or current_thread() is not main_thread():
            return
        before = _signal.getsignal(signal.SIGINT)
        if callable(before):  # neither ignored nor handled outside of Python
            _signal.signal(signal.SIGINT, self._note)
            self._before = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:  # whoever asks twice does not want to wait
            self._before(number, frame)
        self._came = (number, frame)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            _signal.signal(signal.SIGINT, self._before)
            if self._came is not None:
                self._before(*self._came)
