"""Why a remedy is advised, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from precond.analysis.diagnostics.numbers import number
from precond.analysis.diagnostics.source import NORMALIZATIONS

if TYPE_CHECKING:
    from precond.analysis.diagnostics.diagnosis import Diagnosis
    from precond.analysis.diagnostics.layer import Layer


def because(found: Diagnosis, layers: Sequence[Layer], name: str) -> str:
    """What was measured that a remedy mends.

    Args:
        found: with all layers.
        layers: that gain alone, the one that gains most first.
        name: of the remedy.
    """
    if not layers and (
        data := [layer for layer in found.layers if layer.source == "data" and not math.isnan(layer.kappa_biased)]
    ):
        far = number(data[0].drivers.offset)
        return f"{data[0].name!r} has no bias that takes up the means of the data, up to {far} times their standard deviation."
    if not layers:
        return _of_no_layer(found)
    then = layers[0].spectra.kappa("bnp" if name == "standardize" else name)
    more = "" if len(layers) == 1 else f" {len(layers) - 1} more layers gain."
    return f"{_reason(layers[0])} It would be {number(then)}.{more}"


def _of_no_layer(found: Diagnosis) -> str:
    """Why the whole gains where no layer that the remedy reaches gains alone."""
    direct = [layer for layer in found.layers if layer.source == "data"]
    if any(layer.rescaled for layer in direct) or any(layer.source in NORMALIZATIONS for layer in found.layers):
        return "A normalization takes a mean or a scale out of the data, and leaves that the scales of their features differ."
    if not direct:
        return (
            "No layer that receives the data as they are was diagnosed: it is frozen, or something is done to them first. "
            "The gain is that of the layers behind."
        )
    return "No layer gains much alone; at one learning rate for all the slowest of them set the pace."


def _reason(layer: Layer) -> str:
    """What drives κ of a layer, in words."""
    d = layer.drivers
    parts = []
    if d.means >= 2:
        parts.append(
            f"×{number(d.means)} from means that are large beside the standard deviation (up to {number(d.offset)} times)"
        )
    if d.scales >= 2:
        apart = f"standard deviations differ up to {number(d.spread)}-fold"
        if d.aside > 2 * d.spread:
            apart = f"standard deviations are up to {number(d.aside)} times from the bias's 1"
        parts.append(f"×{number(d.scales)} from scales ({apart})")
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
