"""Tensors that say ``cuda`` and compute on the CPU: control flow is a real device's, and whatever meets one is metered.

Where a program waits for a device, mixes devices or launches thousands of kernels is decided by Python, not by the device: none is
needed to see
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from device import graphs
from device.building import guard
from device.meter import METER

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Pretended(torch.Tensor):
    """A tensor that says ``cuda`` over a real one of the CPU, ``host``."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device = CUDA, requires_grad: bool = False) -> Pretended:
        device = CUDA if device.index is None else device  # the current one
        self = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, layout=real.layout,
            device=device, requires_grad=requires_grad,
        )  # fmt: skip
        self.host = real
        weakref.finalize(self, METER.release, METER.hold(real))
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.host}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied: Tensor = Pretended(self.host.clone(), self.device, self.requires_grad)
        memo[id(self)] = copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees what is made on the device out of no tensor, or of the CPU's."""

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _real(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.host
    return type(x)(map(_real, x)) if type(x) in (list, tuple) else x


def _run(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute on the CPU; what comes out says where a real device would have it."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if not any(isinstance(t, Pretended) for t in tensors) and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    if METER.count is not None:
        METER.count.add(func, args, {**kwargs, "device": asked} if asked else kwargs, tensors)
    real_kwargs = {k: _real(v) for k, v in kwargs.items()}
    if asked is not None and asked.type == "cuda":
        real_kwargs["device"] = CPU
    real_args = list(map(_real, args))
    out = func(*real_args, **real_kwargs)
    if (graph := graphs.current()) is not None:
        graph.note(func, real_args, real_kwargs, out)
    if asked is not None and asked.type != "cuda":
        return out
    device = asked or next(t.device for t in tensors if isinstance(t, Pretended))
    if isinstance(out, Tensor):
        for t in tensors:
            if _real(t) is out:
                return t
        return _say(out, device)
    return _placed(out, args, tensors, device) if isinstance(out, list | tuple) else out


def _say(x: Any, device: torch.device) -> Any:
    return Pretended(x, device) if isinstance(x, Tensor) and device.type == "cuda" and not isinstance(x, Pretended) else x


def _placed(out: Sequence[Any], args: Sequence[Any], tensors: Sequence[Tensor], device: torch.device) -> Sequence[Any]:
    """An argument that comes back is itself; a list of results is where the first list of arguments is, one by one."""
    known = {id(_real(t)): t for t in tensors}
    lists = [x for x in args if isinstance(x, list | tuple) and x and all(isinstance(t, Tensor) for t in x)]
    alongside = [t.device for t in lists[0]] if lists and len(lists[0]) == len(out) else [device] * len(out)
    return type(out)(known[id(x)] if id(x) in known else _say(x, d) for x, d in zip(out, alongside, strict=True))


def to_device(tensor: Tensor, device: torch.device | str = CUDA) -> Tensor:
    """A copy on the device that is no part of a step: nobody is charged for it."""
    device = torch.device(device)
    copied = _real(tensor.detach()).clone()
    return Pretended(copied, device) if device.type == "cuda" else copied


def on_cpu(tensor: Tensor) -> Tensor:
    """The values, for a test to look at: nobody is charged for it."""
    return _real(tensor.detach())


def move(model: nn.Module, device: torch.device | str = CUDA) -> nn.Module:
    """Parameters and buffers, put there."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(to_device(p, device), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = to_device(b, device)
    return model


_ANSWERS = {
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "device_count": lambda: 2,
    "is_current_stream_capturing": lambda: graphs.current() is not None,
    "synchronize": lambda device=None: None,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
}


@contextmanager
def pretending() -> Iterator[None]:
    """Within, ``cuda:0`` and ``cuda:1`` exist. Once a process has entered it, autograd knows them until its end.

    ``Module.to`` makes new parameters here, where a real device keeps them: call it before the optimizer is made.

    Raises:
        Unavailable: where the device guard cannot be built.
    """
    torch.ops.load_library(str(guard()))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Of a torch that was built with CUDA: its convolutions and batch normalizations would look for the library.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_Factories())
        yield
