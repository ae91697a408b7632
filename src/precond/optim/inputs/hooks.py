"""Hooks that do not keep what they serve alive, and stay out of compiled graphs."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

_CLOSE = (
    "a precond optimizer watches this model's training forwards, which no graph can hold: call optimizer.close() first, and "
    "optimizer.watch(model) before training goes on"
)

_LEFT = "this model carries hooks of a precond optimizer that is gone or watched the original: call precond.unhook(model) first"


class WeakHook:
    """A forward hook that calls ``method`` of an object while that lives; a copied or unpickled model carries an inert one.

    Forwards out of training are let pass, and so are those that make a graph to be kept (``torch.export``, ``torch.jit.trace``): a
    hook would leave symbols in place of inputs. Under ``torch.compile`` a training forward breaks the graph here.
    """

    def __init__(self, target: Any = None, method: str = ""):
        self._target = weakref.ref(target) if target is not None else _nobody
        self._method = method
        self._outside = _outside()

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not module.training or (target := self._target()) is None:
            return
        if not torch.compiler.is_compiling():
            if not torch.jit.is_tracing():
                getattr(target, self._method)(module, *args)
        elif not torch.compiler.is_exporting():  # a traced graph would run this once and never again
            self._outside(target, self._method, module, args)

    @property
    def dead(self) -> bool:
        """Whether what it served is gone, or it came with a copy."""
        return self._target() is None

    @property
    def __name__(self) -> str:
        # What torch.jit.script asks for first; it compiles hooks from their source, and this one has none that it could.
        raise AttributeError(f"torch.jit.script: {_LEFT if self.dead else _CLOSE}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class InputHook(WeakHook):
    """One that reads what the module receives, after the hooks of others, which may change it, whenever they were put on.

    Called with args and kwargs. In a compiled graph the order is that of the first call.
    """

    _told: Any = None  # the handle of the hook that tells this one what the inputs became

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self._untold()  # of a forward that has raised, after which torch calls no hook
        if module.training and not torch.compiler.is_compiling() and self._overtaken(module):
            self._go_last(module)
        else:
            super().__call__(module, *args)

    def _untold(self) -> None:
        if self._told is not None:
            self._told.remove()
            self._told = None

    def _overtaken(self, module: nn.Module) -> bool:
        """Whether a hook that may change the inputs comes after this one."""
        for hook in reversed(module._forward_pre_hooks.values()):
            if not isinstance(hook, WeakHook):
                return any(hook is self for hook in module._forward_pre_hooks.values())
            if hook is self:
                break
        return False

    def _go_last(self, module: nn.Module) -> None:
        """From the next forward on; this one's inputs, as they have become by then, a forward hook is told."""
        hooks: OrderedDict[int, Any] = module._forward_pre_hooks  # type: ignore[assignment]
        hooks.move_to_end(next(i for i, hook in hooks.items() if hook is self))

        # Not one to be called where a forward raises: torch goes through the hooks themselves then, and none may be removed.
        self._told = module.register_forward_hook(WeakHook(self, "_tell"), with_kwargs=True, prepend=True)

    def _tell(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._untold()
        self(module, args, kwargs)


def _nobody() -> None:
    return None


def _call(target: Any, method: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    getattr(target, method)(module, *args)


@cache
def _outside() -> Callable[..., None]:
    """The same, outside of any graph; where a break is not allowed the error says what to do."""
    import torch._dynamo  # which an optimizer's constructor has imported

    return torch._dynamo.disable(_call, reason=_CLOSE)


def remove(handles: Iterable[Any]) -> None:
    """Remove hooks by their handles."""
    for handle in handles:
        handle.remove()


def unhook(model: nn.Module) -> nn.Module:
    """Remove what optimizers have left on a model: hooks of those that are gone, and those that came with a copy or a pickle.

    They do nothing. But ``torch.jit.script`` takes no model that has them, and a pickle of the whole model loads only where this library is
    installed. Hooks of optimizers that live stay: see :meth:`PreconditionedGD.close`.

    Args:
        model: any module; it is changed in place.

    Returns:
        The model.

    Example:
        >>> import copy, torch, precond
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = precond.bnp(model)
        >>> served = precond.unhook(copy.deepcopy(model))
        >>> len(served._forward_pre_hooks), len(model._forward_pre_hooks) > 0
        (0, True)
    """
    for module in model.modules():
        sweep(module)
    return model


def sweep(module: nn.Module) -> None:
    """:func:`unhook` of this module alone."""
    before, behind = module._forward_pre_hooks, module._forward_hooks
    for hooks, with_kwargs in (before, module._forward_pre_hooks_with_kwargs), (behind, module._forward_hooks_with_kwargs):
        for key in [key for key, hook in hooks.items() if isinstance(hook, WeakHook) and hook.dead]:
            del hooks[key]
            with_kwargs.pop(key, None)
