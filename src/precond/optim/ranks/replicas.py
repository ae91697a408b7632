"""What processes that train one model together must agree on: decisions, and gradients that no wrapper reduces."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from precond.algebra import collectives

_AVAILABLE = dist.is_available()


def distributed() -> bool:
    """Whether several processes train together."""
    return started() and dist.get_world_size() > 1


def started() -> bool:
    """Whether processes may be in contact, without which no wrapper of theirs exists."""
    return _AVAILABLE and dist.is_initialized()


def agreed(good: bool, device: torch.device) -> bool:
    """Whether all processes say so: one that skipped a step alone would leave the others waiting."""
    if not distributed():
        return good
    votes = torch.tensor(float(good), device=device)
    collectives.all_reduce(votes, "whether a step is good", op=dist.ReduceOp.MIN)
    return bool(votes > 0)


def largest(number: Tensor) -> Tensor:
    """The largest that a process has, which none reads."""
    if distributed():
        collectives.all_reduce(number, "whether a step is good", op=dist.ReduceOp.MAX)
    return number


WAIT = 120.0
"""Seconds that a rank waits for the others to come to what all must call."""

_meetings: Counter[str] = Counter()


def meet(group: dist.ProcessGroup, what: str, remedy: str) -> None:
    """Wait for all ranks of a group, by the store that they met in and not by a collective, of which a rank that is alone would wait
    for as long as the group's timeout.

    Raises:
        RuntimeError: where some have not come within :data:`WAIT` seconds.
    """
    store = dist.distributed_c10d._get_default_store()
    key = f"precond/{group.group_name}/{_meetings[group.group_name]}"
    store.add(key, 1)
    end = time.monotonic() + WAIT
    while (here := store.add(key, 0)) < group.size():
        if time.monotonic() > end:
            store.add(key, -1)
            raise RuntimeError(f"{what}: {here} of {group.size()} ranks called it within {WAIT:g} s. {remedy}")
        time.sleep(0.01)
    _meetings[group.group_name] += 1


def check_joined(name: str, modules: Sequence[nn.Module]) -> None:
    """Raise RuntimeError within ``DistributedDataParallel.join()``, where ranks may stop before the others."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) and m._join_config.enable for m in modules):
        raise RuntimeError(
            f"{name}: within join() ranks stop stepping before others, who wait for what they own and see: leave join() out, and give ranks "
            "that have no data left empty batches, x[:0], with a loss that is a sum"
        )


def averaged(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """The mean over all processes, in one call, of tensors shaped ``like`` others; None where no process has one."""
    if not distributed():
        return list(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in like) else torch.float32
    present = torch.tensor([t is not None for t in tensors], dtype=wide, device=like[0].device)
    parts = [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]
    flat = torch.cat([present, *(t.detach().reshape(-1).to(wide) for t in parts)])
    collectives.all_reduce(flat, "gradients")
    present, *found = flat.split([len(parts), *(t.numel() for t in parts)])
    mean = [t.div_(dist.get_world_size()).view(x.shape).to(x.dtype) for t, x in zip(found, like, strict=True)]
    return [t if anyone else None for t, anyone in zip(mean, present.tolist(), strict=True)]
