"""The statements themselves: that they hold, and that they fail where the library is wrong."""

import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev

from precond.algebra.maps import Dense
from precond.algebra.spaces import Cotangent, Tangent
from precond.analysis.curvature.neurons.form import NeuronHessian
from precond.analysis.normalization import SampleScaling
from precond.lab.evidence import chosen, measured, persample, recurrent
from precond.optim.inputs.recurrent import RecurrentTap
from precond.optim.preconditioners import BNP, RMS
from precond.optim.regularizers import L2, SAM

# What takes seconds is left to the command: rates of long runs, networks trained to their minimum, the order of implicit regularization.
SLOW = {
    "rate", "rate-network", "rate-alpha", "rate-bound", "best-alpha", "spectra", "rate-preconditioned", "rate-positive", "equal-rows",
    "equal-columns", "rows-network", "kappa-adagrad-network", "kappa-rmsprop-network", "kappa-adam-network", "implicit-gd", "implicit-pgd",
    "null-space", "sample-hessian",
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


def _at_first(seen, weight):
    """Of the first time alone."""
    kind, layer, direction = weight.slot
    return (seen.inputs(layer) if kind == "ih" else seen.states(layer, direction)).detach()[None, : int(seen.sizes[0])] + 0.1


def _centered(x, *_, **__):
    """Layer normalization without its division."""
    return x - x.mean(-1, keepdim=True)


def _sized(x, *_, **__):
    """Layer normalization without its centering."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def _by_feature(x, *_, **__):
    """Batch in place of layer normalization."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def _each_time_alone(f):
    """S without what couples times."""
    return lambda *at: torch.diag(hessian(f)(*at).diagonal())


def _flat(f):
    """That nothing depends on what a row put out before."""
    return lambda *at: torch.zeros_like(jacrev(f)(*at))


def _rescaled(self, seen, weight, rows=RecurrentTap.rows):
    """Features in other units than those that weights meet."""
    found = rows(self, seen, weight)
    return found * torch.logspace(0, 3, found.shape[-1], dtype=found.dtype)


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
        ("sample-affine", persample, "collapse_affine", lambda model: model),
        ("sample-product", SampleScaling, "of", classmethod(lambda cls, norm, h: cls(torch.eye(16).double(), *(h.norm(dim=1)[None],) * 2))),
        ("sample-weights", SampleScaling, "weights", property(lambda self: 1 / self.sizes)),
        ("sample-nearest", SampleScaling, "miss", property(lambda self: 0.1)),
        ("sample-bnp", BNP, "damping_of", lambda self, square, activity: 100 * square),
        ("sample-bnp-affine", BNP, "damping_of", lambda self, square, activity: torch.ones_like(square)),
        ("sample-instance", BNP, "damping_of", lambda self, square, activity: 0.01 * square),
        ("sample-hessian", NeuronHessian, "to_dense", lambda self: (self.H_e * self.s.abs()) @ self.H_e.T),
        ("sample-columns", SampleScaling, "of", classmethod(lambda cls, norm, h: cls(torch.eye(16).double(), *(h.norm(dim=1)[None],) * 2))),
        ("sample-sizes", nn.functional, "layer_norm", _centered),
        ("sample-null", nn.functional, "layer_norm", _sized),
        ("sample-front", nn.functional, "layer_norm", _sized),
        ("sample-no-p", nn.functional, "layer_norm", _centered),
        ("sample-one", Dense, "mv", lambda self, v: v),
        ("sample-tanh", nn.functional, "layer_norm", _by_feature),
        ("sample-batch", nn.functional, "batch_norm", lambda x, *_, **__: x),
        ("sample-means", nn.functional, "layer_norm", _by_feature),
        ("sample-centering-bias", BNP, "damping_of", lambda self, square, activity: 100 * square),
        ("recurrent-x", recurrent, "hessian", _each_time_alone),
        ("recurrent-h", recurrent, "jacrev", _flat),
        ("recurrent-kappa", RecurrentTap, "rows", _rescaled),
        ("recurrent-bnp", RecurrentTap, "rows", lambda self, seen, weight: _at_first(seen, weight)),
        ("recurrent-whitening", RecurrentTap, "rows", lambda self, seen, weight: _at_first(seen, weight)),
    ],
)  # fmt: skip
def test_a_wrong_piece_is_noticed(monkeypatch, name, owner, attribute, broken):
    (_, entry), *_ = chosen([name])
    monkeypatch.setattr(owner, attribute, broken)
    assert measured(entry).verdict == "fails"


def test_further_seeds_measure_other_things_and_are_repeatable():
    (_, entry), *_ = chosen(["bnp-kappa"])
    several = measured(entry, range(3))
    assert len({finding.measured for finding in several.findings}) == 3 == several.held
    assert several.range[0] == min(finding.measured for finding in several.findings)
    assert measured(entry, [2]).finding == several.others[1]
    assert measured(entry).finding == several.finding
