"""P of other libraries' optimizers against their own steps: with no momentum, p − p⁺ = α P Pᵀg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond.algebra.maps.tucker import Tucker
from precond.analysis.curvature import Objective, condition_number, gauss_newton

torch.set_num_threads(1)
LR = 0.01
SHAPES = [(4, 3), (3,), (2, 3, 2, 2)]
MATRICES = [(4, 3), (3, 5)]


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install {name.replace('_', '-')})")


def gradients(shapes, step: int, dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(step)
    scales = [
        torch.logspace(-1, 1, *s[:1] or (1,), dtype=torch.float64).reshape([-1, *[1] * (len(s) - 1)] if s else [])
        for s in shapes
    ]
    return [(torch.randn(s, generator=make, dtype=torch.float64) * c).to(dtype) for s, c in zip(shapes, scales, strict=True)]


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes, steps: int, dtype: torch.dtype, of: str = "p"):
    """(p − p⁺)/α of the last of some steps, its gradient, and the optimizer after it."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    place = lambda p: (p if of == "p" else optimizer.state[p][of]).detach().clone()  # noqa: E731
    with torch.compiler.set_stance("force_eager"):
        for step in range(steps):
            g = gradients(shapes, step, dtype)
            for p, grad in zip(params, g, strict=True):
                p.grad = grad.clone()
            before = [place(p) for p in params] if step == steps - 1 else []
            optimizer.step()
    return params, optimizer, g, [(b - place(p)) / LR for b, p in zip(before, params, strict=True)]


def check(make, shapes=SHAPES, steps: int = 4, dtype=torch.float64, of: str = "p", rtol: float = 1e-9) -> None:
    params, optimizer, g, moved = run(make, shapes, steps, dtype, of)
    P = precond.preconditioner_of(optimizer, params)
    for ours, theirs in zip(P.gram(tuple(g)), moved, strict=True):
        # Differences of parameters lose what their size is over the step's: some 100 roundings.
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


PYTORCH_OPTIMIZER: dict[str, dict[str, Any]] = {
    "Yogi": {"betas": (0.0, 0.9)},
    "Adan": {"betas": (0.0, 0.0, 0.9)},
    "AdEMAMix": {"betas": (0.0, 0.9, 0.99), "alpha": 0.0},
    "Lamb": {"betas": (0.0, 0.9), "max_grad_norm": 0.0},
    "SOAP": {"betas": (0.0, 0.9), "weight_decay": 0.0, "precondition_frequency": 100},
    "SOAP, merged": {"betas": (0.0, 0.9), "weight_decay": 0.0, "precondition_frequency": 100, "merge_dims": True, "max_precondition_dim": 8},
    "SOAP, some sides": {"betas": (0.0, 0.9), "weight_decay": 0.0, "precondition_frequency": 100, "max_precondition_dim": 3},
    "Shampoo": {},
}  # fmt: skip


@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_pytorch_optimizer(name):
    cls = getattr(library("pytorch_optimizer"), name.partition(",")[0])
    # Lamb divides by a norm that holds its own step, and the ends of Shampoo's fourth roots are computed by another decomposition.
    shapes = [SHAPES[0], SHAPES[2]] if "merged" in name else SHAPES  # it does not merge those of vectors
    check(
        lambda params: cls(params, lr=LR, **PYTORCH_OPTIMIZER[name]), shapes, rtol=1e-6 if name in ("Lamb", "Shampoo") else 1e-9
    )


def test_kron_but_for_its_bound():
    """Which is on the root mean square of a tensor's step."""
    cls = library("pytorch_optimizer").Kron
    params, optimizer, g, moved = run(
        lambda params: cls(params, lr=LR, momentum=0.0, precondition_dtype=torch.float64), SHAPES, 4, torch.float64
    )
    for ours, theirs in zip(precond.preconditioner_of(optimizer, params).gram(tuple(g)), moved, strict=True):
        bounded = ours * (1.1 / (ours.square().mean().sqrt() + 1e-6)).clamp(max=1.0)
        torch.testing.assert_close(bounded, theirs, rtol=1e-9, atol=1e-9)


def test_adabelief_by_its_own_mean():
    cls = library("pytorch_optimizer").AdaBelief
    params, optimizer, _, moved = run(lambda params: cls(params, lr=LR, betas=(0.8, 0.9)), SHAPES, 4, torch.float64)
    mean = tuple(optimizer.state[p]["exp_avg"] / (1 - 0.8**4) for p in params)
    for ours, theirs in zip(precond.preconditioner_of(optimizer, params).gram(mean), moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_adopt_s_next_step():
    cls = library("pytorch_optimizer").ADOPT
    params, optimizer, _, _ = run(
        lambda params: cls(params, lr=LR, betas=(0.0, 0.9), clip_lambda=None), SHAPES, 4, torch.float64
    )
    P, g, before = (
        precond.preconditioner_of(optimizer, params),
        gradients(SHAPES, 9, torch.float64),
        [p.detach().clone() for p in params],
    )
    for p, grad in zip(params, g, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    for ours, b, p in zip(P.gram(tuple(g)), before, params, strict=True):
        torch.testing.assert_close(ours, (b - p.detach()) / LR, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree.SGDScheduleFree",
                                  "pytorch_optimizer.ScheduleFreeAdamW", "pytorch_optimizer.ScheduleFreeSGD"])  # fmt: skip
@pytest.mark.parametrize("foreach", [False, True])
def test_the_step_of_z_of_schedule_free_optimizers(name, foreach):
    package, _, cls = name.partition(".")
    options = {} if "SGD" in name else {"betas": (0.9, 0.8)}
    make = lambda params: getattr(library(package), cls)(params, lr=LR, foreach=foreach, **options)  # noqa: E731
    if "RAdam" in name:  # the rectification multiplies the learning rate
        params, optimizer, g, moved = run(make, SHAPES, 12, torch.float64, "z")
        rate = optimizer.param_groups[0]["scheduled_lr"] / LR
        assert 0 < rate < 1
        for ours, theirs in zip(precond.preconditioner_of(optimizer, params).gram(tuple(g)), moved, strict=True):
            torch.testing.assert_close(rate * ours, theirs, rtol=1e-9, atol=1e-9)
    else:
        check(make, of="z")


HEAVYBALL: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": (0.0, 0.9)},
    "RMSprop": {"betas": (0.0, 0.9)},
    "SOAP": {"betas": (0.0, 0.9), "weight_decay": 0.0, "precondition_frequency": 1000},
    "PSGDKron": {"betas": (0.0, 0.9), "exp_avg_input": False, "update_clipping": None},
    "PSGDKron, not as lines": {
        "betas": (0.0, 0.9),
        "exp_avg_input": False,
        "update_clipping": None,
        "store_triu_as_line": False,
    },
}


@pytest.mark.parametrize("name", HEAVYBALL)
def test_heavyball(name):
    cls = getattr(library("heavyball"), name.partition(",")[0])
    # It computes in float32; differences of parameters lose two digits more.
    shapes = MATRICES if "PSGD" in name else SHAPES
    check(lambda params: cls(params, lr=LR, **HEAVYBALL[name]), shapes, dtype=torch.float32, rtol=3e-4)


@pytest.mark.parametrize("package", ["pytorch_optimizer", "heavyball"])
def test_muon_is_near_the_polar_factor(package):
    """Newton and Schulz's five steps leave singular values between 0.7 and 1.2."""
    cls = library(package).Muon
    if package == "heavyball":
        make = lambda params: cls(params, lr=LR, betas=(0.0, 0.9), nesterov=False)  # noqa: E731
    else:
        make = lambda params: cls([{"params": params, "use_muon": True, "lr": LR}], momentum=0.0, nesterov=False)  # noqa: E731
    params, optimizer, g, moved = run(make, MATRICES, 3, torch.float32)
    P = precond.preconditioner_of(optimizer, params)
    for ours, theirs in zip(P.gram(tuple(g)), moved, strict=True):
        assert 0.6 < float(theirs.norm() / ours.norm()) < 1.3
        assert float((ours * theirs).sum() / ours.norm() / theirs.norm()) > 0.95


@pytest.mark.parametrize(("package", "name"), [("pytorch_optimizer", "SOAP"), ("schedulefree", "AdamWScheduleFree")])
def test_kappa_is_told(package, name):
    cls = getattr(library(package), name)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(40, 3).double() * torch.tensor([0.01, 1.0, 100.0]).double(), torch.randn(40, 2).double()
    objective = Objective(model, nn.functional.mse_loss, [(x, y)])
    optimizer = cls(model.parameters(), lr=1e-3)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    P, G = precond.preconditioner_of(optimizer, objective), gauss_newton(objective)
    before, after = condition_number(G).kappa, condition_number(P.T @ G @ P).kappa
    assert before > 1e7 and after < before / 100


# Without any of the libraries.


def pretend(package: str, name: str, state: dict[str, Any], **options: Any) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of a class of that name, with some state."""
    cls = type(name, (torch.optim.Optimizer,), {"__module__": f"{package}.optimizer.any"})
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = cls([p], {"lr": 0.1, **options})
    optimizer.state[p].update(state)
    return optimizer, p


def test_a_version_that_looks_otherwise_is_named():
    optimizer, _ = pretend("schedulefree", "AdamWScheduleFree", {"z": torch.ones(2, 2)}, betas=(0.9, 0.99), eps=0.0, k=1)
    with pytest.raises(
        TypeError, match=r"schedulefree\.optimizer\.any\.AdamWScheduleFree has no 'exp_avg_sq' in its groups or its state \(z\)"
    ):
        precond.preconditioner_of(optimizer)
    optimizer, _ = pretend("heavyball", "AdamW", {0: {"exp_avg_sq": torch.ones(2, 2)}}, eps=0.0)
    with pytest.raises(TypeError, match="it is of another version than is known"):
        precond.preconditioner_of(optimizer)


def test_an_option_whose_step_is_no_linear_map_is_named():
    optimizer, _ = pretend("pytorch_optimizer", "SOAP", {"Q": None}, normalize_gradient=True)
    with pytest.raises(TypeError, match="with normalize_gradient=True the step is not known"):
        precond.preconditioner_of(optimizer)


def test_a_class_of_another_package_is_not_taken_for_it():
    optimizer, _ = pretend("somebody", "SOAP", {"Q": None})
    with pytest.raises(TypeError, match="P of SOAP is not known"):
        precond.preconditioner_of(optimizer)


def test_a_class_by_its_name():
    @precond.analysis.diagnostics.register("mine.SignSGD", stateless=True)
    def _(param, state, group):
        return precond.InverseRoot((param.grad.abs(),))

    optimizer, p = pretend("mine", "SignSGD", {})
    p.grad = torch.tensor([[4.0, -1.0], [0.25, 1.0]])
    assert torch.equal(precond.preconditioner_of(optimizer).gram((p.grad,))[0], p.grad.sign())


def test_a_matrix_for_each_dimension():
    torch.manual_seed(0)
    A, d, C, W = (
        torch.randn(2, 2).double(),
        torch.randn(3).double(),
        torch.randn(5, 5).double(),
        torch.randn(2, 3, 4, 5).double(),
    )
    P = Tucker([A, d, None, C], (W,))
    want = torch.einsum("ai,b,cj,ibdj->abdc", A, d, C, W)
    torch.testing.assert_close(P.mv((W,))[0], want)
    torch.testing.assert_close(P.solve(P.mv((W,)))[0], W)
    torch.testing.assert_close(P.rsolve(P.rmv((W,)))[0], W)
    V = torch.randn_like(W)
    torch.testing.assert_close((P.mv((W,))[0] * V).sum(), (W * P.rmv((V,))[0]).sum())
    dense = Tucker([A, d], (W[:, :, 0, 0],)).to_dense()
    torch.testing.assert_close(dense, torch.kron(A, torch.diag(d)))
