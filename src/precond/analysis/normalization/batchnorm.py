r"""Normalizations, or their γ and β alone, folded into the layers next to them (Ye, eqs. 21–23)."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from precond.algebra.warning import warn
from precond.analysis.normalization import folding
from precond.analysis.normalization.norms import NORMS, Features, gamma_beta, own_forward, without_affine
from precond.optim.inputs.hooks import WeakHook

_DROPOUT = nn.modules.dropout._DropoutNd


def fold_batchnorm(model: nn.Module) -> nn.Module:
    r"""The model at inference without its batch normalizations: each is an affine map with its running statistics.

    With a = γ/√(σ² + ε), c = β − aμ, a BatchNorm behind a linear layer or convolution becomes W̃ = diag(a)W, b̃ = a∘b + c there; one *before*
    such a layer, as after an activation (Ye, eq. 21), becomes W̃ = W diag(a), b̃ = Wc + b, where zero padding turns into padding with −c/a.
    In between there may be ``nn.Identity``, dropout and flattening.

    Args:
        model: any module; what feeds what is read from ``torch.fx``, part by part where the whole cannot be traced. A ``BatchNorm1d`` next
            to an ``nn.Linear`` is taken to see (N, features). Run it in eval mode.

    Returns:
        A copy in eval mode with ``nn.Identity`` in the place of each folded normalization, exact to rounding. A warning names those that
        stay (between two activations, say), and why.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> fold_batchnorm(model)[2]
        Identity()

    References:
        Ye, eqs. 21–23; Ioffe & Szegedy (2015), section 3.1.
    """
    model = copy.deepcopy(model).eval()
    return _replaced(model, (_BatchNorm,), _affine, lambda bn: nn.Identity(), "fold_batchnorm", backward=True)


def collapse_affine(model: nn.Module) -> nn.Module:
    r"""The model with γ and β of each normalization in the next layer, Ŵ = W diag(γ), b̂ = Wβ + b; what is left of it stays.

    The same function, in training and at inference, with fewer parameters: γ and β parametrize the next layer twice. It holds for batch
    normalization (Ye, eqs. 22–23), and as well for instance, group, layer and RMS normalization, whose γ and β follow what they normalize by.

    Args:
        model: any module. Dropout between the normalization and the next layer stands in the way, and so does whatever else reads what
            the normalization puts out, such as a residual stream. A ``GroupNorm`` next to an ``nn.Linear`` is taken to see (N, features).

    Returns:
        A copy whose normalizations have no γ and β where the next layers took them up; a warning names the others.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.normal_(model[0].weight)
        >>> collapsed, x = collapse_affine(model), torch.randn(4, 2)
        >>> torch.testing.assert_close(collapsed(x), model(x))
        >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in collapsed.parameters())
        (7, 3)

    References:
        Ye, eqs. 22–23.
    """
    return _replaced(copy.deepcopy(model), NORMS, _gamma_beta, without_affine, "collapse_affine", backward=False)


def _affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(bn, _BatchNorm)
    if bn.running_mean is None or bn.running_var is None:
        raise folding.CannotFold("it has no running statistics")
    gamma, beta = gamma_beta(bn) or (torch.ones_like(bn.running_var.double()), torch.zeros_like(bn.running_var.double()))
    scale = gamma * (bn.running_var.double() + bn.eps).rsqrt()
    return scale, beta - scale * bn.running_mean.double()


def _gamma_beta(norm: nn.Module) -> tuple[Tensor, Tensor]:
    if own_forward(norm):
        raise folding.CannotFold(f"a {type(norm).__name__} has a forward of its own")
    if (found := gamma_beta(norm)) is None:
        raise folding.CannotFold("it has no γ and β")
    return found


@dataclass(frozen=True)
class _Neighbors:
    """Where a normalization stands.

    Attributes:
        before: name of the layer that feeds it and nothing else; None: none that can take it up.
        after: names of the layers that it feeds, and whether a flattening lies between.
        why: what stands in the way of ``after``; None: nothing.
    """

    before: str | None
    after: tuple[tuple[str, bool], ...]
    why: str | None


def _replaced(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    affine: Callable[[nn.Module], tuple[Tensor, Tensor]],
    rest: Callable[[nn.Module], nn.Module],
    caller: str,
    backward: bool,
) -> nn.Module:
    stay: list[str] = []
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = dict(_neighbors(model, "", owners, kinds, backward))
    for name in names:
        bn = model.get_submodule(name)
        try:
            scale, shift = affine(bn)
            at = found.get(name)
            if at is None:
                raise folding.CannotFold("torch.fx cannot trace the forward that calls it, or calls it several times")
            _refuse_hooks(name, *bn._forward_pre_hooks.values(), *bn._forward_hooks.values())
            new = _folded(model, at, bn, scale, shift, backward)
        except folding.CannotFold as error:
            stay.append(f"{name!r}: {error}")
            continue
        for target, layer in new.items():
            _set(model, target, layer)
        model = _set(model, name, rest(bn))
    if stay:
        warn(f"{caller}: left in place: {'; '.join(stay)}")
    return model


def _folded(
    model: nn.Module, at: _Neighbors, norm: nn.Module, scale: Tensor, shift: Tensor, backward: bool
) -> dict[str, nn.Module]:
    """The layers that take the place of the neighbors."""
    if backward and at.before is not None:
        name, layer = _layer(model, at.before)
        _refuse_hooks(name, *layer._forward_hooks.values())
        return {name: folding.before(layer, scale, shift)}
    if at.why is not None:
        raise folding.CannotFold(at.why)
    new, features = {}, Features.of(norm)
    for target, flattened in at.after:
        name, layer = _layer(model, target)
        _refuse_hooks(name, *layer._forward_pre_hooks.values())
        new[name] = folding.after(layer, *(_spread(t, features, name, layer, flattened) for t in (scale, shift)))
    return new


def _refuse_hooks(name: str, *hooks: Any) -> None:
    """Raise CannotFold where a hook stands between a normalization and its neighbor, and may change what passes."""
    if any(not isinstance(hook, WeakHook) for hook in hooks):  # which changes nothing
        raise folding.CannotFold(f"a hook on {name!r} may change what passes; remove it first")


def _spread(t: Tensor, features: Features, name: str, layer: nn.Linear | _ConvNd, flattened: bool) -> Tensor:
    """A number of each feature as one of each input of a layer."""
    linear = isinstance(layer, nn.Linear)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if linear and not flattened and not features.flat:
        raise folding.CannotFold(f"{name!r} is linear in the last dimension, which is not that of the channels")
    if not linear and features.last:
        raise folding.CannotFold(f"{name!r} has one weight for all positions, and the features are these")
    if linear and flattened and not features.whole and inputs % features.count == 0:
        times = inputs // features.count
        t = t.repeat(times) if features.last else t.repeat_interleave(times)
    if len(t) != inputs or (flattened and not linear):
        raise folding.CannotFold(f"{name!r} has {inputs} inputs, which are not the {features.count} features")
    return t


def _layer(model: nn.Module, name: str) -> tuple[str, Any]:
    """A layer with its name, which is longer if it has been padded by channel since the model was traced."""
    layer = model.get_submodule(name)
    return (f"{name}.conv", layer.conv) if isinstance(layer, nn.Sequential) else (name, layer)


def _set(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def _neighbors(
    model: nn.Module, prefix: str, owners: Counter[int], kinds: tuple[type[nn.Module], ...], inference: bool
) -> Iterator[tuple[str, _Neighbors]]:
    """Of every normalization that is called once, in every part of the model that can be traced."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # control flow on values, unknown calls: whatever it is, parts of the model may still be traceable
        for name, child in model.named_children():
            yield from _neighbors(child, f"{prefix}{name}.", owners, kinds, inference)
        return
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    read = {id(operator.attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr"}

    def obstacle(node: fx.Node) -> str | None:
        """Why the layer that a node calls cannot be changed; None: it can."""
        if node.op != "call_module":
            return "it feeds the output" if node.op == "output" else f"it feeds {node.name!r}, which is no layer"
        layer = modules[str(node.target)]
        if (reason := folding.obstacle(layer)) is not None:
            return f"it feeds {prefix}{node.target}: {reason}"
        shared = any(owners[id(p)] > 1 or id(p) in read for p in layer._parameters.values() if p is not None)
        return f"{prefix}{node.target} is used elsewhere as well" if shared or calls[id(layer)] > 1 else None

    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(bn := modules[str(node.target)], kinds) or calls[id(bn)] > 1:
            continue
        source = node.all_input_nodes[0]
        takes = len(source.users) == 1 and obstacle(source) is None and _channels(modules[str(source.target)], bn)
        ends = list(_through(node, modules, inference, False))
        yield (
            f"{prefix}{node.target}",
            _Neighbors(
                f"{prefix}{source.target}" if takes else None,
                tuple((f"{prefix}{user.target}", flattened) for user, flattened in ends),
                next((why for user, _ in ends if (why := obstacle(user)) is not None), None),
            ),
        )


def _channels(layer: Any, norm: nn.Module) -> bool:
    """Whether the outputs of a layer are the features of a normalization."""
    outputs = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    features = Features.of(norm)
    return outputs == features.count and ((features.last is False and features.flat) or isinstance(layer, _ConvNd))


def _through(node: fx.Node, modules, inactive_dropout: bool, flattened: bool) -> Iterator[tuple[fx.Node, bool]]:
    """What a node feeds behind what leaves features as they are, and whether they were flattened on the way."""
    for user in node.users:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.Identity) or (inactive_dropout and isinstance(module, _DROPOUT)):
            yield from _through(user, modules, inactive_dropout, flattened)
        elif _flattens(user, module):
            yield from _through(user, modules, inactive_dropout, True)
        else:
            yield user, flattened


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node is a flattening of all dimensions but the first."""
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    if (node.op == "call_function" and node.target is torch.flatten) or (node.op == "call_method" and node.target == "flatten"):
        rest = (*node.args[1:], *node.kwargs.values())
        return rest in ((1,), (1, -1))
    return False
