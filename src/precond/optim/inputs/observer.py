"""The observer: forward pre-hooks that reduce layer inputs at once to (count, mean, spread)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra.sharding import gathered
from precond.optim.inputs.hooks import InputHook, remove, sweep
from precond.optim.inputs.moments import Moments, Request, pool
from precond.optim.inputs.reading import Unreadable
from precond.optim.inputs.sites import Site
from precond.optim.inputs.taps import Tap, Weight
from precond.optim.inputs.watched import Key, Mark, Watched, holder, mark
from precond.optim.inputs.watching import watching

InputMoments = dict[Key, Moments]
_AS_IT_IS = nullcontext()


class Observer:
    """Watches the training forwards of some sites between two optimizer steps.

    A forward counts if its module trains and gradients are on; one that activation checkpointing repeats within backward
    counts once. Nothing of the inputs is kept but their moments. Nothing is raised into a forward: what cannot be read is
    passed by, and :attr:`unread` says why.

    Attributes:
        unread: by site name, why inputs of it were not read since :meth:`clear`.
        absent: how many contexts say that the forwards are another's.
        habits: what ranks have sent each other of layers: see :mod:`precond.optim.inputs.sync`.
    """

    def __init__(self, sites: Sequence[Site], requests: Iterable[Request], before: Observer | None = None):
        self.sites, self.requests = tuple(sites), tuple(requests)
        self.enabled = True
        self.ready: Callable[[], Observer | None] = _nothing  # called before the first forward that counts: who observes it
        self._first = True
        self.wanted: dict[Key, Tensor | None] = {}
        self._known: dict[str, tuple[bool, torch.dtype]] = {}
        self.know()
        self.unread: dict[str, str] = {}
        self.absent = 0
        self.habits: dict[Any, Any] = {}
        self._seen: InputMoments = {}  # since the last backward through the layer
        self._earlier: InputMoments = {}  # before it: micro-batches, or a step that a scaler skipped
        self._outside: InputMoments = {}  # before the closure that runs
        self._marks: dict[str, Mark] = {}
        self._cleared: dict[str, bool] = {}  # sites whose gradients were cleared since their forward: whether after a backward
        if before is not None:  # in this step, of the model as it was
            self._seen, self._earlier, self._outside = dict(before._seen), dict(before._earlier), dict(before._outside)
            self._marks, self._cleared = dict(before._marks), dict(before._cleared)
        self._lock = RLock()  # for forwards in several threads; a tap may call the module again
        self._without_grad: dict[nn.Module, int] = {}
        self._work: dict[nn.Module, tuple[Tap, list[Watched]]] = {}
        self._shapes: dict[Key, tuple[int, int]] = {}
        for site in self.sites:
            keys = [(site.name, request) for request in self.requests]
            for tap, weight in site.taps:
                self._work.setdefault(tap.module, (tap, []))[1].append(Watched(site, weight, keys, *holder(tap.module, weight)))
        for module in self._work:
            sweep(module)  # copies of copies would carry ever more
        self._handles = [m.register_forward_pre_hook(InputHook(self, "see"), with_kwargs=True) for m in self._work]
        weakref.finalize(self, remove, self._handles)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward of a watched module."""
        work = self._work.get(module)  # None in a shallow copy, such as nn.DataParallel's replicas
        changed = work is not None and any(self._known.get(w.site.name) != _kind(w.site.weight) for w in work[1])
        if (self._first or changed) and self.enabled and not self.absent and watching():
            again = not torch.is_grad_enabled()  # no forward of a step
            self._first = again
            if (now := self.ready()) is not self and now is not None:  # the model was found changed
                now._first = again
                return now.see(module, args, kwargs)
        if not self.wanted or self.absent:
            return
        if work is None or not (self.enabled and module.training and watching()) or _transformed():
            return
        with self._lock:
            self._read(module, *work, args, kwargs)

    def _read(self, module: nn.Module, tap: Tap, weights: list[Watched], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read a call and fold it in, where it counts."""
        if not self._counts(module):
            return
        asked = [w for w in weights if w.site.weight.requires_grad and not self.wanted.keys().isdisjoint(w.keys) and not w.lent]
        if not asked:
            return
        try:
            device = asked[0].site.weight.device.type
            full = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS
            with torch.no_grad(), full:
                args, kwargs, speaks = gathered(args, kwargs)  # under tensor parallelism
                if (call := tap.read(args, kwargs)) is None:
                    return
                for w in asked:
                    self._fold(tap, call, w.site, w.weight, w.keys if speaks else ())
        except Exception as error:
            for w in asked:
                self.unread[w.site.name] = why_unread(error)

    def _fold(self, tap: Tap, call: Any, site: Site, weight: Weight, keys: Sequence[Key]) -> None:
        """Put what a call shows of a weight to what was seen before."""
        try:
            if self._used(site):
                self._separate(site)
                if site.weight.grad is None:  # cleared, by whomever
                    self._drop(site, self._earlier, self._outside)
            elif site.name in self._cleared:  # neither backward nor step, and now anew: of a batch that is over
                self._drop(site, self._seen, self._outside)
            self._cleared.pop(site.name, None)
            self._marks[site.name] = mark(site.weight)
            for key in keys:
                if key not in self.wanted:
                    continue
                if (center := self.wanted[key]) is not None:
                    center = center.to(_device(tap.module, site))
                if (found := tap.moments(call, weight, key[1], center)) is None:
                    continue
                found = found.to(site.weight.device)
                if key not in self._shapes:
                    self._shapes[key] = site.shape(key[1])
                if found.mean.shape != self._shapes[key]:
                    raise Unreadable(f"has {self._shapes[key]} features, but inputs have {tuple(found.mean.shape)}")
                self._seen[key] = pool([found, self._seen[key]]) if key in self._seen else found
        except Exception as error:
            self.unread[site.name] = why_unread(error)

    def know(self) -> None:
        """What is wanted is of the model as it is now; what else it becomes between two forwards is noticed."""
        self._known = {site.name: _kind(site.weight) for site in self.sites}

    def _counts(self, module: nn.Module) -> bool:
        """Whether this forward is one of the step's own, each of which counts once under checkpointing of either kind."""
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            if not torch.is_grad_enabled():  # the first pass of re-entrant checkpointing: the second one will count
                self._without_grad[module] = self._without_grad.get(module, 0) + 1
            return torch.is_grad_enabled()
        pending = 0 if _repeated() else self._without_grad.get(module, 0)
        if pending:
            self._without_grad[module] = pending - 1
        return pending > 0

    @property
    def expected(self) -> list[Site]:
        """The sites of weights that train, of which something is wanted."""
        asked = {name for name, _ in self.wanted}
        return [site for site in self.sites if site.weight.requires_grad and site.name in asked]

    def collect(self) -> InputMoments:
        """What was seen since :meth:`clear`."""
        seen = dict(self._seen)
        for site in self.sites if self._cleared else ():
            if self._cleared.get(site.name) and not self._used(site):  # its gradient is no more, and no other was made of it
                self._drop(site, seen)
        if not self._earlier:
            return seen
        both = {key: pool([seen[key], self._earlier[key]]) for key in self._earlier.keys() & seen.keys()}
        return {**self._earlier, **seen, **both}

    def _used(self, site: Site) -> bool:
        """Whether the layer's gradient has changed since its last forward."""
        known = self._marks.get(site.name)
        return known is not None and not known.holds(site.weight)

    def _drop(self, site: Site, *of: InputMoments) -> None:
        for seen in of:
            for key in self._keys(site):
                seen.pop(key, None)

    def _keys(self, site: Site) -> set[Key]:
        return {(site.name, request) for request in self.requests}

    def _separate(self, site: Site) -> None:
        self._pour(site, self._seen, self._earlier)

    def _pour(self, site: Site, of: InputMoments, into: InputMoments) -> None:
        """Put what one has of a site to what the other has."""
        for key in self._keys(site) & of.keys():
            found = of.pop(key)
            into[key] = pool([found, into[key]]) if key in into else found

    def begin_closure(self) -> None:
        """Keep what was seen so far apart from what a closure sees, which may run several micro-batches."""
        for site in self.sites if self._seen or self._earlier else ():
            self._pour(site, self._earlier, self._outside)
            self._pour(site, self._seen, self._outside)

    def end_closure(self, anew: bool) -> None:
        """Where it made the gradient ``anew``, what was seen before it of layers that it called does not count."""
        for site in self.sites if self._outside else ():
            if not (anew and self._keys(site) & (self._seen.keys() | self._earlier.keys())):
                self._pour(site, self._outside, self._seen if site.name in self._cleared else self._earlier)
        self._outside = {}

    def clearing(self) -> None:
        """Gradients are about to be cleared: forwards whose backward has been count no more, unless another backward goes through them.

        So it is where each of several losses of one forward has a backward of its own, and gradients are cleared in between (PCGrad,
        GradNorm). A new forward of the layer tells that the old one is over.
        """
        for site in self.sites if self._marks else ():
            if self._used(site):
                self._cleared[site.name] = True
                self._pour(site, self._earlier, self._seen)
        self._earlier = {}

    def cleared(self) -> None:
        """The gradients were cleared: that is no backward."""
        for site in self.sites if self._marks else ():
            if site.name in self._marks:
                self._marks[site.name] = mark(site.weight)
                if not self._seen.keys().isdisjoint(self._keys(site)):
                    self._cleared.setdefault(site.name, False)

    def clear(self) -> None:
        """Forget it: the step was taken, or skipped."""
        self._seen, self._earlier, self._marks, self._without_grad, self._cleared = {}, {}, {}, {}, {}
        self.unread, self._first = {}, True

    def close(self) -> None:
        """Remove the hooks."""
        remove(self._handles)
        for module in self._work:
            sweep(module)  # what a forward that has raised left of them


def _kind(weight: Tensor) -> tuple[bool, torch.dtype]:
    return weight.requires_grad, weight.dtype


def _device(module: nn.Module, site: Site) -> torch.device:
    """Where a call's inputs are: an engine that offloads parameters has others in their place by then."""
    for p in module._parameters.values():
        if p is not None:
            return p.device
    return site.weight.device


def why_unread(error: Exception) -> str:
    """Why inputs were not read."""
    if isinstance(error, Unreadable):
        return str(error)
    first = str(error).strip().split("\n")[0]
    return f"could not be told its inputs ({type(error).__name__}: {first})"


def _nothing() -> None:
    pass


def _transformed() -> bool:
    """Whether this forward runs inside vmap, grad or another transform of torch.func, whose tensors must not leave it."""
    return torch._C._functorch.maybe_current_level() is not None


def _repeated() -> bool:
    """Whether non-reentrant checkpointing repeats a forward here, which counted at once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in hooks[0].__qualname__
