"""The kernel of Adam in the coordinates of BNP and Whitening against the reference engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond import BNP, RMS, Momentum, PreconditionedGD, Whitening, adam, adamw, whitening
from precond.optim.engine.fused import Taken, _OfInner
from precond.optim.engine.kernels.adam_in_coordinates import AdamInCoordinates
from precond.optim.engine.kernels.factors import SpikedFactor, WholeFactor

ROOT = Whitening(root="cholesky", every=6, observe_steps=2)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "BNP": (BNP(), {}),
    "BNP, decay": (BNP(), {"weight_decay": 0.3}),
    "BNP, amsgrad": (BNP(), {"amsgrad": True, "betas": (0.5, 0.6)}),
    "BNP, maximize": (BNP(), {"maximize": True}),
    "BNP, width scaling": (BNP(width_scaling=True), {"weight_decay": 0.1}),
    "BNP, mini-batch, per patch entry": (BNP(decay=0.0, conv="patch"), {}),
    "whitening": (Whitening(every=6, observe_steps=2), {}),
    "whitening, decay": (Whitening(every=6), {"weight_decay": 0.3}),
    "whitening, maximize": (ROOT, {"maximize": True}),
    "whitening, amsgrad": (ROOT, {"amsgrad": True, "betas": (0.5, 0.6), "weight_decay": 0.1}),
    "whitening, mini-batch": (Whitening(0.0, every=1, shrinkage=3.0), {"eps": 1e-3}),
    "whitening of rank 2": (Whitening(every=6, observe_steps=2, rank=2), {"weight_decay": 0.3}),
    "whitening of rank 1, mini-batch": (Whitening(0.0, every=1, shrinkage=3.0, rank=1), {"eps": 1e-3}),
    "whitening of power 1/2": (Whitening(every=6, observe_steps=2, power=0.5), {"weight_decay": 0.3}),
    "whitening of rank 2 and power 1/4": (Whitening(every=6, observe_steps=2, rank=2, power=0.25), {"weight_decay": 0.3}),
    "whitening, samples": (Whitening(root="cholesky", every=4, shrinkage=10.0, samples=4.0), {"betas": (0.0, 0.9)}),
}


class Net(nn.Module):
    """Layers with one and with several groups of rows, of one and several samples an example, and a normalization."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 4, 2, bias=bias), nn.GroupNorm(2, 4)
        self.grouped = nn.Conv1d(4, 8, 2, groups=2, bias=bias)
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        self.head = nn.Linear(24, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(torch.tanh(self.norm(self.first(x)))).mT
        return self.head(torch.tanh(h + self.attention(h, h, h, need_weights=False)[0]).flatten(1))


def trained(make: Any, dtype: torch.dtype = torch.float64, bias: bool = True, steps: int = 15) -> tuple[Net, PreconditionedGD]:
    """After steps on badly scaled batches of several sizes, one among them."""
    torch.manual_seed(0)
    model = Net(bias).to(dtype)
    optimizer, generator = make(model), torch.Generator().manual_seed(1)
    scales = torch.tensor([[3.0], [1.0], [0.1]], dtype=dtype)
    for t in range(steps):
        size = (6, 1, 3)[t % 3]
        x = torch.randn(size, 3, 5, generator=generator, dtype=torch.float64).to(dtype) * scales + 2
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(0, 3, (size,), generator=generator)).backward()
        optimizer.step()
    return model, optimizer


def everything(model: nn.Module, optimizer: PreconditionedGD) -> list[Tensor]:
    """Parameters and all state."""
    return [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]


def kernels(optimizer: PreconditionedGD) -> list[Any]:
    found = optimizer._kernels()
    assert found and {type(k) for k in found} == {
        AdamInCoordinates,
        _OfInner,
    }  # the latter of what the outer map leaves as it is
    return [k for k in found if isinstance(k, AdamInCoordinates)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_takes_the_steps_of_the_reference_engine(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, averages and statistics, with triangular roots cut into panels."""
    monkeypatch.setattr("precond.optim.engine.kernels.factors._PANEL", 3)
    (inputs, options), taken, inside = CASES[name], [], AdamInCoordinates._step

    def spied(self: AdamInCoordinates, cell: Any, *rest: Any) -> None:
        taken.append(cell.block.name)
        inside(self, cell, *rest)

    monkeypatch.setattr(AdamInCoordinates, "_step", spied)
    recipe = adamw if "weight_decay" in options else adam
    ours, theirs = (
        trained(lambda m, e=engine: recipe(m, 0.01, inputs=inputs, engine=e, **options), bias=bias)
        for engine in ("fused", "loop")
    )
    assert len(kernels(ours[1])) == len(set(taken)) == 5
    assert len(taken) > 60  # in the other steps one sample was all that was seen of a layer
    torch.testing.assert_close(everything(*ours), everything(*theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fails", [False, True], ids=["", "where Cholesky fails"])
def test_panels_are_those_of_a_triangular_root(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where K has no Cholesky factor its root is symmetric, whatever was asked for."""
    monkeypatch.setattr("precond.optim.engine.kernels.factors._PANEL", 3)
    if fails:
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda K: (K, torch.ones(K.shape[:-2])))
    ours, theirs = (trained(lambda m, e=engine: whitening(m, 0.01, inputs=ROOT, engine=e)) for engine in ("fused", "loop"))
    panels = [len(k._kept._made.factors[0].panels) for k in kernels(ours[1])]
    assert panels == [1] * 5 if fails else max(panels) == 8
    torch.testing.assert_close(everything(*ours), everything(*theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("inputs", [ROOT, Whitening(every=6, observe_steps=2, rank=1)], ids=["whole", "of rank 1"])
def test_products_in_16_bits_are_near(inputs: Whitening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precond.algebra.precision.WIDE", 0)
    monkeypatch.setattr("precond.algebra.precision.multiplies_bfloat16", lambda: True)
    (narrow, optimizer), (exact, _) = (
        trained(lambda m, e=engine: whitening(m, 0.01, inputs=inputs, engine=e), torch.float32, steps=4)
        for engine in ("fused", "loop")
    )
    made = [R for k in kernels(optimizer) for R in k._kept._made.factors]
    assert {(R.R if isinstance(R, WholeFactor) else R.U).dtype for R in made} == {torch.bfloat16}
    assert any(isinstance(R, SpikedFactor) for R in made) == (inputs is not ROOT)
    for ours, theirs, before in zip(*(m.parameters() for m in (narrow, exact, trained(whitening, steps=0)[0])), strict=True):
        assert 0 < (ours - theirs).norm() <= 0.05 * (theirs - before).norm()


def test_what_it_does_not_compute_it_leaves_to_the_mathematics() -> None:
    refused = [
        (RMS(start="first_gradient"), Momentum(0.9)),
        (RMS(eps=0.0), Momentum(0.9)),
        (RMS(), Momentum(0.9, "heavy_ball")),
        (RMS(), Momentum(0.9, of="tangent")),
        (RMS(), None),
    ]
    for inner, momentum in refused:
        model = Net()
        found = PreconditionedGD(model, 0.01, preconditioner=Whitening() @ inner, momentum=momentum)._kernels()
        assert {type(k) for k in found} == {Taken}
        with pytest.raises(ValueError, match="no kernel"):
            PreconditionedGD(model, 0.01, preconditioner=Whitening() @ inner, momentum=momentum, engine="fused")
    # Rows that do not lie in memory one after the other: Adam's kernel in the coordinates of any map.
    assert None not in whitening(nn.ConvTranspose1d(3, 4, 2), engine="fused")._kernels()
