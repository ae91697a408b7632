"""What an optimizer hears of its model: the inputs of layers, and the random state of a step's first forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor

from precond.algebra.sharding import local
from precond.algebra.vec import all_finite
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf, is_matrix
from precond.optim.engine.cells import Cell
from precond.optim.engine.shared_state import owned_statistics
from precond.optim.inputs import Request, Site
from precond.optim.inputs.observer import InputMoments, Observer
from precond.optim.inputs.sync import Heard, check_alike, synchronized
from precond.optim.optimizer.models import Models
from precond.optim.optimizer.passes import Recorder
from precond.optim.ranks.replicas import distributed


class ModelHooks:
    """Hooks on the model; without one (a copied or unpickled optimizer) it hears nothing.

    Attributes:
        recorder: of the random state, or None where no second pass wants it.
        observer: of layer inputs, or None where no preconditioner wants them.
        unobserved: weights whose inputs are not observed, and why; of layers, as far as steps have shown it.
    """

    def __init__(self, requests: frozenset[Request]):
        self.requests = requests
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.unobserved: dict[Tensor, str] = {}
        self._collected: bool | None = None
        self._warned: set[str] = set()
        self._lost: Set[Tensor] = frozenset()

    def begin(
        self,
        models: Models,
        recorded: Iterable[torch.device] | None,
        cells: Sequence[Cell],
        ready: Callable[[], Observer | None],
    ) -> None:
        """Put the hooks on the models.

        Args:
            recorded: the devices whose random state second passes want, or None.
            ready: a method, held weakly, to call before the first observed forward of a step; it returns who observes it.
        """
        before = self.observer
        self.close()
        modules, self._lost = models.alive(), models.lost
        if recorded is not None and modules:
            self.recorder = Recorder(modules, recorded)
        if self.requests:
            found = models.survey()
            self.unobserved = {p: passed.why for passed in found.passed_by for p in passed.params}
            trained = [passed for passed in found.passed_by if any(p.requires_grad for p in passed.params)]
            _warn({passed.name or "(the model)": passed.why for passed in trained})
            self.observer = Observer(found.sites, self.requests, before)
            of = weakref.WeakMethod(ready)
            self.observer.ready = lambda: None if (call := of()) is None else call()
            self.follow(cells)
            if distributed():
                check_alike(self.observer)

    def collect(self, cells: Sequence[Cell], watch: bool) -> bool:
        """Hand what was seen of layer inputs to the cells, once a step; False where it holds inf or NaN.

        On an accelerator that is not looked at, unless one is to ``watch``: what is not finite is passed by where it is folded in.
        """
        if self._collected is None:
            self._collected = self._distribute(cells, watch)
        return self._collected

    def _distribute(self, cells: Sequence[Cell], watch: bool) -> bool:
        if self.observer is None:
            if self.requests:
                raise RuntimeError(
                    "this optimizer was closed, copied or unpickled and observes no model: call watch(model) first"
                )
            return True
        looks = lambda m: watch or m.mean.device.type == "cpu"  # noqa: E731
        if distributed():
            heard = synchronized(self.observer, owned_statistics(cells) if self.observer.wanted else {}, looks)
        else:
            seen = self.observer.collect()
            if not seen and not self.observer.wanted:
                self._give(cells, seen)
                return True
            # An input that is not finite is so in its own variance.
            heard = Heard(seen, frozenset(seen), all_finite(tuple(m.variance for m in seen.values() if looks(m))))
        self._give(cells, heard.seen)
        if self.unobserved or self.observer.unread or not heard.called.issuperset(self.observer.wanted):
            self._warn_unobserved(heard.called, self.observer.expected, self.observer.unread)
        return heard.finite

    def leave_out(self, cells: Sequence[Cell]) -> None:
        """What holds inf or NaN does not count: the gradient is finite, and none of its."""
        given = next((each.inputs for cell in cells for each in cell.cells if each.inputs), {})
        finite = {key: m for key, m in given.items() if all_finite((m.variance,))}
        self._give(cells, finite)
        self._collected = True
        new = sorted({site for site, _ in given.keys() - finite.keys()} - self._warned)
        self._warned |= set(new)
        if new:
            warn(
                f"inputs of {', '.join(map(repr, new[:3]))}{' and others' * (len(new) > 3)} held inf or NaN, and the gradient does not: the "
                "step is taken with the statistics of before; was a forward passed over without backward()?"
            )

    @staticmethod
    def _give(cells: Sequence[Cell], seen: InputMoments) -> None:
        for cell in cells:
            for each in cell.cells:
                each.inputs = seen

    def _warn_unobserved(
        self, seen: frozenset[tuple[str, Request]], expected: Sequence[Site], unread: Mapping[str, str]
    ) -> None:
        """Say once of each layer that it should have been seen, has a gradient, and was not seen; or not read."""
        new: dict[str, str] = {}
        for site in expected:
            here = any((site.name, request) in seen for request in self.requests)
            if here and site.name not in unread:
                self.unobserved.pop(site.weight, None)
                continue
            self.unobserved[site.weight] = unread.get(site.name, _UNSEEN)
            if site.name not in self._warned:
                if site.name in unread or _has_gradient(site.weight):
                    new[site.name] = self.unobserved[site.weight]
                else:
                    self.unobserved[site.weight] = "was not called"
        if new and not seen and not unread and not self._warned:
            warn(
                "no layer inputs were observed since the last step: was the model compiled and called before the optimizer was made, "
                "or another of these classes compiled in this process for an optimizer that observes nothing (torch.compile takes "
                "its code again: call torch._dynamo.reset() before training), are its layers in eval() mode, or called by their "
                f"forward() or by functions? Such layers {_WITHOUT}"
            )
        else:
            _warn(new)
        self._warned |= new.keys()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Forwards inside are another's."""
        listeners = [x for x in (self.recorder, self.observer) if x is not None]
        for listener in listeners:
            listener.absent += 1
        try:
            yield
        finally:
            for listener in listeners:
                listener.absent -= 1

    def follow(self, cells: Sequence[Cell]) -> None:
        """The model has changed, and what is needed of it may have."""
        if self.observer is not None:
            self.observer.know()
            leaves = [leaf for cell in cells for each in cell.cells for leaf in each.leaves]
            strangers = {leaf.name: leaf.param for leaf in leaves if self._is_strange(leaf)}
            self.unobserved |= dict.fromkeys(strangers.values(), _STRANGE)
            _warn(dict.fromkeys(strangers.keys() - self._warned, _STRANGE))
            self._warned |= strangers.keys()
        self.want(cells)

    def _is_strange(self, leaf: Leaf) -> bool:
        """Whether it may be the weight of a layer that the optimizer was not given."""
        return leaf.module is None and leaf.param not in self._lost and is_matrix(leaf)

    def want(self, cells: Sequence[Cell]) -> None:
        """Tell the observer what the next step needs."""
        if self.observer is not None:
            self.observer.wanted = {(site, request): known for cell in cells for site, request, known in cell.wanted()}

    def pause(self) -> None:
        """Until the step is over, forwards are those of second passes."""
        if self.observer is not None:
            self.observer.enabled = False

    def resume(self) -> None:
        """The second passes were given up: what was seen stays, further forwards count."""
        self._collected = None
        if self.observer is not None:
            self.observer.enabled = True

    def begin_closure(self) -> None:
        """A closure runs a step's forwards; what counts of those before it is known when it ends."""
        self._collected = None
        if self.observer is not None:
            self.observer.enabled = True
            self.observer.begin_closure()

    def end_closure(self, anew: bool) -> None:
        """The closure has run; where it made the gradient ``anew``, earlier forwards of what it called do not count."""
        if self.observer is not None:
            self.observer.end_closure(anew)

    def begin_clearing(self) -> None:
        """Gradients are about to be cleared, outside of a closure: forwards whose backward has been do not count, if no other comes."""
        if self.observer is not None and self._collected is None and self.observer.enabled:
            self.observer.clearing()

    def end_clearing(self) -> None:
        """They have been cleared."""
        if self.observer is not None and self._collected is None:
            self.observer.cleared()

    def forget(self) -> None:
        """What was heard so far does not count: the step's forwards are yet to come."""
        self._collected = None
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


_WITHOUT = "are stepped without them, by what is composed with them (Adam, say) or else by their gradient"
_STRANGE = "is of no module that the optimizer has: give its layer as the group, {'params': layer}"
_UNSEEN = "was not called as a layer that trains: it is in eval() mode, or called by its forward() or by a function"


def _warn(reasons: Mapping[str, str]) -> None:
    if not reasons:
        return
    alike: dict[str, list[str]] = {}
    for name, why in reasons.items():
        alike.setdefault(why, []).append(repr(name))
    texts = []
    for why, (first, *others) in alike.items():
        texts.append(f"{first} (likewise {', '.join(others)}) {why}" if others else f"{first} {why}")
    warn(f"no input statistics for some layers, which {_WITHOUT}: {'; '.join(texts)}")


def _has_gradient(p: Tensor) -> bool:
    """Whether something was done with a parameter."""
    return p.grad is not None and (p.grad.layout != torch.strided or bool(local(p.grad).any()))
