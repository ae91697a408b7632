"""Measuring without leaving a trace: modes, buffers, random numbers and contexts are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from precond.observing import unwatched

Mode = Literal["eval", "train", "unchanged"]


@contextmanager
def moded(model: nn.Module, mode: Mode) -> Iterator[None]:
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
def lent_buffers(model: nn.Module) -> Iterator[None]:
    """Copies of the buffers in their places inside, so that a forward pass updates the copies.

    The originals are not even touched: a graph that outlives this context holds the copies.
    """
    copies: dict[int, Tensor] = {}
    before = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        for module, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, buffers in before:
            module._buffers.update(buffers)


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
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def isolated(model: nn.Module, mode: Mode, devices: Iterable[torch.device], seed: int | None) -> Iterator[None]:
    """All of it together, unseen by whatever observes the model's layers."""
    devices = list(devices)
    with ExitStack() as stack:
        stack.enter_context(unwatched())
        stack.enter_context(moded(model, mode))
        stack.enter_context(lent_buffers(model))
        stack.enter_context(forked_random(devices, seed))
        stack.enter_context(twice_differentiable(model, devices[0]))
        yield
