"""What a model and its data show before training, in numbers that have a meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precond.analysis.diagnostics.diagnosis import Diagnosis
from precond.lab.workloads.problem import LossFn

_NOISE = 3.0  # log₁₀ beyond which gradients do not show their mean
_KAPPA = 30.0  # log₁₀ beyond which κ is not told
_ILL = 4.0  # log₁₀ κ of a layer whose inputs are badly conditioned


@dataclass(frozen=True)
class Measured:
    """Means over layers are weighted by the entries of their weights; κ is that of the mean of ĥĥᵀ, ĥ a layer's extended inputs.

    Attributes:
        kappa: log₁₀ κ of inputs as they are.
        gain: log₁₀ of κ as they are over κ in BNP's coordinates.
        independent: log₁₀ of the share of independent directions of standardized inputs, (Σλ)²/(n Σλ²), λ the eigenvalues.
        samples: log₁₀ of the inputs that a batch has for each input of a neuron.
        noise: log₁₀ tr Σ/‖G‖² of the gradients of batches, G their mean, Σ their covariance (McCandlish et al., 2018, in units of a batch).
        ill: share of the parameters that are in layers with κ above 10⁴.
        batch, other: shares of these layers' weights that are behind batch normalization, and behind layer or RMS normalization.
    """

    kappa: float
    gain: float
    independent: float
    samples: float
    noise: float
    ill: float
    batch: float
    other: float


def measured(found: Diagnosis, model: nn.Module, loss_fn: LossFn, data: tuple[Tensor, Tensor], batch_size: int) -> Measured:
    """Of a diagnosis, which has the layers, and the gradients of batches of its data.

    Args:
        found: of ``model`` on ``data``.
        model, loss_fn: as they are trained.
        data: inputs and targets; two examples at least.
        batch_size: of the training that is meant.

    Raises:
        ValueError: where no layer was diagnosed.
    """
    if not found.layers:
        raise ValueError("found: no layer was diagnosed, so that nothing is measured of its inputs")
    sizes = torch.tensor([float(math.prod(layer.weight)) for layer in found.layers], dtype=torch.float64)
    weights = sizes / sizes.sum()

    def mean(values: Sequence[float]) -> float:
        return float(weights @ torch.tensor(values, dtype=torch.float64))

    spectra = [layer.spectra for layer in found.layers]
    raw, bnp = ([_log(s.kappa(name)) for s in spectra] for name in ("raw", "bnp"))
    shares = [float(v.sum() ** 2 / v.square().sum()) / s.size if len(v := s.values["bnp"]) else 1 / s.size for s in spectra]
    examples = len(data[0])
    # Small data are divided into four, so that there is a spread.
    size = max(1, min(batch_size, examples // 4))
    batches = [(data[0][i : i + size], data[1][i : i + size]) for i in range(0, examples - size + 1, size)]
    behind = [
        [float(layer.source in names) for layer in found.layers] for names in (("batch norm",), ("layer norm", "rms norm"))
    ]
    return Measured(
        mean(raw),
        mean([a - b for a, b in zip(raw, bnp, strict=True)]),
        math.log10(mean(shares)),
        mean([math.log10(batch_size * layer.samples / examples / layer.spectra.size) for layer in found.layers]),
        min(math.log10(noise(model, loss_fn, batches) * size / batch_size), _NOISE),
        found.share * mean([float(kappa > _ILL) for kappa in raw]),
        *map(mean, behind),
    )


def noise(model: nn.Module, loss_fn: LossFn, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """tr Σ/‖G‖² of the gradients of n batches: Σ without bias, ‖G‖² the square of the mean without what tr Σ/n adds; inf where nothing is left.

    Raises:
        ValueError: for fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"batches: the noise of gradients needs two at least, got {len(batches)}")
    params = [p for p in model.parameters() if p.requires_grad]
    found = []
    for inputs, targets in batches:
        gradients = torch.autograd.grad(loss_fn(model(inputs), targets), params, materialize_grads=True)
        found.append(torch.cat([g.flatten() for g in gradients]).double())
    G = torch.stack(found)
    spread = float(G.var(0).sum())
    signal = float(G.mean(0).square().sum()) - spread / len(G)
    return spread / signal if signal > 0 else math.inf


def _log(kappa: float) -> float:
    return _KAPPA if not math.isfinite(kappa) else min(math.log10(max(kappa, 1.0)), _KAPPA)
