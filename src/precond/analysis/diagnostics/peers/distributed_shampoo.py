"""P of Meta's Distributed Shampoo (Shi et al., 2023), version 1, whose state is one of blocks of a tensor with small dimensions merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Identity, InverseRoot, LinearMap, Scaled
from precond.algebra.maps.base import Piecewise
from precond.algebra.maps.eigen import eigh
from precond.algebra.maps.tucker import Tucker
from precond.algebra.vec import Vec
from precond.analysis.diagnostics.peers.reading import Options, inverse_root, only, rotated, wide
from precond.analysis.diagnostics.registry import register
from precond.optim.blocks import state_dtype

Box = tuple[slice, ...]


class Boxes(Piecewise):
    """One tensor, seen in some shape, that is cut into boxes, with a map for each.

    Args:
        boxes: (a slice of each dimension, a map of one tensor of that shape), which cover the tensor.
        like: the tensor.
        shape: that it is seen in.
    """

    like: Vec

    def __init__(self, boxes: Sequence[tuple[Box, LinearMap]], like: Vec, shape: Sequence[int]):
        self.boxes, self.like, self.shape = tuple(boxes), like, tuple(shape)
        self.root, self.diagonal = all(m.root for _, m in boxes), all(m.diagonal for _, m in boxes)

    def _each(self, method: str, v: Vec) -> Vec:
        X = v[0].reshape(self.shape)
        Y = torch.empty_like(X)
        for box, map_ in self.boxes:
            (Y[box],) = getattr(map_, method)((X[box],))
        return (Y.reshape(v[0].shape),)


@register("distributed_shampoo.DistributedShampoo")
def shampoo(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M of each block on its own; I where there was no gradient yet. Where iterates are averaged, the step of z."""
    only({"distributed_config": type(group["distributed_config"]).__name__}, distributed_config="SingleDeviceDistributedConfig")
    shape = merged(param.shape, group["max_preconditioner_dim"], group["distributed_config"].target_parameter_dimensionality)
    W = param.detach().to(state_dtype(param.dtype)).reshape(shape)
    g = None if param.grad is None else param.grad.to(W.dtype).reshape(shape)
    cut = [(box, state[f"block_{i}"]) for i, box in enumerate(boxes(shape, group["max_preconditioner_dim"]))]
    statistics = [t for _, block in cut for t in _statistics(block)]
    if statistics and not any(t.any() for t in statistics):
        return Identity((param.detach(),))
    step = float(state["step"])
    maps = [(box, _grafted(W[box], None if g is None else g[box], block, group, step)) for box, block in cut]
    return Boxes(maps, (param.detach(),), shape)


def merged(shape: Sequence[int], most: float, dimensions: float) -> tuple[int, ...]:
    """A shape without ones, and neighbours, from the last on, multiplied up to a size, while there are more than some dimensions."""
    if 0 in shape:
        return (0,)
    if dimensions == math.inf:
        return tuple(shape)
    *rest, last = [n for n in shape if n != 1] or [1]
    sizes = [last]
    while rest:
        n = rest.pop()
        if len(rest) + 1 + len(sizes) > dimensions and n * sizes[0] <= most:
            sizes[0] *= n
        else:
            sizes.insert(0, n)
    return tuple(sizes)


def boxes(shape: Sequence[int], most: float) -> Iterator[Box]:
    """A tensor's blocks of at most some size along each dimension, the last dimension's first."""
    for starts in product(*(range(0, n, max(1, int(min(n, most)))) for n in shape)):
        yield tuple(slice(a, int(min(a + most, n))) for a, n in zip(starts, shape, strict=True))


def _statistics(block: Options) -> Iterator[Tensor]:
    """What is zero before the first gradient."""
    yield from (block[key] for key in ("adagrad", "filtered_grad") if key in block)
    if "shampoo" in block:
        kept = vars(block["shampoo"])
        yield from kept["factor_matrices"]
        if "corrected_eigenvalues" in kept:
            yield kept["corrected_eigenvalues"]


def _grafted(W: Tensor, g: Tensor | None, block: Options, group: Options, step: float) -> LinearMap:
    """M of a block, times ‖D m‖/‖M m‖ with the grafted method's D and the mean gradient m; D itself before the first roots."""
    if group["grafting_config"] is None:
        return _of(W, block, group, "preconditioner_config", step)
    name, on = (type(group[option]).__name__ for option in ("grafting_config", "preconditioner_config"))
    if name not in _DIAGONAL or on in _DIAGONAL:  # two of a kind keep their state in one place
        only({"grafting_config": name}, grafting_config=f"None, or one of {', '.join(_DIAGONAL)} upon a Kronecker product")
    own, other = (_of(W, block, group, option, step) for option in ("preconditioner_config", "grafting_config"))
    if step < group["start_preconditioning_step"]:
        return other
    m = (_mean(W, g, block, group),)
    (theirs,), (ours,) = other.gram(m), own.gram(m)
    ratio = float(theirs.norm() / (ours.norm() + 1e-16))  # as it is added there
    if ratio == 0:  # a block that is not moved
        return InverseRoot((torch.full_like(W, torch.inf),))
    return Scaled(own, square=ratio)


def _mean(W: Tensor, g: Tensor | None, block: Options, group: Options) -> Tensor:
    """The mean gradient that the last step used, but for the correction of its bias, from the one that it left behind."""
    beta, beta3 = group["betas"][0], group["beta3"]
    if beta and beta == beta3:
        return block["filtered_grad"].detach().to(W.dtype)
    if g is None:
        raise RuntimeError(
            f"preconditioner_of: grafting scales each block by the last step's gradient, which a parameter of shape {tuple(W.shape)} has not "
            "any more; ask before zero_grad()"
        )
    before = (block["filtered_grad"].detach().to(W.dtype) - (1 - beta) * g) / beta if beta else g
    return before.lerp(g, 1 - beta3)


def _of(W: Tensor, block: Options, group: Options, option: str, step: float) -> LinearMap:
    """P of a block by one of the two methods."""
    name = type(group[option]).__name__
    if name not in _METHODS:
        only({option: name}, **{option: " or ".join(_METHODS)})
    return _METHODS[name](W, block, group, group[option], step)


def _correction(beta: float, step: float) -> float:
    return 1 - beta**step if beta < 1 else 1.0


def _identity(W: Tensor, block: Options, group: Options, config: Any, step: float) -> LinearMap:
    """M = I."""
    return Identity((W,))


def _adagrad(W: Tensor, block: Options, group: Options, config: Any, step: float) -> LinearMap:
    """M = diag(1/(√r̂ + ε)), r a sum or a mean of g²; of Adam's its bias is corrected."""
    adam = type(config).__name__ == "AdamPreconditionerConfig" and not config.drop_weighting_factor_on_gsquare
    r = block["adagrad"].detach().to(W.dtype) / (_correction(config.beta2, step) if adam else 1.0)
    return inverse_root(r.sqrt() + config.epsilon)


def _root_inverse(W: Tensor, block: Options, group: Options, config: Any, step: float) -> LinearMap:
    """M = A₁ ⊗ A₂ ⊗ …, of each dimension with an exponent but 0 the root of the inverse that is kept."""
    kept = vars(block["shampoo"])
    return _kronecker(W, config, [eigh(_square(wide(A), kept["use_symmetric_packing"])) for A in kept["inv_factor_matrices"]])


def _eigendecomposed(W: Tensor, block: Options, group: Options, config: Any, step: float) -> LinearMap:
    """The same from the eigenvalues λ that are kept, λ^(−exponent) those of the root of the inverse."""
    kept, powers = vars(block["shampoo"]), [e for e in _exponents(W.ndim, config) if e]
    values, vectors = (map(wide, kept[f"factor_matrices_eigen{what}"]) for what in ("values", "vectors"))
    deficient = config.amortized_computation_config.rank_deficient_stability_config
    roots = [(_inverse_power(v, e, group["epsilon"], deficient), Q) for v, Q, e in zip(values, vectors, powers, strict=True)]
    return _kronecker(W, config, roots)


def _inverse_power(values: Tensor, e: float, epsilon: float, deficient: Any) -> Tensor:
    """λ^(−e): shifted so that the least is not below ε, or of the pseudoinverse."""
    if hasattr(deficient, "rank_rtol"):
        rtol = len(values) * torch.finfo(values.dtype).eps if deficient.rank_rtol is None else deficient.rank_rtol
        return values.where(values > (rtol * values.max().relu()).clamp_min(deficient.rank_atol), torch.inf).pow(-e)
    least = values.min()
    if deficient.perturb_before_computation:
        return (values - least + epsilon if least < epsilon else values).pow(-e)
    return (values - least.clamp_max(0) + epsilon).pow(-e)


def _kronecker(W: Tensor, config: Any, decomposed: Sequence[tuple[Tensor, Tensor]]) -> LinearMap:
    """P = V√diag(μ)Vᵀ of each dimension that is preconditioned, M's factor V diag(μ)Vᵀ."""
    roots = iter([((V * values.clamp_min(0).sqrt()) @ V.T).to(W.dtype) for values, V in decomposed])
    return Tucker([next(roots) if e else None for e in _exponents(W.ndim, config)], (W,))


def _exponents(order: int, config: Any) -> list[float]:
    """Of the inverse factor of each dimension; 0: it has none."""
    given = config.inverse_exponent_override.get(order, {})
    default = 1 / (2 * max(order, 1))
    return [given.get(d, default) if isinstance(given, dict) else given for d in range(order)]


def _square(t: Tensor, packed: bool) -> Tensor:
    """A symmetric matrix whose upper triangle may be written as a line."""
    if not packed:
        return t
    n = (math.isqrt(1 + 8 * t.numel()) - 1) // 2
    upper = t.new_zeros(n, n)
    upper[tuple(torch.triu_indices(n, n, device=t.device))] = t
    return upper + upper.triu(1).T


def _eigenvalue_corrected(W: Tensor, block: Options, group: Options, config: Any, step: float) -> LinearMap:
    """M = Q diag(1/(r̂ᵉ + ε)) Qᵀ, r a mean of squares along Q, the Kronecker product of the eigenbases, e = ½ unless overridden."""
    kept = vars(block["shampoo"])
    bases = iter(Q.detach().to(W.dtype) for Q in kept["factor_matrices_eigenvectors"])
    left = config.ignored_basis_change_dims.get(W.ndim, [])
    corrected = group["use_bias_correction"] and not config.drop_weighting_factor_on_gsquare
    r = kept["corrected_eigenvalues"].detach().to(W.dtype) / (_correction(group["betas"][1], step) if corrected else 1.0)
    h = r.pow(config.inverse_exponent_override.get(W.ndim, 0.5)) + group["epsilon"]
    return rotated([None if d in left else next(bases) for d in range(W.ndim)], h, W, W.shape)


_Method = Callable[[Tensor, Options, Options, Any, float], LinearMap]
_DIAGONAL: dict[str, _Method] = {
    "SGDPreconditionerConfig": _identity,
    "AdaGradPreconditionerConfig": _adagrad,
    "RMSpropPreconditionerConfig": _adagrad,
    "AdamPreconditionerConfig": _adagrad,
}
_METHODS: dict[str, _Method] = {
    **_DIAGONAL,
    "RootInvShampooPreconditionerConfig": _root_inverse,
    "RootInvKLShampooPreconditionerConfig": _root_inverse,
    "EigendecomposedShampooPreconditionerConfig": _eigendecomposed,
    "EigendecomposedKLShampooPreconditionerConfig": _eigendecomposed,
    "EigenvalueCorrectedShampooPreconditionerConfig": _eigenvalue_corrected,
}
