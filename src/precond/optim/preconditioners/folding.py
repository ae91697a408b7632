"""Running averages of what is known of the inputs of layers: of many layers at once, since each alone is a few small vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from precond.algebra.vec import Tensors
from precond.optim.blocks import State
from precond.optim.inputs import Moments
from precond.optim.inputs.moments import column, variances


@dataclass(frozen=True, eq=False)
class Fold:
    """What was seen of a layer, or of several alike, and the statistics that it is to be folded into, in place.

    Attributes:
        mine: ``count``, ``mean`` μ and ``activity`` a of groups of features, ``variance`` or ``covariance``; and where they are kept ``noise``,
            ``size`` and ``examples``.
        new: of the same groups.
        decay: ρ, or one for each layer.
    """

    mine: State
    new: Moments
    decay: float | Sequence[float]

    @property
    def spread(self) -> str:
        """What the variances are kept in."""
        return _spread(self.mine)

    @property
    def decays(self) -> list[float]:
        """ρ of each group."""
        each = self.decay if isinstance(self.decay, Sequence) else [float(self.decay)]
        return [x for x in each for _ in range(len(self.new.count) // len(each))]


@dataclass(frozen=True, eq=False)
class Features:
    """All features of some layers, one after the other, (F,), before a fold; of one alone (groups, n).

    Attributes:
        delta: μ_A − μ, of what is new and what was known.
        variance, activity: σ² and a = E|h − μ|/σ that were known.
        latest: σ_A².
        deviation: E|h − μ| of what is new.
        gain: 1 − ρ_t: a number, or one for each.
        known: where something was known before: True or False for all, or for each.
    """

    delta: Tensor
    variance: Tensor
    activity: Tensor
    latest: Tensor
    deviation: Tensor
    gain: float | Tensor
    known: bool | Tensor


def fold(folds: Sequence[Fold], active: Callable[[Features], Tensor]) -> None:
    r"""By the law of total variance, with the old μ: σ² ← ρσ² + (1−ρ)[σ_A² + ρ(μ_A − μ)²].

    ρ_t = min(ρ, 1 − N_t/ΣN): pooled at first, so that one sample does not count like many. A group that saw nothing, such as
    an expert that no token was routed to, stays as it is.

    Args:
        folds: one or more, of one dtype and device, with the same statistics.
        active: what the activities become.
    """
    mine, new = [f.mine for f in folds], [f.new for f in folds]
    of = lambda name: [m[name] for m in mine]  # noqa: E731
    before, N = _numbers(of("count")), _numbers([m.count for m in new])
    decays = [x for f in folds for x in f.decays]
    weights = [max(n / (c + n), 1 - x) if n else 0.0 for c, n, x in zip(before, N, decays, strict=True)]  # 1 − ρ_t
    # With ρ = 0 the statistics are those of the newest batch, and so is the number of samples behind them.
    counts = [n if n and not x else c + n for c, n, x in zip(before, N, decays, strict=True)]
    means = of("mean")
    each = lambda numbers: _spread_out(numbers, means)  # noqa: E731
    mean, latest = _joined(means), _joined([m.mean for m in new])
    gain, samples, known = each(weights), each([max(n, 1.0) for n in N]), each([float(c > 0) for c in before])
    seen = Features(
        delta=latest - mean,
        variance=_joined([variances(f.mine[f.spread], f.mine["mean"]) for f in folds]),
        activity=_joined(of("activity")),
        latest=_joined([m.variance for m in new]),
        deviation=_joined([m.absolute for m in new]) / samples,
        gain=gain,
        known=known > 0,
    )
    delta, between = seen.delta, each([w * (1 - w) for w in weights])
    _put(of("activity"), active(seen))
    if folds[0].spread == "variance":
        shift, share = (between * delta, 1.0) if isinstance(between, Tensor) else (delta, between)
        _put(of("variance"), seen.variance.lerp_(seen.latest, gain).addcmul_(shift, delta, value=share))
    else:
        parts = zip(folds, parted(between * delta, means), parted(delta, means), _sliced(weights, new), strict=True)
        for f, a, b, own in parts:
            f.new.fold_spread_(f.mine["covariance"], column(own, a))
            f.mine["covariance"].baddbmm_(a[..., :, None], b[..., None, :])
    # One by one: what is made of statistics is made anew where the version of μ is another, which multi-tensor operations may leave.
    mean.lerp_(latest, gain)
    for one, moved in zip(means, parted(mean, means), strict=True) if len(means) > 1 else ():
        one.copy_(moved)
    _note(of("count"), counts)
    if "noise" in mine[0]:  # 1/N of a mean with these weights
        noise = zip(_numbers(of("noise")), weights, N, strict=True)
        _note(of("noise"), [v * (1 - w) ** 2 + w**2 / max(n, 1.0) for v, w, n in noise])
    for name, what in (("size", [m.count for m in new]), ("examples", [m.examples for m in new])):
        if name in mine[0]:
            torch._foreach_copy_(of(name), what)


def activity(seen: Features) -> Tensor:
    """E|h − μ| and E(h − μ)² of all samples about the old μ, as their ratio a = E|h−μ|/σ."""
    deviation = (seen.variance.sqrt() * seen.activity).lerp_(seen.deviation, seen.gain)
    about = seen.variance.lerp(torch.addcmul(seen.latest, seen.delta, seen.delta), seen.gain)
    return deviation.mul_(about.rsqrt_()).nan_to_num_(0.0, 0.0)


def least_activity(seen: Features) -> Tensor:
    """What is new has at least this activity about its own mean, E|h − μ_A|/σ_A ≥ (E|h − μ| − |Δμ|)₊/σ_A; 0 of inputs that are constant.

    Of such inputs both are rounding: h − μ is exact to ½ε|h − μ|, its sums, and means of micro-batches of different sizes, to some ε.
    """
    least = (seen.deviation - seen.delta.abs()).clamp_min_(0).mul_(seen.latest.rsqrt()).nan_to_num_(0.0, 0.0)
    return least.masked_fill_(seen.latest.sqrt() <= 16 * torch.finfo(least.dtype).eps * seen.deviation, 0.0)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of all, (F,); one alone as it is."""
    return tensors[0] if len(tensors) == 1 else _flatten_dense_tensors(tensors)


def parted(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """The inverse: views of the shapes of others."""
    return [flat] if len(like) == 1 else _unflatten_dense_tensors(flat, like)


def _put(tensors: list[Tensor], flat: Tensor) -> None:
    """Write the entries of all; nothing where one alone was written in place."""
    if flat is not tensors[0]:
        torch._foreach_copy_(tensors, parted(flat, tensors))


def _spread_out(numbers: Sequence[float], like: Sequence[Tensor]) -> float | Tensor:
    """A number of each group, for each feature (groups, n) of it; where all are one number that number, which costs nothing."""
    if len(like) == 1 or all(x == numbers[0] for x in numbers):
        return column(numbers, like[0])
    sizes = _lengths(like)
    each = torch.tensor(numbers, dtype=like[0].dtype).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
    return each.to(like[0].device)


def _lengths(like: Sequence[Tensor]) -> list[int]:
    """How many features are in each group (groups, n)."""
    return [t.shape[-1] for t in like for _ in range(len(t))]


def _spread(mine: dict[str, Tensor]) -> str:
    """What the variances are kept in."""
    return "variance" if "variance" in mine else "covariance"


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The entries of tensors of the host."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))).tolist()


def _note(tensors: list[Tensor], numbers: Sequence[float]) -> None:
    """Write them."""
    if len(numbers) == 1:
        tensors[0].fill_(numbers[0])
    else:
        _put(tensors, torch.tensor(numbers, dtype=tensors[0].dtype))


def _sliced(numbers: Sequence[float], like: Sequence[Moments]) -> list[Sequence[float]]:
    """Those of each part's groups."""
    out, start = [], 0
    for m in like:
        out.append(numbers[start : start + len(m.count)])
        start += len(m.count)
    return out
