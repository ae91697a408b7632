r"""The exact diagonal of ∂²L/∂a∂aᵀ, sample by sample, in the pre-activations a of all layers of a chain, in closed form.

Behind a layer, H_h = WᵀH_aW; through an activation φ, H_a = D H_h D + diag(φ''(a)∘∂L/∂h), D = diag(φ'(a)). H is carried down as factors,
H = Σ_r w_r F_r F_rᵀ + diag(c): C of them from the loss in C outputs, n more from each curved layer of n units once its diagonal has passed
a weight. Only what a layer further down asks for is computed. Where the factors outnumber the units, H itself is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from precond.analysis.curvature.neurons.loss import LossCurvature
from precond.analysis.curvature.neurons.record import Op, Record

_BYTES = 4e6  # of the factors that are worked on at once, so that they stay in cache
_FULL = 2  # times as many factors as units: from there on H itself is cheaper to carry

Derivatives = Callable[[Op], tuple[Tensor, Tensor | None]]
"""(φ'(a), φ''(a)) of an elementwise call; None for φ'' = 0."""


def _relu(op: Op) -> tuple[Tensor, Tensor | None]:
    return (op.out > 0).to(op.out.dtype), None


def _tanh(op: Op) -> tuple[Tensor, Tensor | None]:
    d = 1 - op.out.square()
    return d, -2 * op.out * d


def _sigmoid(op: Op) -> tuple[Tensor, Tensor | None]:
    d = op.out * (1 - op.out)
    return d, d * (1 - 2 * op.out)


def _by_autograd(op: Op) -> tuple[Tensor, Tensor | None]:
    with torch.enable_grad():
        a = op.argument(0, "input").detach().requires_grad_()
        y = op.function(a, *op.args[1:], **{k: v for k, v in op.kwargs.items() if k != "input"})
        (d,) = torch.autograd.grad(y.sum(), a, create_graph=True)
        e = torch.autograd.grad(d.sum(), a, allow_unused=True)[0] if d.requires_grad else None
    return d.detach(), e


# From the result alone: these also work in place.
_FROM_RESULT: dict[Callable, Derivatives] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu_), _relu),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_), _tanh),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_), _sigmoid),
}
_ELEMENTWISE = (
    F.gelu, F.silu, F.softplus, F.elu, F.celu, F.selu, F.mish, F.logsigmoid, F.softsign, F.leaky_relu, F.hardtanh, F.relu6,
    F.hardsigmoid, F.hardswish, F.tanhshrink, F.softshrink, F.hardshrink, torch.selu, torch.celu, torch.sin, torch.cos, torch.exp,
    torch.square, torch.erf, Tensor.sin, Tensor.cos, Tensor.exp, Tensor.square,
)  # fmt: skip
_SHAPES = (
    torch.flatten,
    Tensor.flatten,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.contiguous,
    torch.squeeze,
    Tensor.squeeze,
)


@dataclass(frozen=True)
class Linear:
    """a = hWᵀ + b.

    Attributes:
        weight: W.
        name: of the layer.
        input: h.
    """

    weight: Tensor
    name: str
    input: Tensor


@dataclass(frozen=True)
class Elementwise:
    """h = φ(a).

    Attributes:
        slope: φ'(a), (N, n), or one for all samples, (n,).
        curvature: φ''(a), (N, n), or None.
    """

    slope: Tensor
    curvature: Tensor | None


def chain(record: Record, outputs: Tensor, names: Mapping[int, str]) -> list[Linear | Elementwise]:
    """What leads to the outputs, from the last step back to the first that is none of those above, or read by anything else.

    Args:
        record: of the forward pass and the loss.
        outputs: of the model.
        names: of the layers, by the identity of their weights.
    """
    steps: list[Linear | Elementwise] = []
    uses = [id(t) for op in record.ops for t in op.inputs]
    x, before = outputs, len(record.ops)
    while (i := record.producer(x, before)) is not None:
        op = record.ops[i]
        if x is not outputs and len(record.readers(i)) != 1:
            break
        h = op.argument(0, "input")
        if not isinstance(h, Tensor) or h.ndim != 2 or op.out.ndim != 2:
            break
        step = _step(op, h, names)
        if step is None or (isinstance(step, Linear) and uses.count(id(step.weight)) != 1):
            break
        steps += [] if step is True else [step]
        x, before = h, i
    return steps


def _step(op: Op, h: Tensor, names: Mapping[int, str]) -> Linear | Elementwise | Literal[True] | None:
    """The step that a call is; True: none that changes anything; None: not one of a chain."""
    rest = [t for t in op.inputs if t is not h]
    if op.function is F.linear:
        weight = op.argument(1, "weight")
        return Linear(weight, names[id(weight)], h) if id(weight) in names else None
    if op.function is F.batch_norm:
        mean, variance, gamma = (op.argument(k, n) for k, n in ((1, "running_mean"), (2, "running_var"), (3, "weight")))
        if op.argument(5, "training", False) or mean is None:
            return None
        slope = (variance + op.argument(7, "eps", 1e-5)).rsqrt()
        return Elementwise(slope if gamma is None else slope * gamma, None)
    if rest:
        return None
    if op.function in _FROM_RESULT:
        return Elementwise(*_FROM_RESULT[op.function](op))
    if op.function in _ELEMENTWISE and op.out is not h:
        return Elementwise(*_by_autograd(op))
    same = op.function in _SHAPES or (op.function is F.dropout and not op.argument(2, "training", True))
    return True if same and op.out.shape == h.shape else None


def diagonals(steps: Sequence[Linear | Elementwise], loss: LossCurvature, wanted: Collection[str]) -> dict[str, Tensor]:
    """∂²L/∂a_ij² of the layers wanted, (N, units) each."""
    end = max((k for k, step in enumerate(steps) if isinstance(step, Linear) and step.name in wanted), default=-1)
    steps = steps[: end + 1]
    last = max((k for k, step in enumerate(steps[:-1]) if isinstance(step, Linear)), default=-1)
    chunk = max(1, int(_BYTES / (loss.gradient.element_size() * _largest(steps, last, loss.gradient.shape[1]))))
    out: dict[str, list[Tensor]] = {}
    for start in range(0, len(loss.gradient), chunk):
        part = slice(start, start + chunk)
        carried = _Carried(loss, part)
        for k, step in enumerate(steps):
            if isinstance(step, Elementwise):
                carried.through_activation(step, part)
                continue
            if step.name in wanted:
                out.setdefault(step.name, []).append(carried.diagonal())
            if k < end:
                carried.through_weight(step.weight, only_diagonal=k == last)
    return {name: torch.cat(parts) for name, parts in out.items()}


def _largest(steps: Sequence[Linear | Elementwise], last: int, outputs: int) -> int:
    """The largest number of entries that are carried per sample."""
    columns, largest, curved = outputs, outputs, False
    for k, step in enumerate(steps):
        if isinstance(step, Elementwise):
            curved = step.curvature is not None
            continue
        out, n = step.weight.shape
        largest = max(largest, columns * out)
        if k <= last:
            largest = max(largest, columns * n)
            columns, curved = min(columns + curved * out * (k < last), _FULL * n), False
    return largest


class _Carried:
    """H = Σ_r w_r F_r F_rᵀ + diag(c) of some samples at one place of the chain, or H itself, and the gradient.

    Attributes:
        gradient: ∂L/∂x, (N, n).
        factors: (F, w) with F of shape (r, N, n), or (r, 1, n) where it is the same for all samples; w (r, N), None for ones.
        c: (N, n); None for zeros.
        full: the rest of H beside diag(c), (N, n, n), in place of the factors; None: factors.
    """

    def __init__(self, loss: LossCurvature, part: slice):
        self.gradient = loss.gradient[part]
        self.factors: list[tuple[Tensor, Tensor | None]] = []
        self.full: Tensor | None = None
        self.c = None if loss.c is None else loss.c[part]
        if loss.factors is not None:
            F_, w = loss.factors
            self.factors.append((F_[:, part], None if w is None else w[:, part]))

    def diagonal(self) -> Tensor:
        """Of H."""
        total = torch.zeros_like(self.gradient) if self.c is None else self.c.clone()
        if self.full is not None:
            total += self.full.diagonal(dim1=1, dim2=2)
        for F_, w in self.factors:
            if w is not None and F_.shape[1] == 1:
                total.addmm_(w.T, F_[:, 0].square())
                continue
            # Row by row, in cache: squares of all of F would be another pass through memory.
            for r, row in enumerate(F_):
                total.addcmul_(row if w is None else row * w[r, :, None], row)
        return total

    def through_weight(self, W: Tensor, only_diagonal: bool) -> None:
        """H ← WᵀHW, g ← Wᵀg; of H only the diagonal, where no other weight follows."""
        self.gradient = self.gradient @ W
        self.factors = [(F_ @ W, w) for F_, w in self.factors]
        if self.c is not None:
            self.factors.append((W[:, None], self.c.T))
            self.c = None
        HW = None if self.full is None else self.full @ W
        if not only_diagonal:
            self.full = None if HW is None else HW.mT @ W  # H is symmetric
            return
        self.full = None
        self.c, self.factors = self.diagonal(), []
        if HW is not None:
            self.c += (HW * W).sum(1)

    def through_activation(self, step: Elementwise, part: slice) -> None:
        """H ← DHD + diag(φ''∘g), g ← Dg."""
        d = step.slope if step.slope.ndim == 1 else step.slope[part]
        self.c = None if self.c is None else self.c * d.square()
        self.factors = [(F_ * d, w) for F_, w in self.factors]
        if self.full is not None:
            self.full = self.full * d[..., :, None] * d[..., None, :]
        if step.curvature is not None:
            bend = step.curvature[part] * self.gradient
            self.c = bend if self.c is None else self.c + bend
        self.gradient = self.gradient * d
        if sum(len(F_) for F_, _ in self.factors) > _FULL * d.shape[-1]:
            for F_, w in self.factors:
                rows = F_.permute(1, 2, 0)
                H = (rows if w is None else rows * w.T[:, None]) @ rows.mT
                self.full = H if self.full is None else self.full + H
            self.factors = []
