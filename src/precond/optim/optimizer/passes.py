"""Second passes that see what the first one saw: the same dropout masks, and normalization statistics that move once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precond.optim.inputs.hooks import WeakHook, remove, unhook
from precond.optim.inputs.watching import watching

Random = dict[torch.device, Tensor]


def random_state(devices: Iterable[torch.device]) -> Random:
    """The states of torch's generators: the CPU's and those of the accelerators named."""
    states: Random = {torch.device("cpu"): torch.get_rng_state()}
    for device in set(devices):
        if device.type != "cpu":
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_random_state(states: Random) -> None:
    """Put generators back to states that :func:`random_state` returned."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


class Buffers:
    """The values of a model's buffers, to be put back: whatever a normalization layer keeps, of whatever class."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._kept = [
            (module, name, buffer, buffer.clone())
            for root in modules
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back, into the same tensors."""
        for module, name, buffer, value in self._kept:
            buffer.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Undo, on leaving, what forward passes do to a model's buffers (BatchNorm's running statistics and the like).

    Nested use is harmless. Meant for a second pass when the optimizer was given parameters only:
    ``while opt.probe(): with frozen_statistics(model): loss(model(x), y).backward()``.

    Args:
        model: whose buffers are put back.

    Yields:
        Nothing; the model's parameters and their gradients are left as they are.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.BatchNorm1d(1)
        >>> with precond.frozen_statistics(model):
        ...     _ = model(torch.tensor([[1.0], [3.0]]))
        >>> model.running_mean.item(), model.num_batches_tracked.item()
        (0.0, 0)
    """
    buffers = Buffers([model])
    try:
        yield
    finally:
        buffers.restore()


class Recorder:
    """Notes the random state at a model's first training forward after :meth:`arm`, by a forward pre-hook.

    The hook holds its recorder weakly and goes with it; a copied or unpickled model carries an inert one.
    """

    def __init__(self, modules: Iterable[nn.Module], devices: Iterable[torch.device]):
        self.devices = list(devices)
        self.random: Random | None = None
        self.forwards = 0  # of whole models, since it was armed; of one that is never called itself none are counted
        self.absent = 0  # how many contexts say that the forwards are another's
        self._armed = True
        roots = list(modules)
        for root in roots:
            unhook(root)  # copies of copies would carry ever more
        self._handles = [module.register_forward_pre_hook(WeakHook(self, "note_root")) for module in roots]
        # Of a module that is never called itself (a LightningModule whose training_step calls its parts) the parts are.
        self._of_parts = [m.register_forward_pre_hook(WeakHook(self, "note")) for root in roots for m in _parts(root)]
        weakref.finalize(self, remove, self._handles)
        weakref.finalize(self, remove, self._of_parts)

    def arm(self) -> None:
        """Forget the last note and wait for the next first forward."""
        self.random, self._armed, self.forwards = None, True, 0

    def note_root(self, module: nn.Module, args: Any) -> None:
        """Called before a forward of a whole model, whose parts need not be listened to then."""
        if _trains(module):
            self.forwards += not self.absent
            remove(self._of_parts)
            self._of_parts.clear()
        self.note(module, args)

    def note(self, module: nn.Module, args: Any) -> None:
        """Called before a forward."""
        if self._armed and not self.absent and _trains(module):
            self.random, self._armed = random_state(self.devices), False

    def close(self) -> None:
        """Remove the hooks."""
        remove([*self._handles, *self._of_parts])


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and watching()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module; of a container that is never called, its own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child
