"""Statistics of several processes put together: to all that need them, or to one, a call each for all layers of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.algebra.vec import all_finite
from precond.optim.inputs.bundles import Habit, Layer, Plan
from precond.optim.inputs.moments import Moments, OfRows, Request
from precond.optim.inputs.observer import InputMoments, Key, Observer
from precond.optim.inputs.sites import Site


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


@dataclass(frozen=True)
class Heard:
    """What all ranks have seen together since the last step.

    Attributes:
        seen: the statistics that this rank needs.
        called: which layers some rank has called, with a request.
        finite: whether no rank has seen inf or NaN, as far as it looked.
    """

    seen: InputMoments
    called: frozenset[tuple[str, Request]]
    finite: bool


Owned = Mapping[Key, tuple[dist.ProcessGroup, Layer]]
"""By site name and request: the ranks that share a layer, and which of them alone needs its statistics."""


NOBODY: Owned = {}
"""Statistics that all ranks need."""


def synchronized(observer: Observer, owned: Owned = NOBODY, watch: Callable[[Moments], bool] = lambda m: False) -> Heard:
    """What all ranks have seen together, weighted by count, at each rank that needs it; layers that no rank has called are absent.

    Args:
        watch: whether a rank is to look for inf and NaN in what it has seen.
    """
    seen = observer.collect()
    keys = {
        (site.name, request): site
        for site in observer.expected
        for request in observer.requests
        if (site.name, request) in observer.wanted
    }
    out = _to_all([(site, key[1]) for key, site in keys.items() if key not in owned], seen)
    called, finite = set(out), all_finite(tuple(m.variance for m in out.values() if watch(m)))
    groups: dict[dist.ProcessGroup, dict[Key, Layer]] = {}
    for key in keys:
        if key in owned:
            groups.setdefault(owned[key][0], {})[key] = owned[key][1]
    for group, of in groups.items():
        weights = [keys[key].weight for key in of]
        dtype = torch.float64 if any([w.dtype == torch.float64 for w in weights]) else torch.float32
        like = torch.empty(0, dtype=dtype, device=weights[0].device)
        heard = _to_owners(of, seen, group, watch, like, observer.habits)
        out |= heard.seen
        called |= heard.called
        finite &= heard.finite
    return Heard(out, frozenset(called), finite)


def _to_owners(
    of: Mapping[Key, Layer],
    seen: InputMoments,
    group: dist.ProcessGroup,
    watch: Callable[[Moments], bool],
    like: Tensor,
    habits: dict[Any, Habit],
) -> Heard:
    """Statistics at their owners: how many samples each rank saw goes to all, and what it saw of them to one.

    Both go by one call where each rank sends as much as it did the last two times. What it tells all shows whether it does: where one does
    not, statistics follow by a second call.

    Args:
        like: of the dtype in which they are sent, and of the device.
        habits: what ranks have sent before, which all of them know.
    """
    me, size = dist.get_rank(group), dist.get_world_size(group)
    keys, layers = tuple(of), tuple(of.values())
    mine = [seen.get(key) for key in keys]
    good = all_finite(_bounds([m for m in mine if m is not None and watch(m)]))
    told = [_told(m, layer.groups) for m, layer in zip(mine, layers, strict=True)]
    numbers = torch.tensor([float(not good), *(x for row in told for x in row)], dtype=torch.float64)
    head = numbers.to(like.device).view(like.dtype)  # the same bits: counts are exact
    habit = habits.get((group, keys, layers))
    expected = habit.plan if habit is not None and habit.steady else Plan((), size)
    own = {i: int(rows) for i, (*counts, _, rows) in enumerate(told) if any(counts)}
    gives = expected.parts(me, mine, like) if expected.rows(me) == own else expected.nothing(me, like)
    takes = [[] if r == me else [len(head), *sizes] for r, sizes in enumerate(expected.sizes(me))]
    gives = [[] if r == me else [head, *parts] for r, parts in enumerate(gives)]
    found = _swapped(gives, takes, like, "statistics of inputs" if expected.bundles else "how many inputs it saw", group)
    heads, found = [head if r == me else parts[0] for r, parts in enumerate(found)], [parts[1:] for parts in found]
    table = torch.stack(heads).view(torch.float64).tolist()  # the host knows of how many samples statistics are
    plan = Plan.of(layers, tuple(tuple(row[1:]) for row in table))
    if not plan.as_much_as(expected):
        found = _swapped(plan.parts(me, mine, like), plan.sizes(me), like, "statistics of inputs", group)
    habits[group, keys, layers] = Habit(plan, habit is not None and plan.as_much_as(habit.plan))
    out: InputMoments = {}
    for bundle, theirs in plan.found(me, found):
        for i, m in zip(bundle.index, bundle.together(me, mine, theirs), strict=True):
            out[keys[i]] = m
    called = frozenset(keys[i] for bundle in plan.bundles for i in bundle.index)
    return Heard(out, called, not any(row[0] for row in table))


def _swapped(
    gives: Sequence[Sequence[Tensor]], takes: Sequence[Sequence[int]], like: Tensor, what: str, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """What each rank gives to this one, in parts of so many numbers."""
    every = collectives.all_to_all(gives, list(map(sum, takes)), like, what, group)
    return [list(flat.split(list(sizes))) if sizes else [] for flat, sizes in zip(every, takes, strict=True)]


def _bounds(every: Sequence[Moments]) -> tuple[Tensor, ...]:
    """What is finite only where variances are; of samples (Σ|h − c|)² ≥ Σ(h − μ)², which is at hand, and spares a pass over them."""
    sums = [m.absolute.reshape(-1) for m in every if isinstance(m, OfRows)]
    return (*(m.variance for m in every if not isinstance(m, OfRows)), *([torch.cat(sums).square_()] if sums else []))


def _told(m: Moments | None, groups: int) -> list[float]:
    """What a rank tells all of what it has seen of a layer: see :class:`~precond.optim.inputs.bundles.Plan`."""
    if m is None:
        return [0.0] * (groups + 2)
    return [*m.count.tolist(), float(m.examples), m.rows.shape[1] if isinstance(m, OfRows) else 0]


def _to_all(keys: Sequence[tuple[Site, Request]], seen: InputMoments) -> InputMoments:
    """Statistics of all ranks, the same on each."""
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
    collectives.all_reduce(flat, "statistics of inputs")
    counts, flat = flat[: len(known)].cpu(), flat[len(known) :]  # the host knows of how many samples statistics are
    out: InputMoments = {}
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
