"""P of every optimizer against the steps that the optimizer takes, and against explicit formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import precond
from precond import BNP, RMS, PreconditionedGD
from precond.algebra import vec
from precond.analysis.curvature import Objective, eigenvalues, hessian, in_float64
from precond.analysis.diagnostics import preconditioner_of, register, step_size


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x, y = torch.randn(20, 3, dtype=dtype) * torch.tensor([1.0, 5.0, 0.2], dtype=dtype) + 1, torch.randn(20, 2, dtype=dtype)
    return model, Objective(model, nn.functional.mse_loss, [(x, y)])


def train(objective, optimizer, steps=7):
    for _ in range(steps):
        optimizer.zero_grad()
        for p, g in zip(objective.params, objective.gradient(), strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


# Without momentum the next step is −lr·M g: each class with the options under which it has none.
WITHOUT_MOMENTUM = {
    "SGD": (torch.optim.SGD, {}),
    "Adam": (torch.optim.Adam, {"betas": (0.0, 0.9), "eps": 1e-3}),
    "Adam, amsgrad": (torch.optim.Adam, {"betas": (0.0, 0.5), "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.0, 0.99), "weight_decay": 0.0}),
    "RAdam, first steps": (torch.optim.RAdam, {"betas": (0.0, 0.999)}),
    "RAdam": (torch.optim.RAdam, {"betas": (0.0, 0.7), "eps": 1e-2}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.0, 0.9), "eps": 1e-3}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-3}),
    "RMSprop, centered": (torch.optim.RMSprop, {"alpha": 0.9, "centered": True, "eps": 1e-3}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.3, "eps": 1e-3, "initial_accumulator_value": 0.1}),
    "precond.adam": (precond.adam, {"betas": (0.0, 0.9)}),
    "precond.rmsprop": (precond.rmsprop, {"alpha": 0.9}),
    "precond.adagrad": (precond.adagrad, {"lr_decay": 0.2}),
    "precond.sgd": (precond.sgd, {}),
}


@pytest.mark.parametrize("case", WITHOUT_MOMENTUM)
def test_the_step_is_m_times_the_gradient(case):
    cls, options = WITHOUT_MOMENTUM[case]
    model, objective = problem()
    optimizer = train(objective, cls(model.parameters(), lr=0.01, **options))
    before = [p.detach().clone() for p in objective.params]
    g = objective.gradient()
    train(objective, optimizer, 1)
    Mg = preconditioner_of(optimizer, objective).gram(g)  # P after the step is the one that the step has used
    for p, q, d in zip(objective.params, before, Mg, strict=True):
        torch.testing.assert_close(p - q, -0.01 * d, rtol=1e-9, atol=1e-14)


def test_adadelta_is_the_m_that_the_next_step_begins_with():
    model, objective = problem()
    optimizer = train(objective, torch.optim.Adadelta(model.parameters(), lr=1.0))
    p = objective.params[0]
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    d = preconditioner_of(optimizer, [p]).to_dense().diagonal() ** 2
    expected = ((state["acc_delta"] + 1e-6) / (state["square_avg"] + 1e-6)).sqrt()
    torch.testing.assert_close(d, expected.flatten())


def test_nadam():
    model, objective = problem()
    optimizer = train(objective, torch.optim.NAdam(model.parameters(), betas=(0.9, 0.95), eps=1e-4), 5)
    p = objective.params[0]
    d = 1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**5)).sqrt() + 1e-4)
    torch.testing.assert_close(preconditioner_of(optimizer, [p]).to_dense().diagonal() ** 2, d.flatten())


@pytest.mark.parametrize(
    ("shape", "adjust"), [((4, 6), None), ((6, 4), None), ((6, 4), "match_rms_adamw"), ((4, 6), "match_rms_adamw")]
)
def test_muon_takes_the_polar_factor(shape, adjust):
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Muon([p], lr=0.1, nesterov=False, weight_decay=0.0, momentum=0.9, adjust_lr_fn=adjust)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(shape)
        optimizer.step()
    m = optimizer.state[p]["momentum_buffer"]
    U, _, Vh = torch.linalg.svd(m, full_matrices=False)
    s = max(1, shape[0] / shape[1]) ** 0.5 if adjust is None else 0.2 * max(shape) ** 0.5
    (Mm,) = preconditioner_of(optimizer).gram((m,))
    torch.testing.assert_close(Mm, s * U @ Vh, rtol=1e-4, atol=1e-4)
    # Newton and Schulz's iteration is only near it: singular values of 0.7 to 1.2.
    ratio = torch.linalg.svdvals(p.detach() - before) / (0.1 * s)
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 1.4


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda model: precond.adamw(model, lr=0.01),
        lambda model: PreconditionedGD(model, lr=0.01, preconditioner=BNP() @ RMS()),
        lambda model: precond.adam(model, lr=0.01, inputs=precond.Whitening()),
    ],
    ids=["torch Adam", "adamw", "BNP∘RMS", "whitening∘adam"],
)
def test_hessian_in_z_is_one_expression(make):
    model, objective = problem()
    optimizer = make(model)
    x, y = objective.batches[0]
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    P = preconditioner_of(optimizer, objective)
    found = eigenvalues(P.T @ hessian(objective) @ P, 2).values

    flat = torch.nn.utils.parameters_to_vector(objective.params).detach()
    names, shapes = objective.names, [p.shape for p in objective.params]

    def loss(v):
        parts = [t.reshape(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
        return nn.functional.mse_loss(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    H = torch.autograd.functional.hessian(loss, flat)
    dense = torch.linalg.eigvalsh(P.to_dense().T @ H @ P.to_dense())
    torch.testing.assert_close(found, dense.flip(0)[:2], rtol=1e-6, atol=0)


def test_groups_with_other_learning_rates_and_another_order():
    model, objective = problem()
    groups = [
        {"params": [model[2].weight, model[0].bias], "lr": 0.01},
        {"params": [model[2].bias, model[0].weight], "lr": 0.04},
    ]
    optimizer = train(objective, torch.optim.Adam(groups, betas=(0.0, 0.9)))
    assert step_size(optimizer, objective) == 0.04
    before = [p.detach().clone() for p in objective.params]
    g = objective.gradient()
    train(objective, optimizer, 1)
    Mg = preconditioner_of(optimizer, objective).gram(g)
    for p, q, d in zip(objective.params, before, Mg, strict=True):
        torch.testing.assert_close(p - q, -0.04 * d, rtol=1e-9, atol=1e-14)
    # Of a part of the parameters α is the largest among them.
    assert step_size(optimizer, [model[0].bias]) == 0.01
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert preconditioner_of(optimizer, objective).to_dense().isfinite().all()


def test_rates_of_groups_in_blocks_of_ours():
    model, objective = problem()
    groups = [{"params": model[0], "lr": 0.01}, {"params": model[2], "lr": 0.02}]
    optimizer = train(objective, PreconditionedGD(groups, preconditioner=RMS()))
    plain, P = optimizer.map(objective.params).to_dense(), preconditioner_of(optimizer, objective).to_dense()
    ratio = (P.diagonal() / plain.diagonal()).square()
    torch.testing.assert_close(ratio, torch.tensor([0.5] * 16 + [1.0] * 10, dtype=torch.float64))


def test_in_float64():
    model, objective = problem(torch.float32)
    for optimizer in (torch.optim.Adam(model.parameters()), precond.adam(model, inputs=precond.Whitening())):
        x, y = objective.batches[0]
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        P = preconditioner_of(optimizer, objective)
        dense = in_float64(P).to_dense()
        torch.testing.assert_close(dense.float(), P.to_dense(), rtol=1e-5, atol=1e-5)
        A = in_float64(P.T @ hessian(objective) @ P).to_dense()
        torch.testing.assert_close(A, dense.T @ hessian(objective.double()).to_dense() @ dense, rtol=1e-9, atol=1e-9)


def test_before_the_first_step():
    model, objective = problem()
    assert preconditioner_of(torch.optim.SGD(model.parameters(), lr=0.1)).to_dense().equal(torch.eye(26, dtype=torch.float64))
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.Adagrad(model.parameters())):
        with pytest.raises(RuntimeError, match=r"0\.weight yet.*take a step"):
            preconditioner_of(optimizer, objective)
    with pytest.raises(RuntimeError, match="take a step"):
        preconditioner_of(precond.adam(model), objective)


def test_frozen_parameters_and_parts():
    model, _ = problem()
    model[0].bias.requires_grad_(False)
    objective = Objective(model, nn.functional.mse_loss, [(torch.randn(5, 3).double(), torch.randn(5, 2).double())])
    optimizer = train(objective, torch.optim.Adam(model.parameters()))
    assert preconditioner_of(optimizer).to_dense().equal(preconditioner_of(optimizer, objective).to_dense())
    assert preconditioner_of(optimizer, [model[0].bias]).to_dense().equal(torch.eye(4, dtype=torch.float64))
    part = Objective(model, objective.loss_fn, objective.batches, params="2.*")
    assert preconditioner_of(optimizer, part).to_dense().shape == (10, 10)


def test_bfloat16_state_is_widened():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    r = optimizer.state[p]["exp_avg_sq"].float() / (1 - 0.999)
    torch.testing.assert_close(preconditioner_of(optimizer).d[0], (r.sqrt() + 1e-8).rsqrt())


def test_unknown_optimizers_and_parameters():
    model, objective = problem()
    with pytest.raises(TypeError, match=r"P of Rprop is not known .*register\(Rprop\)"):
        preconditioner_of(torch.optim.Rprop(model.parameters()), objective)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Linear"):
        preconditioner_of(nn.Linear(1, 1))

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

    with pytest.raises(TypeError, match=r"optimizer\.optimizer"):
        preconditioner_of(Wrapper(torch.optim.SGD(model.parameters())), objective)
    with pytest.raises(ValueError, match=r"0\.weight is not a parameter of this optimizer \(4 of 4"):
        preconditioner_of(torch.optim.SGD(copy.deepcopy(model).parameters()), objective)


def test_a_subclass_has_the_map_of_its_base_until_it_states_its_own():
    class Mine(torch.optim.SGD):
        pass

    p = nn.Parameter(torch.ones(2))
    assert preconditioner_of(Mine([p], lr=1.0)).to_dense().equal(torch.eye(2))
    register(Mine, stateless=True)(lambda param, state, group: precond.Diagonal((torch.full_like(param, 3.0).detach(),)))
    assert preconditioner_of(Mine([p], lr=1.0)).to_dense().equal(3 * torch.eye(2))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Muon([p], lr=0.1, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        lambda p: PreconditionedGD([p], lr=0.1, preconditioner=precond.Schatten(0.5)),
        lambda p: PreconditionedGD([p], lr=0.1, preconditioner=precond.Muon(root="eigh")),
    ],
    ids=["torch Muon", "Schatten", "Muon"],
)
def test_of_a_singular_p_what_is_solved_is_the_pseudo_inverse(make, shape):
    torch.manual_seed(3)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = make(p)
    p.grad = torch.randn(shape[0], 2).double() @ torch.randn(2, shape[1]).double()  # of rank 2
    optimizer.step()
    P = preconditioner_of(optimizer)
    dense, inverse = P.to_dense(), torch.linalg.pinv(P.to_dense(), rtol=1e-6)
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-6)) == 10 < 15
    v = (torch.randn(shape).double(),)
    for solved, expected in ((P.solve(v), inverse), (P.rsolve(v), inverse.T), (P.gram_solve(v), inverse.T @ inverse)):
        torch.testing.assert_close(solved[0].flatten(), expected @ v[0].flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("recipe", ["sgd", "adam", "bnp", "whitening", "shampoo", "soap", "muon", "auto", "torch's Muon"])
def test_z_of_a_model_of_16_bits(recipe):
    """P keeps its own precision: products with vectors of 16 bits are those of its float64 copy, and PᵀHP has the eigenvalues of that."""
    torch.manual_seed(0)
    parts = [nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)]
    model = nn.Sequential(*parts).to(torch.bfloat16)
    parts[-1].requires_grad_(False)
    x, y = torch.randn(40, 5).to(torch.bfloat16), torch.randint(0, 3, (40,))
    objective = Objective(model, nn.functional.cross_entropy, [(x, y)])
    if recipe == "torch's Muon":
        optimizer = torch.optim.Muon(p for p in model.parameters() if p.requires_grad)
    else:
        optimizer = getattr(precond, recipe)(
            [{"params": parts[0], "lr": 0.01}, {"params": nn.Sequential(*parts[2:]), "lr": 0.003}]
        )
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    P = preconditioner_of(optimizer, objective)
    exact = in_float64(P)
    v = objective.params
    for method in ("mv", "rmv", "gram"):
        found, expected = (vec.flatten(getattr(m, method)(t)) for m, t in ((P, v), (exact, vec.map_(torch.Tensor.double, v))))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), method  # float32, of a few products
    A = P.T @ hessian(objective) @ P
    found, expected = (eigenvalues(m, k=1).values[0] for m in (A, in_float64(A)))
    assert abs(found - expected) <= 0.02 * abs(expected)  # products with H are rounded to 2⁻⁹
