"""Statistics of several processes put together: to all that need them, or to one, a call each for all layers of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.algebra.vec import all_finite
from precond.optim.inputs.moments import Moments, OfRows, Request
from precond.optim.inputs.observer import InputMoments, Observer
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


Owned = Mapping[tuple[str, Request], tuple[dist.ProcessGroup, int]]
"""By site name and request: the ranks that share a layer, and which of them alone needs its statistics."""


NOBODY: Owned = {}
"""Statistics that all ranks need."""


def synchronized(observer: Observer, owned: Owned = NOBODY, watch: Callable[[Moments], bool] = lambda m: False) -> Heard:
    """What all ranks have seen together, weighted by count, at each rank that needs it; layers that no rank has called are absent.

    Args:
        watch: whether a rank is to look for inf and NaN in what it has seen.
    """
    seen = observer.collect()
    keys = [
        (site, request)
        for site in observer.expected
        for request in observer.requests
        if (site.name, request) in observer.wanted
    ]
    common = [(site, request) for site, request in keys if (site.name, request) not in owned]
    out = _to_all(common, seen)
    called, finite = set(out), all_finite(tuple(m.variance for m in out.values() if watch(m)))
    for group in dict.fromkeys(owned[site.name, request][0] for site, request in keys if (site.name, request) in owned):
        of = [(site, request, owned[site.name, request]) for site, request in keys if (site.name, request) in owned]
        heard = _to_owners([(s, r, owner) for s, r, (g, owner) in of if g is group], seen, group, watch)
        out |= heard.seen
        called |= heard.called
        finite &= heard.finite
    return Heard(out, frozenset(called), finite)


def _to_owners(
    keys: Sequence[tuple[Site, Request, int]], seen: InputMoments, group: dist.ProcessGroup, watch: Callable[[Moments], bool]
) -> Heard:
    """Statistics at their owners: how many samples each rank saw goes to all, and what it saw of them to one, as triangles."""
    me, size = dist.get_rank(group), dist.get_world_size(group)
    mine = [seen.get((site.name, request)) for site, request, _ in keys]
    device = keys[0][0].weight.device
    wide = any(site.weight.dtype == torch.float64 for site, _, _ in keys)
    dtype = torch.float64 if wide else torch.float32
    lengths = [site.shape(request)[0] + 2 for site, request, _ in keys]
    good = all_finite(tuple(m.variance for m in mine if m is not None and watch(m)))
    zeros = torch.zeros(max(lengths), dtype=torch.float64)
    numbers = [
        zeros[:n]
        if m is None
        else torch.cat([m.count.double(), m.examples.double()[None], zeros.new_full((1,), _sent_rows(m))])
        for m, n in zip(mine, lengths, strict=True)
    ]
    flat = torch.cat([torch.tensor([float(not good)], dtype=torch.float64), *numbers]).to(device)
    every = collectives.share([flat], [len(flat)] * size, "how many inputs it saw", group)
    every[me] = flat
    table = torch.stack(every).cpu()  # the host knows of how many samples statistics are
    told = [[_Told(t[:-2], t[-2], int(t[-1])) for t in row[1:].split(lengths)] for row in table]
    shapes = [site.shape(request) for site, request, _ in keys]
    sizes = [
        [_sizes(shape, request, t.rows) for (_, request, _), shape, t in zip(keys, shapes, row, strict=True)] for row in told
    ]
    gives = [[i for i, (_, _, owner) in enumerate(keys) if owner == r != me and mine[i] is not None] for r in range(size)]
    takes = [[i for i, (_, _, owner) in enumerate(keys) if owner == me != r and told[r][i].any] for r in range(size)]
    sent = [t.reshape(-1).to(dtype) for of in gives for i in of for t in _parts(mine[i])]
    flat = torch.cat(sent) if sent else torch.empty(0, dtype=dtype, device=device)
    received = [sum(sum(sizes[r][i]) for i in of) for r, of in enumerate(takes)]
    taken = flat.new_empty(sum(received))
    collectives.all_to_all(
        taken, flat, received, [sum(sum(sizes[me][i]) for i in of) for of in gives], "statistics of inputs", group
    )
    pieces = iter(taken.split([n for r, of in enumerate(takes) for i in of for n in sizes[r][i]]))
    found: list[list[tuple[_Told, tuple[Tensor, Tensor, Tensor]]]] = [[] for _ in keys]
    for r, of in enumerate(takes):
        for i in of:
            found[i].append((told[r][i], (next(pieces), next(pieces), next(pieces))))
    out = {}
    for i, (site, request, owner) in enumerate(keys):
        own = mine[i] if owner == me else None
        if found[i]:
            out[site.name, request] = _together(own, found[i], shapes[i], request)
        elif own is not None:
            out[site.name, request] = own
    called = {(s.name, request) for i, (s, request, _) in enumerate(keys) if any(row[i].any for row in told)}
    return Heard(out, frozenset(called), not bool(table[:, 0].any()))


@dataclass(frozen=True)
class _Told:
    """What a rank tells all of what it has seen of a layer.

    Attributes:
        count, examples: as of :class:`Moments`.
        rows: how many samples it sends in place of their covariance, which takes more room; 0 where it sends that.
    """

    count: Tensor
    examples: Tensor
    rows: int

    @property
    def any(self) -> bool:
        return bool(self.count.any())


def _sent_rows(m: Moments) -> int:
    return m.rows.shape[1] if isinstance(m, OfRows) else 0


def _sizes(shape: tuple[int, int], request: Request, rows: int) -> tuple[int, int, int]:
    """How many numbers are sent of a mean, a spread and deviations."""
    groups, n = shape
    spread = n if request.kind != "covariance" else rows * n if rows else packed_size(n)
    return groups * n, groups * spread, groups * n


def _parts(m: Moments | None) -> tuple[Tensor, ...]:
    assert m is not None
    if isinstance(m, OfRows):
        return m.mean, m.rows, m.absolute
    return m.mean, pack(m.spread) if m.spread.ndim > m.mean.ndim else m.spread, m.absolute


def _together(
    own: Moments | None, parts: Sequence[tuple[_Told, tuple[Tensor, Tensor, Tensor]]], shape: tuple[int, int], request: Request
) -> Moments:
    """What this rank and others have seen, about their common mean, in the parts' own precision: no difference of large numbers.

    Rows are put one after the other for one product, triangles are added as they came.
    """
    mine = [] if own is None else [_Told(own.count.double(), own.examples.double(), _sent_rows(own))]
    told = [*mine, *(t for t, _ in parts)]
    like = parts[0][1][0]
    counts = torch.stack([t.count for t in told])
    total, examples = counts.sum(0), sum((t.examples for t in told[1:]), told[0].examples)
    share = (counts / total.clamp_min(1)).to(like)[..., None]  # (ranks, groups, 1)
    means = torch.stack([*(() if own is None else (own.mean,)), *(t.view(shape) for _, (t, _, _) in parts)])
    mean = (share * means).sum(0)
    away = means - mean
    absolute = sum((t.view(shape) for _, (_, _, t) in parts), torch.zeros_like(mean) if own is None else own.absolute)
    spreads = [
        *(() if own is None else ((own.rows if isinstance(own, OfRows) else own.spread),)),
        *(t for _, (_, t, _) in parts),
    ]
    if request.kind != "covariance":
        spread = sum(w * (t.view(shape) + a.square()) for w, t, a in zip(share, spreads, away, strict=True))
    else:
        spread = _covariance(share, away, spreads, [t.rows for t in told], own is not None, total.to(like))
    return Moments(total.to(mean.dtype), mean, spread, absolute, examples.to(mean.dtype))


def _covariance(
    share: Tensor, away: Tensor, spreads: Sequence[Tensor], rows: Sequence[int], first: bool, total: Tensor
) -> Tensor:
    """Σ share·(spread + away awayᵀ) of ranks, of which each has sent rows or a triangle; the ``first`` one may have the matrix itself."""
    _, groups, n = away.shape
    spread = away.new_zeros(groups, n, n)
    triangles = [k for k, of in enumerate(rows) if not of and not (first and k == 0)]
    if triangles:
        one, *others = triangles
        flat = spreads[one].view(groups, -1) * share[one]
        for k in others:
            flat.addcmul_(spreads[k].view(groups, -1), share[k])
        spread = unpack(flat, n)
    if first and not rows[0]:
        spread.addcmul_(spreads[0], share[0, ..., None])
    if whole := [k for k, of in enumerate(rows) if not of]:
        spread.baddbmm_((share[whole] * away[whole]).permute(1, 2, 0), away[whole].transpose(0, 1))
    if few := [k for k, of in enumerate(rows) if of]:
        scale = total.clamp_min(1).rsqrt()[:, None, None]
        D = torch.cat([(spreads[k].view(groups, rows[k], n) + away[k, :, None]) * scale for k in few], 1)
        spread.baddbmm_(D.mT, D)
    return spread


def packed_size(n: int) -> int:
    """How many numbers of a symmetric matrix of n rows :func:`pack` keeps: n(n + 1)/2, or (n + 1)(n + 2)/2 for odd n."""
    n += n % 2
    return (n + 1) * n // 2


def pack(S: Tensor) -> Tensor:
    """Symmetric matrices (…, n, n) as (…, packed_size(n)): one triangle, folded into a rectangle.

    With n = 2k, S₁ its first k columns and S₂₂ its last block it is the (n + 1, k) matrix of tril(S₁) below and triu(S₂₂) above the
    line between them (LAPACK's rectangular full packed format).
    """
    if S.shape[-1] % 2:
        S = torch.nn.functional.pad(S, (0, 1, 0, 1))
    n, k = S.shape[-1], S.shape[-1] // 2
    R = S.new_zeros(*S.shape[:-2], n + 1, k)
    R[..., 1:, :] = S[..., :k].tril()
    R[..., :k, :] += S[..., k:, k:].triu()
    return R.flatten(-2)


def unpack(flat: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack`."""
    even = n + n % 2
    k = even // 2
    R = flat.unflatten(-1, (even + 1, k))
    S = flat.new_zeros(*flat.shape[:-1], even, even)
    S[..., :k] = R[..., 1:, :].tril()
    S[..., k:, k:] = R[..., :k, :].triu().mT
    S += S.tril(-1).mT
    return S[..., :n, :n].contiguous()


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
