r"""What makes training slow, in which layer, what would mend it, and by how much."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond.algebra import checks, vec
from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec
from precond.analysis.curvature import (
    CurvatureError,
    Objective,
    condition_number,
    eigenvalues,
    gauss_newton,
    hessian,
)
from precond.analysis.diagnostics.advice import Advice, RemedyEstimate, advise
from precond.analysis.diagnostics.conditioning import neurons_of, restricted, spectra, with_bias
from precond.analysis.diagnostics.findings import drivers, units
from precond.analysis.diagnostics.gains import QuadraticModel, features
from precond.analysis.diagnostics.gathering import gather
from precond.analysis.diagnostics.layer import Curvature, Layer
from precond.analysis.diagnostics.preconditioner import preconditioner_of, step_size
from precond.analysis.diagnostics.problem import as_objective
from precond.analysis.diagnostics.remedies import Base, base_of
from precond.analysis.diagnostics.short import as_trained, one_step, trained_copy
from precond.analysis.diagnostics.stability import stable_factor
from precond.analysis.diagnostics.streaming import InputStatistics
from precond.analysis.diagnostics.undiagnosed import covered_share, uncovered
from precond.optim.checking.arguments import shown

Matrix = Literal["none", "hessian", "gauss_newton"]
_MATRICES = {"hessian": hessian, "gauss_newton": gauss_newton}
_WARM, _STILL = 10, 1e-12  # steps of an optimizer that has made none, and their rate
_HEAT = 48  # inputs of a layer of which the correlation is kept


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found; ``print`` it, or make a page of it with :func:`precond.lab.report.diagnosis.save_diagnosis`.

    Attributes:
        layers: in the order of the model.
        advice: what to do, the largest predicted gain first.
        notes: what could not be seen, all that is in ``undiagnosed`` included.
        loss: L(p).
        optimizer: its class, or None.
        lr: its largest learning rate.
        lam_max: λ_max of PᵀHP (or PᵀGP), where curvature was asked for.
        lr_limit: the largest stable learning rate on the objective, 2/λ_max times what momentum makes of it; None with ``lam_max``, and where P
            or it is unknown. Penalties and decay of the optimizer's own are left out: ``L2(λ)`` in z adds 2λ to λ_max.
        matrix: of which.
        undiagnosed: which weights' inputs were not diagnosed, each with the reason.
        considered: the remedies that were looked at, advised or not.
        against: what remedies are compared with.
        tried: whether remedies were.
        share: of the trained entries, how many are in diagnosed layers or in layers that these stand for.
    """

    layers: tuple[Layer, ...]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    loss: float
    optimizer: str | None = None
    lr: float | None = None
    lam_max: float | None = None
    lr_limit: float | None = None
    matrix: Matrix = "none"
    undiagnosed: tuple[str, ...] = ()
    considered: tuple[RemedyEstimate, ...] = ()
    against: str = ""
    share: float = 0.0
    tried: bool = False

    @property
    def verdict(self) -> str:
        """What stands over the advice, or in its place. That nothing was found says nothing of layers that nobody looked at."""
        if self.advice:
            return "What to do"
        if not self.layers:
            return "No layer was diagnosed: this says nothing about the model."
        seen = "Nothing stands out in these layers"
        if self.tried:
            seen = "Nothing that was tried saved a fifth of the steps"
        if self.undiagnosed:
            n = len(self.undiagnosed)
            others = "1 other weight was" if n == 1 else f"{n} others were"
            return f"{seen}; {others} not diagnosed (see the notes)."
        if self.tried:
            return f"{seen}."
        return "Nothing stands out in what layers receive now; it says nothing of data, model size or what comes later in training."

    @property
    def looked_at(self) -> str:
        """How much of the model was."""
        n = len(self.layers)
        return f"{n} layer{'' if n == 1 else 's'} with {100 * self.share:.0f} % of the parameters, against {self.against}"

    @property
    def columns(self) -> list[str]:
        """Coordinates in which κ is known of some layer."""
        order = ["raw", "centered", "scaled", "bnp", "whitened", "optimizer"]
        return [name for name in order if any(name in layer.spectra.values for layer in self.layers)]

    @property
    def worst(self) -> tuple[Layer, ...]:
        """Layers by κ as they are now, the largest first."""
        return tuple(sorted(self.layers, key=lambda layer: -(layer.kappa_now if math.isfinite(layer.kappa_now) else 0.0)))

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        names = ("loss", "optimizer", "lr", "lam_max", "lr_limit", "matrix", "against", "share")
        plain = {name: getattr(self, name) for name in names}
        advice = [a.as_dict() for a in self.advice]
        considered = [{"name": c.name, "gain": c.gain.as_dict(), "why": c.why} for c in self.considered]
        texts = {name: list(getattr(self, name)) for name in ("notes", "undiagnosed")}
        return {**plain, "layers": [x.as_dict() for x in self.layers], "advice": advice, "considered": considered, **texts}

    def __str__(self) -> str:
        from precond.analysis.diagnostics.text import lines

        return "\n".join(line for line, _ in lines(self))


LABELS = {"bnp": "BNP", "optimizer": "its P"}


def diagnose(
    objective: Objective | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    curvature: Matrix = "none",
    samples: int = 16384,
    max_inputs: int = 2048,
    layers: int = 32,
    examples: int = 2048,
) -> Diagnosis:
    r"""Where a model trains slowly, and what would mend it.

    For each layer whose inputs are observed (linear, convolutional, attention, recurrent, … : :func:`~precond.register_layer`): κ of the
    mean of ĥĥᵀ, ĥ = [1; h] what a neuron receives (a patch for a convolution), which is κ of each neuron's Hessian H_e S H_eᵀ (Theorem 3)
    for S = I: as it is, centered, scaled, both (BNP), whitened, and with the optimizer's P. The gain of a remedy is an interval: what a
    quadratic model of the whole network predicts (:mod:`precond.analysis.diagnostics.quadratic_model`), corrected by a study of small
    trainings. A remedy changes what later layers receive: diagnose again after it. What was not diagnosed is said in the notes.

    Batch normalizations use the statistics of the batch, as in training. Nothing about the model, the optimizer or the random state
    changes, and the result is the same every time.

    Args:
        objective: the mean loss, or a model with ``data=``: a LightningModule, a model that returns its loss (Hugging Face's), or any module
            with ``loss_fn=``.
        optimizer: whose P is looked at, and which remedies are compared with; None: gradient descent with momentum 0.9.
        data: of a model: a loader or a list of batches, pairs (inputs, targets) or dicts of the model's arguments.
        loss_fn: of a model: a function of (outputs, targets), of (outputs, batch) where batches are dicts; None: the model's own.
        curvature: also κ of each layer's block of the Hessian or Gauss–Newton matrix in float64, before and after P, and λ_max of the whole
            in z; costs some hundred products per layer.
        samples: inputs per layer of which spectra are made; beyond, about as many are drawn, each as probably, the same ones every time.
        max_inputs: layers with more inputs are passed by, with a note (spectra cost their third power).
        layers: at most so many are diagnosed; of stacks of equal ones some at equal distances, which stand for the others.
        examples: of ``data`` so many are taken.

    Returns:
        A record that prints as a list of advice and a table.

    Raises:
        ValueError: for numbers out of range, or where the optimizer's parameters are not the objective's.
        TypeError: for a model without data.

    Example:
        >>> from torch import nn
        >>> x = torch.tensor([[-1.0, -100.0], [1.0, -100.0], [-1.0, 100.0], [1.0, 100.0]])
        >>> objective = Objective(nn.Linear(2, 1), nn.functional.mse_loss, [(x, torch.zeros(4, 1))])
        >>> layer, = diagnose(objective).layers
        >>> round(layer.spectra.kappa("raw")), round(layer.spectra.kappa("bnp")), layer.drivers.main
        (10000, 1, 'scales')

    References:
        Ye, Theorem 3 and eqs. (16)–(27); Lange, Helfrich & Ye (2022).
    """
    checks.one_of("diagnose", "curvature", curvature, ("none", "hessian", "gauss_newton"))
    checks.positive("diagnose", samples=samples, max_inputs=max_inputs, layers=layers, examples=examples)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"diagnose: optimizer must be an optimizer of the model, or None, got {shown(optimizer)}")
    with as_trained(as_objective(objective, data, loss_fn, examples)) as seen:
        return _diagnosis(seen, optimizer, curvature, {"samples": samples, "max_inputs": max_inputs, "layers": layers})


def _diagnosis(
    objective: Objective, optimizer: torch.optim.Optimizer | None, curvature: Matrix, options: dict[str, int]
) -> Diagnosis:
    gathered, undiagnosed = gather(objective, **options)
    if not gathered and not undiagnosed:
        undiagnosed = ["the model has no layer of a kind whose inputs are diagnosed"]
    undiagnosed += uncovered(objective, gathered, undiagnosed)
    notes = list(undiagnosed)
    base = base_of(optimizer, objective.model)
    P = None if optimizer is None else _known(objective, optimizer, base, notes)
    g = objective.gradient()
    layers = [_layer(objective, seen, P, g, curvature) for seen in gathered]
    if P is not None and (mixed := [layer.name for layer in layers if math.isnan(layer.spectra.kappa("optimizer"))]):
        notes.append(
            f"κ with the optimizer's P is left out for {', '.join(mixed[:3])}{', …' if len(mixed) > 3 else ''}: P mixes neurons there, as maps "
            "of matrices do, or is too large to be taken apart; curvature='gauss_newton' tells κ of such a layer's whole block in z"
        )
    lam_max = limit = None
    if curvature != "none":
        A = _MATRICES[curvature](objective)
        lam_max = float(eigenvalues(A if P is None else P.T @ A @ P, 1).values[0])
        if optimizer is not None and P is not None and lam_max > 0:
            c = stable_factor(optimizer)
            limit = None if math.isnan(c) else 2 * c / lam_max
    found = Diagnosis(
        tuple(layers), (), tuple(notes), objective.value(), None if optimizer is None else type(optimizer).__name__,
        None if optimizer is None else step_size(optimizer, objective), lam_max, limit, curvature, tuple(undiagnosed),
        against=base.label, share=covered_share(objective, gathered),
    )  # fmt: skip
    dim = features(objective, gathered[0]) if gathered else None
    advice, considered = advise(found, QuadraticModel.made(objective, gathered, g, **options), base, dim)
    return replace(found, advice=advice, considered=considered)


def _known(objective: Objective, optimizer: torch.optim.Optimizer, base: Base, notes: list[str]) -> LinearMap | None:
    """The optimizer's P; of one that has made no step, that of a copy that makes some at the rate of nothing."""
    try:
        try:
            P = preconditioner_of(optimizer, objective)
        except RuntimeError:
            if (found := _after_steps(objective, base)) is None:
                raise
            P = found
            notes.append(
                f"the optimizer has made no step: its P is that after {_WARM} steps of a copy that leave the model where it is; take a "
                "step first to see its own"
            )
        P.mv(vec.map_(torch.zeros_like, objective.params))
    except (RuntimeError, ValueError) as error:
        # A map of which M alone is known (Muon's, where the momentum is singular) refuses to be applied.
        notes.append(f"the optimizer's P is left out: {error}")
        return None
    return P


def _after_steps(objective: Objective, base: Base) -> LinearMap | None:
    """P of the optimizer anew on a copy of the model, after a few steps at a rate that moves nothing; None where none can be made."""
    with trained_copy(objective, 0) as mine:
        try:
            copied = base.now().make(mine.model, _STILL)
            for step in range(_WARM):
                one_step(mine, copied, step % len(mine.batches))
            return preconditioner_of(copied, mine)
        except (RuntimeError, ValueError, TypeError):
            return None


def _layer(objective: Objective, seen: InputStatistics, P: LinearMap | None, g: Vec, curvature: Matrix) -> Layer:
    place = {id(p): i for i, p in enumerate(objective.originals)}
    bias = place[id(seen.site.bias)] if seen.biased else None
    index = [place[id(seen.site.weight)], *([] if bias is None else [bias])]
    own = None if P is None else restricted(P, index)
    neurons = None if own is None else neurons_of(own, seen, tuple(g[i] for i in index))
    k, found = spectra(seen, neurons)
    block = None
    if curvature != "none":
        part = copy.copy(objective)
        part.names, part.params = tuple(objective.names[i] for i in index), tuple(objective.params[i] for i in index)
        block = _curvature(part, own, curvature)
    return Layer(
        seen.name, tuple(seen.site.weight.shape), seen.source, seen.biased, seen.count, seen.used, found, drivers(seen, k, found),
        units(seen), math.nan if seen.biased or seen.recentered else with_bias(seen, k), _correlation(seen, k), block, seen.rescaled,
    )  # fmt: skip


def _correlation(seen: InputStatistics, k: int) -> Tensor:
    """Of (at most 48) inputs that vary."""
    R = seen.R[k][1:, 1:]
    lengths = torch.linalg.vector_norm(R, dim=0)
    R = R[:, lengths > 0] / lengths[lengths > 0]
    if not R.numel():
        return R.new_zeros(0, 0)
    R = R[:, torch.linspace(0, R.shape[1] - 1, min(_HEAT, R.shape[1])).round().long()]
    return R.T @ R


def _curvature(part: Objective, P: LinearMap | None, curvature: Matrix) -> Curvature:
    try:
        A = _MATRICES[curvature](part)
        before = condition_number(A, float64=True, max_products=400)
        return Curvature(before, None if P is None else condition_number(P.T @ A @ P, float64=True, max_products=400))
    except CurvatureError as error:
        return Curvature(None, None, str(error))
