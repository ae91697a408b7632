"""Statistics of several processes put together: (count, Σ, Σ²) of all layers in one call a step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from precond.inputs.moments import Moments
from precond.inputs.observer import Observer, Seen


def check_alike(observer: Observer) -> None:
    """Raise RuntimeError on every rank where ranks watch different layers: their sums would be of different things."""
    mine = [(site.name, tuple(site.weight.shape)) for site in observer.sites]
    everyone: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            odd = sorted({name for name, _ in set(theirs) ^ set(everyone[0])})
            raise RuntimeError(
                f"rank {rank} trains another model than rank 0 (layers {', '.join(odd[:3])} differ): input statistics are "
                "shared by all ranks; build the same model everywhere"
            )


def synchronized(observer: Observer) -> Seen:
    """What all ranks have seen together, the same on each, weighted by count; layers that no rank has called are absent."""
    seen = observer.collect()
    keys = [
        (site, request)
        for site in observer.expected
        for request in observer.requests
        if (site.name, request) in observer.wanted
    ]
    numbers, sums, shapes = [], [], []
    for site, request in keys:
        groups, n = site.shape(request)
        square = (groups, n, n) if request.kind == "covariance" else (groups, n)
        shapes.append(((groups, n), square, (groups, n)))
        device, found = site.weight.device, seen.get((site.name, request))
        if found is None:
            numbers += [torch.zeros(groups + 1, dtype=torch.float64)]
            sums += [torch.zeros(int(torch.Size(s).numel()), dtype=torch.float64, device=device) for s in shapes[-1]]
        else:
            count, *tensors, examples = found.raw()
            numbers += [torch.cat([count, examples[None]])]
            sums += [t.reshape(-1) for t in tensors]
    if not sums:
        return {}
    known = torch.cat(numbers).to(sums[0].device)
    flat = torch.cat([known, *sums])
    dist.all_reduce(flat)
    counts, flat = flat[: len(known)].cpu(), flat[len(known) :]  # the host knows of how many samples statistics are
    out: Seen = {}
    at = start = 0
    for (site, request), sizes in zip(keys, shapes, strict=True):
        parts = []
        for shape in sizes:
            size = int(torch.Size(shape).numel())
            parts.append(flat[start : start + size].reshape(shape))
            start += size
        groups = sizes[0][0]
        count, examples = counts[at : at + groups], counts[at + groups]
        at += groups + 1
        if count.max() > 0:
            dtype = torch.float64 if site.weight.dtype == torch.float64 else torch.float32
            out[site.name, request] = Moments.from_raw((count, *parts, examples), dtype)
    return out
