"""Measuring without leaving a trace: modes, buffers, random numbers and contexts are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from precond.optim.inputs.watching import unwatched

Mode = Literal["eval", "train", "unchanged"]
_RECURRENT = ("_flat_weights", "_flat_weight_refs")


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model in evaluation or training mode inside, each of its modules in its own mode after."""
    before = [(module, module.training) for module in model.modules()]
    try:
        if mode != "unchanged":
            model.train(mode == "train")
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def substituted_tensors(module: nn.Module, twins: Mapping[int, Tensor]) -> Iterator[None]:
    """Parameters that have a twin replaced by it inside, and buffers by copies (of their twins), so that a forward updates copies.

    The originals are not even touched: a graph that outlives this context holds the copies. The module stays the object that it
    is, so that whatever refers to it (a penalty on its parameters) sees the twins too.

    Args:
        module: whose tensors are replaced, in all its submodules.
        twins: stand-ins, by the id of the tensor that they stand for.
    """
    copies: dict[int, Tensor] = {}
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules() if m._parameters or m._buffers]
    # A recurrent layer keeps its weights in a list of its own, and in its forward pass makes that anew where they are not those that it
    # refers to. Both are put back: the list alone would stay the old one in the next forward, the references being to the twins.
    weights = [(m, {n: vars(m).get(n) for n in _RECURRENT}) for m in module.modules() if isinstance(m, nn.RNNBase)]
    try:
        for m, parameters, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None:
                    m._buffers[name] = copies.setdefault(id(buffer), twins.get(id(buffer), buffer).detach().clone())
            for name, p in parameters.items():
                if id(p) in twins:
                    m._parameters[name] = twins[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for m, parameters, buffers in before:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
        for m, lists in weights:
            vars(m).update(lists)


@contextmanager
def forked_random(devices: Iterable[torch.device], seed: int | None) -> Iterator[None]:
    """Generators that start from ``seed`` (None: from where they are) inside, and are where they were after."""
    accelerators = {device for device in devices if device.type != "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for device in accelerators:
            stack.enter_context(torch.random.fork_rng([device.index or 0], device_type=device.type))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in accelerators:
                module = torch.get_device_module(device)
                with module.device(device):
                    module.manual_seed(seed)
        yield


def random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    """The states of the generators, to see whether a forward pass has drawn from them."""
    states = [torch.get_rng_state()]
    for device in sorted({str(device) for device in devices if device.type != "cpu"}):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


class _Elementary(TorchFunctionMode):
    """Operations of whose derivatives torch 2.13 has two that differ, made of others.

    The second derivative of g v/‖v‖, of weight normalization, is asymmetric. Rows of a table at ``padding_idx`` are constant to the
    backward pass and not to the forward one, ``scale_grad_by_freq`` makes of a gradient what is none, and ``max_norm`` writes to the table.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _MADE_OF_OTHERS.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [i for i in range(v.ndim) if dim == -1 or i != dim % v.ndim]
    return g * v / v.square().sum(axes, keepdim=True).sqrt()


def _embedding(
    index: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    rows = F.embedding(index, table, sparse=sparse)
    if max_norm is not None:  # torch writes the shorter rows into the table, and goes on from there
        shorter = rows.reshape(-1, table.shape[1]).renorm(norm_type, 0, max_norm).view_as(rows)
        rows = rows + (shorter - rows).detach()
    return rows if padding_idx is None else torch.where((index == padding_idx % len(table))[..., None], rows.detach(), rows)


_MADE_OF_OTHERS: dict[Any, Callable[..., Tensor]] = {torch._weight_norm: _weight_norm, F.embedding: _embedding}


@contextmanager
def twice_differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gradients on, and every kernel one whose backward can be differentiated, in the parameters' own precision.

    Attention runs through its mathematical kernel (the fused ones have no second derivative), recurrent layers on CUDA
    without cuDNN, and autocast is off.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Elementary())
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def isolated(
    model: nn.Module,
    mode: Mode,
    devices: Iterable[torch.device],
    seed: int | None,
    twins: Mapping[int, Tensor],
    loss: nn.Module | None,
) -> Iterator[None]:
    """All of it together, unseen by whatever observes the model's layers."""
    devices = list(devices)
    with ExitStack() as stack:
        stack.enter_context(unwatched())
        stack.enter_context(in_mode(model, mode))
        stack.enter_context(substituted_tensors(model, twins))
        if loss is not None:
            stack.enter_context(substituted_tensors(loss, twins))
        stack.enter_context(forked_random(devices, seed))
        stack.enter_context(twice_differentiable(model, devices[0]))
        yield
