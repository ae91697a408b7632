"""One layer of a diagnosis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from precond.analysis.curvature import Conditioning
from precond.analysis.diagnostics.conditioning import Spectra
from precond.analysis.diagnostics.findings import Drivers, Units
from precond.analysis.diagnostics.numbers import number


@dataclass(frozen=True)
class Curvature:
    """A layer's block of the Hessian or Gauss–Newton matrix.

    Attributes:
        before: in p.
        after: in z, of PᵀHP; None where P is not known.
        refused: why there is none, in words.
    """

    before: Conditioning | None
    after: Conditioning | None
    refused: str = ""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
        name: of the layer (of the weight, where it is not called ``weight``).
        weight: shape of the weight.
        source: what its inputs come from: ``"data"`` or an operation.
        biased: whether a bias is trained.
        samples: inputs seen: examples, or examples and positions.
        used: how many of them the spectra are made of.
        spectra: of the mean of ĥĥᵀ in several coordinates.
        drivers: what drives κ.
        units: inputs that carry little.
        kappa_biased: κ of standardized inputs, had a layer without bias one; NaN otherwise.
        correlation: of (at most 48) inputs that vary.
        curvature: of its block of H or G, where it was asked for.
        rescaled: whether its outputs go straight into a normalization.
    """

    name: str
    weight: tuple[int, ...]
    source: str
    biased: bool
    samples: int
    used: int
    spectra: Spectra
    drivers: Drivers
    units: Units
    kappa_biased: float
    correlation: Tensor = field(repr=False)
    curvature: Curvature | None = None
    rescaled: bool = False

    @property
    def kappa_now(self) -> float:
        """κ with the optimizer's P, or of the raw inputs where that is not known."""
        own = self.spectra.kappa("optimizer")
        return self.spectra.kappa("raw") if math.isnan(own) else own

    def as_dict(self) -> dict[str, Any]:
        """Numbers by name."""
        blocks = self.curvature
        return {
            "name": self.name,
            "weight": list(self.weight),
            "source": self.source,
            "biased": self.biased,
            "samples": self.samples,
            "used": self.used,
            "rank": self.spectra.rank,
            "size": self.spectra.size,
            "kappa": {name: self.spectra.kappa(name) for name in self.spectra.values},
            "drivers": vars(self.drivers),
            "units": vars(self.units),
            "block": None if blocks is None else {"before": _kappa(blocks.before), "after": _kappa(blocks.after)},
        }


def _kappa(found: Conditioning | None) -> float | None:
    return found.kappa_positive if found is not None and found.why_positive is None else None


def block_texts(layer: Layer) -> list[str]:
    """κ₊ of a layer's block before and after P, or why there is none."""
    block = layer.curvature
    if block is None:
        return ["–", "–"]
    if block.before is None:
        return [block.refused.partition(";")[0], "–"]
    return [_conditioning_text(block.before), _conditioning_text(block.after)]


def _conditioning_text(found: Conditioning | None) -> str:
    if found is None:
        return "–"
    if found.indefinite:
        return f"indefinite ({found.inertia.negative}+ negative, λ from {number(found.lam_min)} to {number(found.lam_max)})"
    kappa = _kappa(found)
    return "not resolved" if kappa is None else number(kappa)
