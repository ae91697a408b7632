"""What to do, ranked by what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from precond.optimizer import PreconditionedGD

if TYPE_CHECKING:
    from precond.diagnostics.diagnosis import Diagnosis, Layer

_WORTH = 1.5  # a smaller gain is no advice


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        what: in a few words.
        why: what was measured.
        code: the change, one line.
        gain: predicted ratio of steps without and with it; where it mends single units, the ratio of all units and working ones.
        layers: that it is about.
    """

    what: str
    why: str
    code: str
    gain: float
    layers: tuple[str, ...]


def steps(kappa: float) -> float:
    """Steps in which gradient descent at its best learning rate reduces the error by e, one at least: 1/log((κ + 1)/(κ − 1)).

    Example:
        >>> round(steps(101.0), 1), steps(1.0)
        (50.5, 1.0)
    """
    return 1.0 if kappa <= 1 else max(1.0, 1 / (math.log1p(2 / (kappa - 1))))


def advise(found: Diagnosis, optimizer: torch.optim.Optimizer | None) -> tuple[Advice, ...]:
    """All that is worth doing, the largest gain first; of equal ones, the cheaper."""
    advice = [*_coordinates(found, optimizer), *_biases(found), *_single_inputs(found), *_learning_rate(found)]
    return tuple(sorted((a for a in advice if a.gain >= _WORTH), key=lambda a: -a.gain))


def _coordinates(found: Diagnosis, optimizer: torch.optim.Optimizer | None) -> list[Advice]:
    """Standardized data and BNP, against how layers are now; whitening, against centered and scaled inputs."""

    def now(layer: Layer) -> float:
        return layer.kappa_now

    def standardized(layer: Layer) -> float:
        return min(layer.kappa_now, layer.spectra.kappa("bnp"))

    def whitened(layer: Layer) -> float:
        return min(standardized(layer), layer.spectra.kappa("whitened"))

    data = [layer for layer in found.layers if layer.source == "data"]
    return [
        *_gained(
            data, now, standardized, "Standardize the data: subtract the mean of each feature and divide by its standard deviation",
            "inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-8)  # statistics of the training data",
        ),
        *_gained(
            [] if isinstance(optimizer, PreconditionedGD) and optimizer.observes else found.layers, now, standardized,
            "Train in the coordinates of centered and scaled layer inputs (batch normalization preconditioning)",
            _with_inputs(optimizer, "BNP"),
        ),
        *_gained(
            found.layers, standardized, whitened, "Whiten the inputs of layers: correlation is what centering and scaling leave",
            _with_inputs(optimizer, "Whitening"),
        ),
    ]  # fmt: skip


def _gained(
    layers: Sequence[Layer], before: Callable[[Layer], float], after: Callable[[Layer], float], what: str, code: str
) -> list[Advice]:
    """Advice about all layers that gain, with the gain and the reason of the one that gains most."""

    def gain(layer: Layer) -> float:
        return steps(before(layer)) / steps(after(layer))

    most = sorted((layer for layer in layers if gain(layer) >= _WORTH), key=lambda layer: -gain(layer))
    if not most:
        return []
    why = f"{_reason(most[0])} It would be {number(after(most[0]))}"
    if (left := before(most[0])) != most[0].kappa_now:
        why += f", after {number(left)} with centering and scaling alone"
    return [Advice(what, f"{why}.", code, gain(most[0]), tuple(layer.name for layer in most))]


def _reason(layer: Layer) -> str:
    """What drives κ of a layer, in words."""
    d = layer.drivers
    parts = []
    if d.means >= 2:
        parts.append(
            f"×{number(d.means)} from means that are large beside the standard deviation (up to {number(d.offset)} times)"
        )
    if d.scales >= 2:
        parts.append(f"×{number(d.scales)} from scales (standard deviations differ up to {number(d.spread)}-fold)")
    if d.correlation >= 2:
        parts.append(f"×{number(d.correlation)} from correlation")
    order = {"means": d.means, "scales": d.scales, "correlation": d.correlation}
    values = [x for x in order.values() if not math.isnan(x) and x >= 2]
    parts = [part for _, part in sorted(zip(values, parts, strict=True), key=lambda pair: -pair[0])]
    own = ""
    if not math.isnan(k := layer.spectra.kappa("optimizer")):
        own = f" With the optimizer's own P it is {number(k)}."
    drivers = f": {', '.join(parts)}" if parts else ""
    return f"Inputs of {layer.name!r} have κ = {number(layer.spectra.kappa('raw'))}{drivers}.{own}"


def _single_inputs(found: Diagnosis) -> list[Advice]:
    """One piece of advice for each thing that is wrong with single inputs, about all layers where it is."""
    about: dict[tuple[str, str], list[tuple[float, str, str]]] = {}
    for layer in found.layers:
        u, data = layer.units, layer.source == "data"
        revive = ("Drop features that carry nothing", _DROP) if data else ("Revive units that have died", _LEAKY)
        for count, state, remedy in (
            (u.dead, "are always 0", revive),
            (u.constant, "never change", revive),
            (u.saturated, f"sit at an end of {layer.source} in 90 % of the samples", ("Get units out of saturation", _SMALLER)),
        ):
            if count / u.total >= _FEW:
                whose = "features" if data else "units"
                why = f"{count} of the {u.total} {whose} that {layer.name!r} receives {state} ({100 * count / u.total:.0f} %)."
                about.setdefault(remedy, []).append((u.total / max(u.total - count, 1), why, layer.name))
    out = []
    for (what, code), cases in about.items():
        gains, whys, names = zip(*cases, strict=True)
        out.append(Advice(what, " ".join(whys), code, max(_WORTH, *gains), names))
    return out


_FEW = 0.05  # a smaller share of bad inputs is no advice
_DROP = "inputs = inputs[:, inputs.std(0) > 0]  # of the training data"
_LEAKY = "torch.nn.LeakyReLU()  # in place of ReLU; or a smaller learning rate and smaller initial weights in the layer before"
_SMALLER = "torch.nn.init.xavier_uniform_(layer.weight)  # of the layer before; and standardized inputs there"


def _biases(found: Diagnosis) -> list[Advice]:
    return [
        Advice(
            "Give the layer a bias that is trained: without one its inputs cannot be centered",
            f"{layer.name!r} has no trained bias, and means up to {number(layer.drivers.offset)} times the standard deviation: "
            f"κ = {number(layer.kappa_now)}, and {number(layer.kappa_biased)} if it were centered and scaled.",
            "bias=True  # and inputs=precond.BNP() in the optimizer",
            steps(layer.kappa_now) / steps(min(layer.kappa_now, layer.kappa_biased)),
            (layer.name,),
        )
        for layer in found.layers
        if not math.isnan(layer.kappa_biased)
    ]


def _learning_rate(found: Diagnosis) -> list[Advice]:
    if found.lr_limit is None or found.lr is None or found.lr <= found.lr_limit:
        return []
    why = f"It is {number(found.lr)}; above {number(found.lr_limit)} steps grow along the steepest direction of the loss."
    return [
        Advice("Lower the learning rate", why, f"lr={number(found.lr_limit / 2)}", max(_WORTH, found.lr / found.lr_limit), ())
    ]


def _with_inputs(optimizer: torch.optim.Optimizer | None, inputs: str) -> str:
    """The optimizer in the coordinates of layer inputs, as code."""
    name = type(optimizer).__name__ if optimizer is not None else "SGD"
    if isinstance(optimizer, PreconditionedGD):
        name = optimizer.naming.name
    adaptive = {
        "Adam": "adam",
        "adam": "adam",
        "AdamW": "adamw",
        "adamw": "adamw",
        "NAdam": "adam",
        "RAdam": "adam",
        "Adamax": "adam",
    }
    if name in adaptive:
        return f"optimizer = precond.{adaptive[name]}(model, lr=..., inputs=precond.{inputs}())"
    diagonal = {
        "RMSprop": "RMS(bias_correction=False)",
        "rmsprop": "RMS(bias_correction=False)",
        "Adagrad": "AdaGrad()",
        "adagrad": "AdaGrad()",
    }
    if name in diagonal:
        own = f"precond.{inputs}() @ precond.{diagonal[name]}"
        return f"optimizer = precond.PreconditionedGD(model, lr=..., preconditioner={own})"
    if inputs == "BNP":
        return "optimizer = precond.bnp(model, lr=...)"
    return f"optimizer = precond.PreconditionedGD(model, lr=..., preconditioner=precond.{inputs}())"


def number(x: float) -> str:
    """Three digits at most.

    Example:
        >>> [number(x) for x in (1.0, 12.34, 1234.5, 3.4e8, 0.00123)]
        ['1', '12.3', '1,230', '3.4e+08', '0.00123']
    """
    if math.isnan(x):
        return "–"
    if 1000 <= abs(x) < 1e6:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.3g}"
