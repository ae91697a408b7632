"""The limit of the learning rate against iterations on a quadratic, a little below and a little above it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import precond
from diagnostics.test_peers import library
from precond import Momentum, PreconditionedGD
from precond.algebra.maps import Identity
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import Monitor, diagnose, register, stable_factor
from precond.analysis.diagnostics.momenta import schedule_free

torch.set_num_threads(1)
EPS = 1e15  # ε beside which √r is nothing: P = ε^(−1/2) stands still, and the rate that is given is times ε
START = 1e-3  # of the parameter: where steps are bounded they are not yet


@dataclass(frozen=True)
class OwnMomentum(precond.Fixed):
    """P = I with a momentum of its own, as Muon, Polar and Schatten have it."""

    momentum: Momentum | None = None


def ours(momentum, **options):
    return lambda p, lr: PreconditionedGD([p], lr=lr, preconditioner=precond.Fixed(), momentum=momentum, **options)


def routed(p, lr):
    own = OwnMomentum(Identity(), Momentum(0.8, "nesterov", dampening=0.8))
    return PreconditionedGD([p], lr=lr, preconditioner=precond.Route([(lambda leaf: True, own)]), momentum=Momentum(0.9))


def of_torch(name, **options):
    return lambda p, lr: getattr(torch.optim, name)([p], lr=lr * EPS, eps=EPS, **options)


def of(package, name, scale=EPS, **options):
    options = options if scale == 1 else {"eps": EPS, **options}
    return lambda p, lr: getattr(library(package), name)([p], lr=lr * scale, **options)


CASES = {
    "plain": lambda p, lr: torch.optim.SGD([p], lr=lr),
    "heavy ball": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8),
    "dampened": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8, dampening=0.5),
    "dampening without momentum": lambda p, lr: torch.optim.SGD([p], lr=lr, dampening=0.5),
    "Nesterov": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8, nesterov=True),
    "Adam": of_torch("Adam"),
    "AdamW": of_torch("AdamW", betas=(0.6, 0.99), weight_decay=0.0),
    "RAdam": lambda p, lr: torch.optim.RAdam([p], lr=lr, betas=(0.8, 0.3)),  # without r, which is rectified after five steps
    "NAdam, μ standing still": of_torch("NAdam", betas=(0.9, 0.999), momentum_decay=0.0),
    "NAdam, another": of_torch("NAdam", betas=(0.6, 0.9), momentum_decay=0.0),
    "RMSprop": of_torch("RMSprop"),
    "RMSprop with momentum": of_torch("RMSprop", momentum=0.7),
    "Adagrad": of_torch("Adagrad"),
    "Adamax": of_torch("Adamax", betas=(0.8, 0.9)),
    "Adadelta": lambda p, lr: torch.optim.Adadelta([p], lr=lr, eps=EPS),
    "our Nesterov": ours(Momentum(0.7, "nesterov")),
    "our Nesterov's average": ours(Momentum(0.95, "nesterov", dampening=0.95)),
    "our heavy ball": ours(Momentum(0.7, "heavy_ball")),
    "our average": ours(Momentum(0.7, "ema", bias_correction=False)),
    "our average, corrected": ours(Momentum(0.7)),
    "of steps": ours(Momentum(0.7, "heavy_ball", of="tangent")),
    "ours without": ours(None),
    "our lookahead": ours(None, average=precond.EMANesterov(lookahead=0.6, decay=0.5)),
    "our lookahead of an average": ours(Momentum(0.6), average=precond.EMANesterov(lookahead=0.9, decay=0.8)),
    "weights averaged": ours(Momentum(0.6), average=precond.EMA(0.9)),
    "a momentum of the preconditioner's own": routed,
    "recipe": lambda p, lr: precond.sgd([p], lr=lr, momentum=0.9),
    "pytorch-optimizer Adan": of("pytorch_optimizer", "Adan"),
    "pytorch-optimizer Adan, another": of("pytorch_optimizer", "Adan", betas=(0.6, 0.5, 0.9)),
    "pytorch-optimizer AdEMAMix": of("pytorch_optimizer", "AdEMAMix"),
    "pytorch-optimizer AdEMAMix, faster": of("pytorch_optimizer", "AdEMAMix", betas=(0.9, 0.999, 0.99), alpha=8.0),
    "pytorch-optimizer Yogi": of("pytorch_optimizer", "Yogi"),
    "pytorch-optimizer AdaBelief": of("pytorch_optimizer", "AdaBelief", betas=(0.8, 0.999)),
    "pytorch-optimizer ADOPT": of("pytorch_optimizer", "ADOPT", clip_lambda=None),
    "pytorch-optimizer Lamb": of("pytorch_optimizer", "Lamb", adam=True, max_grad_norm=0.0),
    "pytorch-optimizer Lamb, a sum": of("pytorch_optimizer", "Lamb", adam=True, max_grad_norm=0.0, grad_averaging=False),
    "pytorch-optimizer SOAP": of("pytorch_optimizer", "SOAP", betas=(0.8, 0.9), weight_decay=0.0),
    "pytorch-optimizer Kron": of("pytorch_optimizer", "Kron", 1, pre_conditioner_update_probability=0.0, balance_prob=0.0,
                                 precondition_dtype=torch.float64),
    "heavyball AdamW": of("heavyball", "AdamW"),
    "heavyball RMSprop": of("heavyball", "RMSprop"),
    "heavyball NAdam, μ standing still": of("heavyball", "NAdam", momentum_decay=0.0),
    "heavyball SOAP": of("heavyball", "SOAP", betas=(0.8, 0.9), weight_decay=0.0),
}  # fmt: skip


def moved(make, lr, steps, before=0, curvature=3.0):
    """How many times its start a parameter is after some steps on a quadratic, others at the rate of nothing before; and the optimizer."""
    p = torch.nn.Parameter(torch.full((1,), START, dtype=torch.float64))
    with torch.compiler.set_stance("force_eager"):
        optimizer = make(p, lr)
        (group,) = optimizer.param_groups
        rate = group["lr"]
        for t in range(before + steps):
            group["lr"] = rate if t >= before else 1e-12 * rate
            p.grad = curvature * p.detach()
            optimizer.step()
    return abs(p.item()) / START, optimizer


@pytest.mark.parametrize("case", CASES)
def test_below_it_converges_and_above_it_grows(case):
    limit = 2 * stable_factor(moved(CASES[case], 1e-12, 8)[1]) / 3.0
    for share, grows in ((0.97, False), (1.03, True)):
        # Biases of the first steps are corrected, or are not, by longer steps or by shorter ones.
        assert (moved(CASES[case], share * limit, 300, before=100)[0] > 1) == grows


def test_nadam_s_momentum_is_that_of_its_last_step():
    """Which grows by thousands of steps: at the 3,000th a rate is far from the limit that it has in the end."""

    def make(p, lr):
        optimizer, z = torch.optim.NAdam([p], lr=lr * EPS, eps=EPS), torch.zeros_like(p)
        made = {"step": torch.tensor(3000.0), "mu_product": torch.tensor(0.0), "exp_avg": z, "exp_avg_sq": z.clone()}
        optimizer.state[p] = made
        return optimizer

    limit = 2 * stable_factor(moved(make, 1e-12, 1)[1]) / 3.0
    assert 4 < limit * 3.0 < 6  # 2.5 and not 6.8, twice
    assert moved(make, 0.9 * limit, 100)[0] < 1 < moved(make, 1.1 * limit, 100)[0]


SCHEDULE_FREE = {
    "schedulefree.SGDScheduleFree": 1,
    "schedulefree.AdamWScheduleFree": EPS,
    "schedulefree.RAdamScheduleFree": EPS,
    "pytorch_optimizer.ScheduleFreeSGD": 1,
    "pytorch_optimizer.ScheduleFreeAdamW": EPS,
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free(name):
    """In the first steps, where the average moves, everything above 2 grows; later steps contract below 2/(1 − β)."""
    package, _, cls = name.partition(".")

    def made(**options):
        def make(p, lr):
            betas = {"betas": (0.9, 0.8)} if "RAdam" in cls else {}  # rectified after a few steps
            optimizer = of(package, cls, SCHEDULE_FREE[name], **betas, **options)(p, lr)
            optimizer.train()
            return optimizer

        return make

    first, c = (stable_factor(moved(made(), 1e-12, steps)[1]) for steps in (1, 440))
    assert 9.8 < c < 10 and (first == pytest.approx(1) or "RAdam" in cls)  # which makes no steps at first
    later = made(weight_lr_power=0.0)  # steps count alike in the average, whatever their rate
    assert moved(later, 0.97 * 2 * c / 3.0, 150, before=440)[0] < 1 < moved(later, 1.03 * 2 * c / 3.0, 150, before=440)[0]


def test_a_warm_up_makes_the_nominal_rate_larger():
    for package, cls in (("schedulefree", "SGDScheduleFree"), ("pytorch_optimizer", "ScheduleFreeSGD")):
        optimizer = moved(of(package, cls, 1, warmup_steps=1000), 1e-9, 0)[1]
        optimizer.train()
        (p,) = optimizer.param_groups[0]["params"]
        for _ in range(200):
            p.grad = p.detach().clone()
            optimizer.step()
        # The newest of 200 weights t² that grow has 3/200 of them: (2 − s)/(2(1 − β) + (2β − 1)s) = 9.36, at a fifth of the rate.
        assert stable_factor(optimizer) == pytest.approx(5 * 9.36, rel=0.01)


@pytest.mark.parametrize("beta, share", [(0.9, 0.3), (0.6, 0.05), (0.98, 0.001)])
def test_schedule_free_with_a_share_that_stays(beta, share):
    """The largest eigenvalue of a step of (z, x), by numbers."""
    c = schedule_free(beta, share)
    for aλ, grows in ((1.98 * c, False), (2.02 * c, True)):
        z = torch.tensor([1 - aλ * (1 - beta), -aλ * beta], dtype=torch.float64)
        step = torch.stack([z, share * z + torch.tensor([0.0, 1 - share], dtype=torch.float64)])
        assert (torch.linalg.eigvals(step).abs().max().item() > 1) == grows


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("package", ["torch", "pytorch_optimizer"])
def test_what_muon_makes_orthogonal(package, nesterov, monkeypatch):
    """With the orthogonalization left out, which is P, its steps are on a quadratic what its average makes of them."""
    if package == "torch":
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad)
        cls, group = torch.optim.Muon, {}
    else:
        cls, group = library(package).Muon, {"use_muon": True, "use_adjusted_lr": False}
        monkeypatch.setattr(cls, "_orthogonalize", lambda self, group, updates: updates)

    def make(p, lr):
        whole = torch.nn.Parameter(p.detach()[None])
        p.data = whole.data[0]  # one memory
        optimizer = cls([{"params": [whole], **group}], lr=lr, momentum=0.9, nesterov=nesterov, weight_decay=0.0)
        step = optimizer.step

        def of_matrix():
            whole.grad = p.grad[None]
            step()

        optimizer.step = of_matrix
        return optimizer

    limit = 2 * stable_factor(moved(make, 1e-12, 1)[1]) / 3.0
    assert moved(make, 0.97 * limit, 400)[0] < 1 < moved(make, 1.03 * limit, 400)[0]


def test_muon_s_limit_is_the_same_by_either_name():
    W, b = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((3, 3), (3,)))
    for nesterov, c in ((True, 1.95 / 2.9 / 0.05), (False, 39)):
        theirs = torch.optim.Muon([W], lr=0.1, momentum=0.95, nesterov=nesterov)
        own = precond.muon([W], lr=0.1, momentum=0.95, nesterov=nesterov, betas=(0.99, 0.999), where=precond.is_matrix)
        both = precond.muon([W, b], lr=0.1, momentum=0.95, nesterov=nesterov, betas=(0.5, 0.999), where=precond.is_matrix)
        assert stable_factor(theirs) == pytest.approx(c) == stable_factor(own)
        assert stable_factor(both) == pytest.approx(3)  # Adam's mean of what is no matrix


def test_averages_of_adam_and_several_groups():
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    assert stable_factor(torch.optim.AdamW([p])) == stable_factor(precond.adamw([p])) == pytest.approx(19)
    groups = [{"params": [p], "momentum": 0.9}, {"params": [q], "momentum": 0.5}]
    assert stable_factor(torch.optim.SGD(groups, lr=0.1)) == 1.5
    optimizer = precond.sgd([p], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0.5
    assert stable_factor(optimizer) == 1.5


class Strange(torch.optim.SGD):
    """An optimizer whose P is stated, and what it makes of gradients is not."""


class Stated(Strange):
    """One of which both are."""


@register(Strange, stateless=True)
@register(Stated, stateless=True, stable=lambda state, group: 1.5)
def _(param, state, group):
    return Identity((param.detach(),))


def test_what_is_not_known_is_not_told():
    model = torch.nn.Linear(2, 1)
    objective = Objective(model, torch.nn.functional.mse_loss, [(torch.randn(8, 2), torch.randn(8, 1))])
    optimizer = Strange(model.parameters(), lr=1e9, momentum=0.9)
    assert math.isnan(stable_factor(optimizer)) and stable_factor(Stated(model.parameters())) == 1.5
    found = diagnose(objective, optimizer, curvature="hessian")
    assert found.lam_max is not None and found.lr_limit is None
    assert not any("learning rate" in advice.what for advice in found.advice)
    monitor = Monitor(objective, sinks=[]).attach(optimizer)
    row = monitor.measure()
    assert row["lambda_max"] > 0 and math.isnan(row["lr_limit"]) and math.isnan(row["lr_ratio"])
