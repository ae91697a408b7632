"""What observe() sees of one step, by one process on all samples or by several on their shares."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.training import WRAPS, Net, batch, full
from precond.optim.inputs import observe


def step(shares: tuple[int, ...], wrap: str) -> dict[str, Any]:
    """Grams and counts by name, and G(E[hhᵀ] + I/10)⁻¹ of every weight, whole."""
    rank = dist.get_rank() if dist.is_initialized() else None
    torch.manual_seed(0)
    model: Any = Net().double()
    if rank is not None:
        model = WRAPS[wrap](model)
    x, y = batch(0, sum(shares), torch.float64)
    if rank is not None:
        x, y = x.split(list(shares))[rank], y.split(list(shares))[rank]
    inputs = observe(model)
    loss = (model(x) - y).square().sum() / sum(shares) * (1 if rank is None else dist.get_world_size())
    loss.backward()
    grams, steps = {}, {}
    for seen in inputs:
        damped = seen.gram + 0.1 * torch.eye(seen.gram.shape[-1], dtype=torch.float64)
        solved = seen.weight_of(torch.linalg.solve(seen.held(damped), seen.rows(seen.weight.grad), left=False))
        grams[seen.name] = (seen.count, seen.gram)
        steps[seen.name] = _whole(solved, seen.weight)
    return {"grams": grams, "steps": steps}


def _whole(part: Tensor, weight: Any) -> Tensor:
    """Of a part of a divided weight, all of it."""
    if not hasattr(weight, "to_local"):
        return part
    from precond.algebra.sharding import Shard

    shard = Shard.of(weight)
    assert shard is not None
    return full(shard.whole(part.contiguous()))
