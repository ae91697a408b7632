"""The observer: forward pre-hooks that reduce layer inputs at once to (count, mean, spread)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from precond.hooks import WeakHook, remove
from precond.inputs.moments import Moments, Request, pool
from precond.inputs.sites import Site
from precond.inputs.taps import Tap
from precond.observing import watching

Seen = dict[tuple[str, Request], Moments]
"""By site name and request."""


class Observer:
    """Watches the training forwards of some sites between two optimizer steps.

    A forward counts if its module trains and gradients are on; one that activation checkpointing repeats within backward
    counts once. Nothing of the inputs is kept but their moments.
    """

    def __init__(self, sites: Sequence[Site], requests: Iterable[Request]):
        self.sites, self.requests = tuple(sites), tuple(requests)
        self.enabled = True
        self.wanted: set[tuple[str, Request]] = {(site.name, request) for site in self.sites for request in self.requests}
        self._seen: Seen = {}
        self._without_grad: dict[nn.Module, int] = {}
        by_module: dict[nn.Module, list[tuple[Site, Tap, Any]]] = {}
        for site in self.sites:
            for tap, weight in site.taps:
                by_module.setdefault(tap.module, []).append((site, tap, weight))
        self._work = by_module
        self._handles = [m.register_forward_pre_hook(WeakHook(self, "see"), with_kwargs=True) for m in by_module]
        weakref.finalize(self, remove, self._handles)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward of a watched module."""
        if not (self.enabled and module.training and watching()) or not self._counts(module):
            return
        device = next(iter(self._work[module]))[0].weight.device.type
        full = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with torch.no_grad(), full:
            for site, tap, weight in self._work[module]:
                if not site.weight.requires_grad:
                    continue
                for request in self.requests:
                    key = (site.name, request)
                    if key not in self.wanted:
                        continue
                    found = tap.moments(args, kwargs, weight, request)
                    self._seen[key] = pool([self._seen[key], found]) if key in self._seen else found

    def _counts(self, module: nn.Module) -> bool:
        """Whether this forward is one of the step's own, each of which counts once under checkpointing of either kind."""
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            if not torch.is_grad_enabled():  # the first pass of re-entrant checkpointing: the second one will count
                self._without_grad[module] = self._without_grad.get(module, 0) + 1
            return torch.is_grad_enabled()
        pending = self._without_grad.get(module, 0)
        if pending:
            self._without_grad[module] = pending - 1
        return pending > 0

    def collect(self) -> Seen:
        """What was seen since :meth:`clear`."""
        return self._seen

    def clear(self) -> None:
        """Forget it: the step was taken, or skipped."""
        self._seen, self._without_grad = {}, {}

    def close(self) -> None:
        """Remove the hooks."""
        remove(self._handles)
