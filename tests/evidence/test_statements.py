"""The statements themselves: that they hold, and that they fail where the library is wrong."""

import pytest
import torch

from precond.curvature.neurons.form import NeuronHessian
from precond.evidence import chosen, measured
from precond.maps import Dense
from precond.preconditioners import BNP, RMS
from precond.regularizers import L2, SAM
from precond.spaces import Cotangent, Tangent

# What takes seconds is left to the command: rates of long runs, networks trained to their minimum, the order of implicit regularization.
SLOW = {
    "rate", "rate-network", "rate-alpha", "rate-bound", "best-alpha", "spectra", "rate-preconditioned", "rate-positive", "equal-rows",
    "equal-columns", "rows-network", "kappa-adagrad-network", "kappa-rmsprop-network", "kappa-adam-network", "implicit-gd", "implicit-pgd",
}  # fmt: skip
QUICK = [entry for _, entry in chosen() if entry.name not in SLOW]


@pytest.mark.parametrize("entry", QUICK, ids=lambda entry: entry.name)
def test_holds(entry):
    statement = measured(entry)
    assert statement.verdict == ("holds as corrected" if entry.correction else "holds"), statement.finding
    assert statement.finding.tolerance >= 0


def test_nothing_depends_on_or_moves_the_global_random_state():
    (_, entry), *_ = chosen(["gradient-z"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = entry.measure()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert entry.measure() == first


def _broken_l2(self, at):
    return Cotangent(tuple(-2 * self.lam * p for p in at.p))


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        ("l2-z", L2, "term", _broken_l2),
        ("l2-p", L2, "term", _broken_l2),
        ("implicit", Dense, "rmv", lambda self, v: self.mv(v)),
        ("hessian-z", Dense, "T", property(lambda self: self)),
        ("rmsprop", RMS, "observe", lambda self, state, seen: [r.copy_(g.square()) for r, g in zip(state["r"], seen.gradient, strict=True)]),
        ("adam-zero", RMS, "observe", lambda self, state, seen: [r.add_(g.square()) for r, g in zip(state["r"], seen.gradient, strict=True)]),
        ("sam-z", SAM, "probe", lambda self, at: (Tangent(at.g, self.rho),)),
        ("neuron", NeuronHessian, "to_dense", lambda self: (self.H_e * self.s.abs()) @ self.H_e.T),
        ("bnp-step", BNP, "damping_of", lambda self, square, activity: 0.01 * square),
    ],
)  # fmt: skip
def test_a_wrong_piece_is_noticed(monkeypatch, name, owner, attribute, broken):
    (_, entry), *_ = chosen([name])
    monkeypatch.setattr(owner, attribute, broken)
    assert measured(entry).verdict == "fails"
