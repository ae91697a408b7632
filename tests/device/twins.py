"""A model on the pretended device, and its twin on the CPU that makes the gradients, over the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from device.pretended import CUDA, Pretended, move, on_cpu, to_device

Loss = Callable[[nn.Module, Any], Tensor]


class Twins:
    """``model`` is put on the device; hooks see its forwards."""

    def __init__(self, model: nn.Module, device: torch.device | str = CUDA):
        self.twin, self.model = copy.deepcopy(model), move(model, device)

    def backward(self, loss_of: Loss, batch: Sequence[Tensor]) -> Tensor:
        """Add the gradient of the loss to ``.grad``, as ``loss_of(model, batch).backward()`` does; the loss, on the device."""
        before = torch.get_rng_state()
        loss = loss_of(self.model, [to_device(x) for x in batch])
        after = torch.get_rng_state()
        params = list(self.model.parameters())
        for ours, theirs in zip(params, self.twin.parameters(), strict=True):
            theirs.data = on_cpu(ours)
        torch.set_rng_state(before)
        found = torch.autograd.grad(loss_of(self.twin, batch), list(self.twin.parameters()))
        torch.set_rng_state(after)
        for p, g in zip(params, found, strict=True):
            if p.requires_grad:
                g = Pretended(g, p.device) if p.device.type == "cuda" else g
                p.grad = g if p.grad is None else p.grad + g
        return loss.detach()
