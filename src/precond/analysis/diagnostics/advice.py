"""What to do, ranked by what it promises."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from precond.analysis.diagnostics.calibrated import STUCK, UNKNOWN, Gain, calibration
from precond.analysis.diagnostics.gains import QuadraticModel, first_rate, predicted, steps
from precond.analysis.diagnostics.numbers import number
from precond.analysis.diagnostics.reasons import because
from precond.analysis.diagnostics.remedies import INPUTS, Base, Candidate
from precond.analysis.diagnostics.source import NORMALIZATIONS

if TYPE_CHECKING:
    from precond.analysis.diagnostics.diagnosis import Diagnosis
    from precond.analysis.diagnostics.layer import Layer

MORE = 1.2
"""Times as many steps must a remedy save to be advised, and times as much a costlier one than a cheaper one."""
_WITHIN = ("sgd", "bnp", "adam", "adamw", "rmsprop", "adagrad")
"""Optimizers that can be had in the coordinates of layer inputs."""


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        what: in a few words.
        why: what was measured.
        code: the change, ready to run.
        gain: what it is predicted to save, as an interval; ``UNKNOWN``, as a number NaN, where no study says.
        layers: that it is about, the one that gains most first.
        effect: what it does, in words, where ``gain`` is not known.
        remedy: how it is made, where it can be tried.
        lr: the learning rate in ``code``; None: there is none.
        tested: whether that rate comes from a range test.
        measured: steps without it over steps with it, where both were trained here; None: they were not.
    """

    what: str
    why: str
    code: str
    gain: Gain
    layers: tuple[str, ...]
    effect: str = ""
    remedy: Candidate | None = field(default=None, repr=False)
    lr: float | None = None
    tested: bool = False
    measured: float | None = None

    @property
    def promise(self) -> str:
        """What it promises, or was seen to do, in words."""
        if self.measured is not None:
            return f"tried: {fewer(self.measured)}"
        return str(self.gain) if self.gain.known else self.effect

    @property
    def rank(self) -> float:
        """By which advice is ordered: what was measured, else the likely gain."""
        if self.measured is not None:
            return self.measured
        return self.gain.likely if self.gain.known else 1.0

    def tried(self, lr: float, measured: float | None = None) -> Advice:
        """With a learning rate from a range test, and what was measured."""
        assert self.remedy is not None
        return replace(self, code=self.remedy.code(lr), lr=lr, tested=True, measured=measured)

    def as_dict(self) -> dict[str, object]:
        """Numbers and texts, for JSON."""
        plain = {name: getattr(self, name) for name in ("what", "why", "code", "promise", "lr", "tested", "measured")}
        return {**plain, "layers": list(self.layers), "gain": self.gain.as_dict()}


@dataclass(frozen=True)
class RemedyEstimate:
    """A remedy that was looked at: whether it became advice or not.

    Attributes:
        name: of the remedy.
        gain: what it is predicted to save; ``UNKNOWN`` where nothing can be said.
        why: nothing can be said, or it is no advice.
        advice: that it would be; None where it cannot be made.
    """

    name: str
    gain: Gain
    why: str = ""
    advice: Advice | None = field(default=None, repr=False)


def fewer(ratio: float) -> str:
    """A ratio of steps without and with something, in words.

    Example:
        >>> fewer(2.5), fewer(0.5)
        ('2.5 times fewer steps', '2 times more steps')
    """
    return f"{ratio:.3g} times fewer steps" if ratio >= 1 else f"{1 / ratio:.3g} times more steps"


def advise(
    found: Diagnosis, quadratic: QuadraticModel, base: Base, dim: int | None
) -> tuple[tuple[Advice, ...], tuple[RemedyEstimate, ...]]:
    """All that is worth doing, what keeps training from working first, then by the likely gain; and what was considered.

    Args:
        found: with the layers.
        quadratic: of the network.
        base: what one trains with.
        dim: of the features of the data, see :func:`precond.analysis.diagnostics.remedies.standardized`.
    """
    coordinates, considered = _coordinates(found, quadratic, base, dim)
    single = _single_inputs(found)
    if (
        coordinates
        and coordinates[0].remedy
        and coordinates[0].remedy.name == "standardize"
        and quadratic.freed < quadratic.stuck / 2
    ):
        # One cause: data whose scale drives units where they are stuck.
        shares = f"{100 * quadratic.stuck:.0f} % of the hidden units are saturated or dead; on standardized data {100 * quadratic.freed:.0f} %."
        coordinates[0] = replace(coordinates[0], why=f"{coordinates[0].why} {shares}")
        single = [a for a in single if a.what not in (_REVIVE, _FREE)]
    ranked = sorted([*coordinates, *single], key=lambda a: -a.rank)
    return tuple([*_learning_rate(found), *ranked, *_biases(found)]), tuple(considered)


_WHAT = {
    "standardize": "Standardize the data: subtract the mean of each feature, divide by its standard deviation",
    "bnp": "Train in the coordinates of centered and scaled layer inputs (BNP)",
    "whitened": "Whiten the inputs of layers: correlation is what centering and scaling leave",
}


def _coordinates(
    found: Diagnosis, quadratic: QuadraticModel, base: Base, dim: int | None
) -> tuple[list[Advice], list[RemedyEstimate]]:
    """Standardized data, BNP, whitening: the cheapest first, a costlier one where it promises more."""
    advice: list[Advice] = []
    considered: list[RemedyEstimate] = []
    best = 1.0
    unknown = _untold(found)
    for name in ("standardize", *INPUTS):
        if why := unknown or _unfit(base, name):
            considered.append(RemedyEstimate(name, UNKNOWN, why))
            continue
        value, alone = predicted(quadratic, base, name, calibration().steps)
        line = calibration().lines.get((name, quadratic.stuck >= STUCK))
        if math.isnan(value) or line is None:
            why = quadratic.why if name == "standardize" and quadratic.why else "not in the study"
            considered.append(RemedyEstimate(name, UNKNOWN, why))
            continue
        if name == "standardize" and quadratic.stuck < STUCK and max(value, alone) < MORE:
            # Such as of data whose means and scale a normalization takes out again.
            considered.append(RemedyEstimate(name, UNKNOWN, "it changes neither κ of a layer nor the pace of the whole"))
            continue
        gain = line.gain(value, alone, calibration().steps)
        enough = gain.worth and gain.likely >= MORE * best
        why = "" if enough else "promises no more than cheaper advice" if gain.worth else "not a fifth of the steps"
        remedy = base.standardized(dim) if name == "standardize" else base.within(name)
        lr = first_rate(quadratic, base, name)
        layers = _reached(found, name)
        reached = tuple(x.name for x in layers)
        one = Advice(_WHAT[name], because(found, layers, name), remedy.code(lr), gain, reached, "", remedy, lr)
        considered.append(RemedyEstimate(name, gain, why, one))
        if enough:
            best = gain.likely
            advice.append(one)
    return advice, considered


def _untold(found: Diagnosis) -> str:
    """Why the data tell nothing of any remedy."""
    if found.layers and max(layer.samples for layer in found.layers) < 2:
        return "one sample shows neither means nor scales"
    return "the data do not change" if _unchanging(found) else ""


def _unchanging(found: Diagnosis) -> list[Layer]:
    """The layers that receive the data, where no input of any of them ever changes."""
    data = [layer for layer in found.layers if layer.source == "data"]
    return data if all(layer.units.dead + layer.units.constant == layer.units.total for layer in data) else []


def _unfit(base: Base, name: str) -> str:
    """Why a remedy is none for what one trains with."""
    if name not in INPUTS:
        return ""
    order = ("raw", *INPUTS)
    if order.index(name) <= order.index(base.coordinates):
        return "the optimizer is in such coordinates already"
    return "" if base.family in _WITHIN else f"no composition of it with {base.label} is known to work"


def _reached(found: Diagnosis, name: str) -> list[Layer]:
    """Layers that gain alone, the one that gains most first."""

    def gain(layer: Layer) -> float:
        then = layer.spectra.kappa("bnp" if name == "standardize" else name)
        return steps(layer.kappa_now) / steps(min(layer.kappa_now, then))

    layers = [layer for layer in found.layers if layer.source == "data" or name != "standardize"]
    return sorted((layer for layer in layers if gain(layer) >= 1.5), key=lambda layer: -gain(layer))


def _single_inputs(found: Diagnosis) -> list[Advice]:
    """One piece of advice for each thing that is wrong with single inputs, about all layers where it is."""
    if max((layer.samples for layer in found.layers), default=0) < 2:
        return []  # what is there once does not change
    if still := _unchanging(found):
        names = tuple(layer.name for layer in still)
        why = f"All {still[0].units.total} features that {names[0]!r} receives are the same in all {still[0].samples} samples."
        return [Advice(_LOOK, why, _VARY, UNKNOWN, names, "nothing can be learned from data that do not change")]
    about: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
    for layer in found.layers:
        u, data = layer.units, layer.source == "data"
        revive = (
            ("Drop features that carry nothing", _DROP)
            if data
            else (_CHANGE, _WEIGHTS)
            if layer.source in _ALIVE
            else (_REVIVE, _LEAKY)
        )
        for count, state, remedy in (
            (u.dead, "are always 0", revive),
            (u.constant, "never change", revive),
            (u.saturated, f"sit at an end of {layer.source} in 90 % of the samples", (_FREE, _SMALLER)),
        ):
            if count / u.total >= _FEW:
                whose = "features" if data else "units"
                why = f"{count} of the {u.total} {whose} that {layer.name!r} receives {state} ({100 * count / u.total:.0f} %)."
                about.setdefault(remedy, []).append((count, u.total, why, layer.name))
    out = []
    for (what, code), cases in about.items():
        counts, totals, whys, names = zip(*cases, strict=True)
        effect = f"{sum(counts)} of {sum(totals)} inputs do nothing now; what they would save is not predicted"
        shown = " ".join(whys[:3]) + (f" Likewise in {len(whys) - 3} more layers." if len(whys) > 3 else "")
        out.append(Advice(what, shown, code, UNKNOWN, names, effect))
    return out


_REVIVE, _FREE = "Revive units that have died", "Get units out of saturation"
_LOOK = "Look at the data: no feature changes from one example to the next"
_VARY = "assert (inputs.std(0) > 0).any()  # of the training data"
_CHANGE = "Look at units that never change"
_ALIVE = ("tanh", "sigmoid", "linear", "convolution", "embedding", *NORMALIZATIONS)  # what stands still there has not died
_WEIGHTS = (
    "torch.nn.init.xavier_uniform_(layer.weight)  # of the layer before, if its weights are 0; or look at what it receives"
)
_FEW = 0.05  # a smaller share of bad inputs is no advice
_DROP = "inputs = inputs[:, inputs.std(0) > 0]  # of the training data"
_LEAKY = "torch.nn.LeakyReLU()  # in place of ReLU; or a smaller learning rate and smaller initial weights in the layer before"
_SMALLER = "torch.nn.init.xavier_uniform_(layer.weight)  # of the layer before; and standardized inputs there"


def _biases(found: Diagnosis) -> list[Advice]:
    """One piece of advice for all layers that lack a bias, where none stands before a normalization that takes it out."""

    def gain(layer: Layer) -> float:
        return steps(layer.kappa_now) / steps(min(layer.kappa_now, layer.kappa_biased))

    layers = sorted((x for x in found.layers if not math.isnan(x.kappa_biased) and gain(x) >= 1.5), key=lambda x: -gain(x))
    if not layers:
        return []
    first = layers[0]
    others = "" if len(layers) == 1 else f" Likewise: {_listed(x.name for x in layers[1:])}."
    return [
        Advice(
            "Give layers a bias: without one their inputs cannot be centered",
            f"{first.name!r} has no trained bias, and means up to {number(first.drivers.offset)} times the standard deviation: "
            f"κ = {number(first.kappa_now)}, and {number(first.kappa_biased)} if it were centered and scaled.{others}",
            "bias=True  # and inputs=precond.BNP() in the optimizer", UNKNOWN, tuple(x.name for x in layers),
            "not predicted: it changes the model; try it",
        )
    ]  # fmt: skip


def _listed(names: Iterable[str]) -> str:
    """At most three names."""
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _learning_rate(found: Diagnosis) -> list[Advice]:
    if found.lr_limit is None or found.lr is None or found.lr <= found.lr_limit:
        return []
    why = f"It is {number(found.lr)}; above {number(found.lr_limit)} steps grow along the steepest direction of the loss."
    code = f"for group in optimizer.param_groups: group['lr'] = {number(found.lr_limit / 2)}"
    return [Advice("Lower the learning rate", why, code, UNKNOWN, (), "steps that do not grow", None, found.lr_limit / 2)]
