r"""Continuous families of parameters that compute the same function, as vector fields X with L constant along them.

Along a field X, Xᵀg = 0 at every p, and differentiated once more H X = −(DX)ᵀg: a null vector of H where g = 0, and known elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.vec import Vec, flatten
from precond.analysis.curvature.dataflow import Layer


@dataclass(frozen=True)
class Symmetry:
    """k fields X_1, …, X_k of one kind, sparse: X_i has the entries ``values(p)[row == i]`` at the flat positions ``column[row == i]``.

    Attributes:
        kind: in words.
        params: positions of the parameters that are touched, the producing layer's first.
        row: which field an entry belongs to, (m,).
        column: its position in the flattened parameters, (m,).
        values: the entries as a differentiable function of the parameters, (m,).
        count: k.
    """

    kind: str
    params: tuple[int, ...]
    row: Tensor
    column: Tensor
    values: Callable[[Vec], Tensor]
    count: int

    def combined(self, params: Vec, c: Tensor) -> Tensor:
        """Σ_i c_i X_i(p), flat, (n,)."""
        values = self.values(params) * c[self.row]
        return values.new_zeros(sum(p.numel() for p in params)).index_add(0, self.column, values)


@dataclass(frozen=True)
class _Entries:
    """Entries of one parameter: the flat index within it, the field that each belongs to, and its value."""

    param: int
    row: Tensor
    index: Tensor
    values: Callable[[Vec], Tensor]


def symmetries(layers: list[Layer], params: Vec) -> Iterator[Symmetry]:
    """All that the structure of a network suggests; what holds is for numbers to decide."""
    for layer in layers:
        if layer.weight is None:
            continue
        if layer.softmax and layer.norm is None:
            yield from _shift(layer, params, 1, "shift of all classes before softmax")
        readers = layer.readers
        if readers is None:
            continue
        if all(r.norm is None for r in readers):
            if all(r.weight is not None for r in readers):
                yield from _pair(layer, readers, params)
        elif len(readers) == 1 and layer.norm is None and layer.linear:
            yield from _normalized(layer, readers[0], params)


def _pair(layer: Layer, readers: tuple[Layer, ...], params: Vec) -> Iterator[Symmetry]:
    """A unit's incoming weights and bias times s, its outgoing weights over s; without activation also bias against bias."""
    m = _units(layer, params)
    entries = [_rows(layer, params)]
    if layer.bias is not None:
        entries.append(_scaled(layer.bias, torch.arange(m)))
    for reader in readers:
        owner = _columns(reader, m, params)
        if owner is None:
            return
        assert reader.weight is not None
        entries.append(_scaled(reader.weight, owner, -1.0))
    what = "activation" if layer.norm is None else "activation, from the normalization's weight and bias"
    yield _joined(f"positive scale of units before and after the {what}", entries, params, m)
    if layer.linear and layer.bias is not None and all(r.bias is not None for r in readers):
        entries = [_constant(layer.bias, torch.arange(m), params)]
        for reader in readers:
            assert reader.weight is not None and reader.bias is not None
            out = params[reader.bias].numel()
            if params[reader.weight].ndim != 2 or params[reader.weight].shape[1] != m:
                return
            pairs = torch.cartesian_prod(torch.arange(m), torch.arange(out))
            entries.append(_Entries(reader.bias, pairs[:, 0], pairs[:, 1], _minus_transposed(reader.weight)))
        yield _joined("bias against the next layer's bias", entries, params, m)


def _normalized(layer: Layer, norm: Layer, params: Vec) -> Iterator[Symmetry]:
    """Weights before a normalization: their scale, and what it subtracts."""
    m = _units(layer, params)
    weights = [_rows(layer, params)]
    if norm.norm != "batch":
        groups = 1 if norm.norm == "layer" else int(norm.node._saved_group)
        if m % groups == 0:
            size = m // groups
            scale = [_Entries(e.param, e.row // size, e.index, e.values) for e in weights]
            if layer.bias is not None:
                scale.append(_scaled(layer.bias, torch.arange(m) // size))
            yield _joined(f"scale before the {norm.norm} normalization", scale, params, groups)
            yield from _shift(layer, params, groups, f"shift of all features before the {norm.norm} normalization", True)
        return
    if norm.node._saved_training:
        yield _joined("scale before the batch normalization", weights, params, m)
        if layer.bias is not None:
            entries = [_constant(layer.bias, torch.arange(m), params)]
            yield _joined("bias before the batch normalization", entries, params, m)
        return
    if norm.weight is None or norm.bias is None:
        return
    mean, var, eps = norm.node._saved_running_mean, norm.node._saved_running_var, norm.node._saved_eps
    gamma, beta, sigma, mu, units = norm.weight, norm.bias, (var + eps).sqrt().detach(), mean.detach().clone(), torch.arange(m)
    # γ((w·x + b) − μ)/σ + β stays where w and b grow by t, γ shrinks by t and β by tγμ/σ.
    entries = [*weights, _scaled(gamma, units, -1.0)]
    if layer.bias is not None:
        entries.append(_scaled(layer.bias, units))
    entries.append(_Entries(beta, units, units, lambda p: -p[gamma] * mu / sigma))
    yield _joined("scale against the batch normalization with fixed statistics", entries, params, m)
    if layer.bias is not None:
        entries = [_constant(layer.bias, units, params), _Entries(beta, units, units, lambda p: -p[gamma] / sigma)]
        yield _joined("bias against the batch normalization with fixed statistics", entries, params, m)


def _shift(layer: Layer, params: Vec, groups: int, kind: str, over_positions: bool = False) -> Iterator[Symmetry]:
    """The same vector added to all rows of a weight (in a group of units), the same number to all of their biases.

    Where a group is also normalized over positions, the shift must not depend on them: biases alone.
    """
    assert layer.weight is not None
    if layer.transposed or layer.groups > 1:
        return
    m = _units(layer, params)
    W = params[layer.weight]
    fan, size = W.numel() // m, m // groups
    group = torch.arange(m) // size
    owner = group[:, None] * fan + torch.arange(fan)
    entries, count = [_constant(layer.weight, owner.reshape(-1), params)], groups * fan
    if over_positions and W.ndim > 2:
        entries, count = [], 0
        if layer.bias is None:
            return
    if layer.bias is not None:
        entries.append(_constant(layer.bias, count + group, params))
        count += groups
    yield _joined(kind, entries, params, count)


def _units(layer: Layer, params: Vec) -> int:
    assert layer.weight is not None
    W = params[layer.weight]
    if layer.norm is not None:
        return W.numel()
    return W.shape[1] * layer.groups if layer.transposed else W.shape[0]


def _rows(layer: Layer, params: Vec) -> _Entries:
    """The incoming weights of each unit."""
    assert layer.weight is not None
    W = params[layer.weight]
    if layer.norm is not None:
        return _scaled(layer.weight, torch.arange(W.numel()))
    if layer.transposed:
        inputs, out = W.shape[:2]
        group = torch.arange(inputs) // (inputs // layer.groups)
        owner = group[:, None] * out + torch.arange(out)
        return _scaled(layer.weight, owner.reshape(inputs, out, *(1,) * (W.ndim - 2)).expand(W.shape).reshape(-1))
    owner = torch.arange(W.shape[0]).reshape(-1, *(1,) * (W.ndim - 1))
    return _scaled(layer.weight, owner.expand(W.shape).reshape(-1))


def _columns(reader: Layer, m: int, params: Vec) -> Tensor | None:
    """To which of m units of its input each entry of a layer's weight belongs; None: not known."""
    assert reader.weight is not None
    W = params[reader.weight]
    if W.ndim == 2:
        # Flattened channels: the entries of one channel lie together.
        if W.shape[1] % m:
            return None
        return (torch.arange(W.shape[1]) // (W.shape[1] // m)).expand(W.shape).reshape(-1)
    shape = (1,) * (W.ndim - 2)
    if reader.transposed:
        return torch.arange(m).reshape(-1, 1, *shape).expand(W.shape).reshape(-1) if W.shape[0] == m else None
    if W.shape[1] * reader.groups != m:
        return None
    group = torch.arange(W.shape[0]) // (W.shape[0] // reader.groups)
    owner = group[:, None] * W.shape[1] + torch.arange(W.shape[1])
    return owner.reshape(*owner.shape, *shape).expand(W.shape).reshape(-1)


def _scaled(param: int, row: Tensor, sign: float = 1.0) -> _Entries:
    return _Entries(param, row, torch.arange(len(row)), lambda p: sign * p[param].reshape(-1))


def _minus_transposed(param: int) -> Callable[[Vec], Tensor]:
    return lambda p: -p[param].T.reshape(-1)


def _constant(param: int, row: Tensor, params: Vec) -> _Entries:
    one = torch.ones_like(params[param]).reshape(-1)
    return _Entries(param, row, torch.arange(len(row)), lambda p: one)


def _joined(kind: str, entries: list[_Entries], params: Vec, count: int) -> Symmetry:
    start = [0]
    for p in params:
        start.append(start[-1] + p.numel())
    device = flatten(params[:1]).device
    return Symmetry(
        kind,
        tuple(dict.fromkeys(e.param for e in entries)),
        torch.cat([e.row for e in entries]).to(device),
        torch.cat([start[e.param] + e.index for e in entries]).to(device),
        lambda p: torch.cat([e.values(p) for e in entries]),
        count,
    )
