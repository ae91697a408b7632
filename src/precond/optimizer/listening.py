"""What an optimizer hears of its model: the inputs of layers, and the random state of a step's first forward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from precond.engine.cells import Cell
from precond.inputs import Observer, Request
from precond.inputs.sync import check_alike, synchronized
from precond.optimizer.parameters import Owners
from precond.optimizer.passes import Recorder
from precond.replicas import distributed
from precond.vec import all_finite


class Listening:
    """Hooks on the model; without one (a copied or unpickled optimizer) it hears nothing.

    Attributes:
        recorder: of the random state, or None where no second pass wants it.
        observer: of layer inputs, or None where no preconditioner wants them.
    """

    def __init__(self, requests: frozenset[Request]):
        self.requests = requests
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self._heard: bool | None = None
        self._told = False

    def begin(
        self,
        owners: Owners,
        recorded: Iterable[torch.device] | None,
        cells: Sequence[Cell],
        ready: Callable[[], None],
    ) -> None:
        """Put the hooks on the models.

        Args:
            recorded: the devices whose random state second passes want, or None.
            ready: a method, held weakly, to call before the first observed forward of a step.
        """
        seen = {} if self.observer is None else self.observer.collect()  # in this step, should the hooks be put on anew
        self.close()
        modules = owners.alive()
        if recorded is not None and modules:
            self.recorder = Recorder(modules, recorded)
        if self.requests:
            found = owners.survey()
            if found.passed_by:
                names = "; ".join(f"{name!r} {why}" for name, why in found.passed_by)
                warnings.warn(f"no input statistics for some layers, which keep their gradient: {names}", stacklevel=5)
            self.observer = Observer(found.sites, self.requests, seen)
            of = weakref.WeakMethod(ready)
            self.observer.ready = lambda: None if (call := of()) is None else call()
            self.want(cells)
            if distributed():
                check_alike(self.observer)

    def collect(self, cells: Sequence[Cell]) -> bool:
        """Hand what was seen of layer inputs to the cells, once a step; False where it holds inf or NaN."""
        if self._heard is None:
            self._heard = self._hand_out(cells)
        return self._heard

    def _hand_out(self, cells: Sequence[Cell]) -> bool:
        if self.observer is None:
            if self.requests:
                raise RuntimeError(
                    "this optimizer was closed, copied or unpickled and observes no model: call watch(model) first"
                )
            return True
        seen = synchronized(self.observer) if distributed() else self.observer.collect()
        for cell in cells:
            cell.inputs = seen
        if not seen and self.observer.expecting and not self._told:
            self._told = True
            warnings.warn(
                "no layer inputs were observed since the last step: was the model compiled and called before the optimizer was "
                "made, or are layers called by their forward() or by functions? Such layers keep their gradient",
                stacklevel=8,
            )
        # An input that is not finite is so in its own variance.
        return all_finite(tuple(m.variance for m in seen.values()))

    def want(self, cells: Sequence[Cell]) -> None:
        """Tell the observer what the next step needs."""
        if self.observer is not None:
            wanted: dict[tuple[str, Request], Tensor | None] = {}
            for cell in cells:
                if cell.handled:
                    wanted |= {(site, request): known for site, request, known in cell.preconditioner.wanted(cell.state)}
            self.observer.wanted = wanted

    def pause(self) -> None:
        """Until the step is over, forwards are those of second passes."""
        if self.observer is not None:
            self.observer.enabled = False

    def resume(self) -> None:
        """The second passes were given up: what was seen stays, further forwards count."""
        self._heard = None
        if self.observer is not None:
            self.observer.enabled = True

    def forget(self) -> None:
        """What was heard so far does not count: the step's forwards are yet to come."""
        self._heard = None
        if self.recorder is not None:
            self.recorder.arm()
        if self.observer is not None:
            self.observer.clear()
            self.observer.enabled = True

    def again(self, cells: Sequence[Cell]) -> None:
        """The step is over: the next forwards are its successor's."""
        self.forget()
        self.want(cells)

    def close(self) -> None:
        """Remove the hooks."""
        for listener in (self.recorder, self.observer):
            if listener is not None:
                listener.close()
        self.recorder = self.observer = None
