"""Tensors of a training that are looked at beside it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from precond.optim.inputs import Moments, Request, Site, Tap, Weight, pool

_MOMENTS = Request()


def record_inputs(
    seen: dict[Site, Moments],
    site: Site,
    tap: Tap,
    weight: Weight,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A forward pre-hook: the moments of what a layer receives, where they can be read."""
    with torch.no_grad(), suppress(Exception):
        call = tap.read(args, kwargs)
        found = None if call is None else tap.moments(call, weight, _MOMENTS, None)
        if found is not None:
            seen[site] = pool([seen[site], found]) if site in seen else found


def widened_copy(t: Tensor) -> Tensor:
    """In float32 at least: what optimizers keep for 16-bit parameters."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was given, so that time is counted where it was spent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
