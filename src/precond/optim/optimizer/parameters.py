"""What a user may pass as ``params``, made into parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precond.algebra import checks
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf, is_decayed, is_hidden, is_matrix
from precond.optim.checking.arguments import shown
from precond.optim.inputs.paths import unwrapped_name
from precond.optim.optimizer.models import Models

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


def to_groups(
    params: Params, modules: list[nn.Module], before: Sequence[Mapping[str, Any]] = (), models: Models | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.Optimizer``; the modules met are appended to ``modules``.

    Groups that come after others (``before``) have names if those have, and names of their own: where the ``models`` of those hold
    the parameters, what these call them. Where a user named those (the names are not a model's), they name these too.

    Raises:
        TypeError: for something that holds no parameters, sparse, complex or integer ones.
        ValueError: for no parameters, a parameter in two groups, tensors that are no leaves, or names for some alone.

    Warns:
        UserWarning: for a parameter that one group holds twice; it is taken once.
    """
    known = {} if models is None else models.called()
    if isinstance(params, nn.Module):
        params = [{"params": params}]
    elif isinstance(params, ModuleGroups) and params.module is not None:
        modules.append(params.module)
        known = {p: unwrapped_name(name) for name, p in params.module.named_parameters()}
    elif isinstance(params, Tensor):
        raise TypeError("params must be a module, an iterable of parameters or of groups, got one tensor; pass [tensor]")
    elif isinstance(params, Mapping):
        raise TypeError("params got a mapping; a group is passed in a list, [{'params': ...}], a state dict not at all")
    items = list(_several(params))
    if not items:
        raise ValueError("params is empty: there is nothing to optimize; pass model.parameters() or the model")
    if not isinstance(items[0], Mapping):
        items = [{"params": items}]
    groups: list[dict[str, Any]] = []
    told: set[bool] = set()  # whether the user named parameters
    for item in items:
        if not isinstance(item, Mapping):
            raise TypeError(f"params mixes groups with other things: expected a dict with 'params', got {type(item).__name__}")
        if "params" not in item:
            keys = ", ".join(map(repr, item)) or "nothing"
            raise TypeError(f"params: a group must have 'params', its parameters; this one has {keys}")
        pairs = _named(item["params"], modules)
        if isinstance(item["params"], nn.Module):
            pairs = [(known.get(p, name), p) for name, p in pairs]
        else:
            told |= {name is not None for name, _ in pairs}
        groups.append({**item, "params": [(name or known.get(p), p) for name, p in pairs]})
    mixed = len(told) > 1
    if before and not modules:  # names of a module were not asked for, and may go
        there = {"param_names" in group for group in before}
        mixed |= (True in told and False in there) or (models is not None and not models.names and len(told | there) > 1)
    if mixed:
        raise ValueError("params names some parameters and not others; give all of them names, or none, or the model itself")
    if before:
        named = all("param_names" in group for group in before)
    else:
        named = all(name is not None for group in groups for name, _ in group["params"])
    names: set[str] = {name for group in before for name in group.get("param_names", ())}
    for k, group in enumerate(groups, start=len(before)):
        pairs = []
        for i, (name, param) in enumerate(group["params"]):
            name = name or f"param_{i}"
            while name in names:
                name = f"{k}.{name}"  # two submodules given as groups may use one name, and a third one that with a prefix
            names.add(name)
            pairs.append((name, param))
        group["params"] = pairs if named else [p for _, p in pairs]
        if named and not pairs:
            group["param_names"] = []  # which torch would miss
    _check([p for g in groups for p in (x[1] if named else x for x in g["params"])])
    return groups


def _named(params: Any, modules: list[nn.Module]) -> list[tuple[str | None, Tensor]]:
    """(name or None, parameter) pairs; tensors that are no floating-point numbers and need no gradient are left out."""
    pairs: list[tuple[str | None, Tensor]] = []
    if isinstance(params, nn.Module):
        modules.append(params)
        params = params.named_parameters()
    elif isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, set):
        raise TypeError("params is a set, whose order changes between runs; pass a list")
    seen: set[Tensor] = set()
    for item in _several(params):
        name, param = item if isinstance(item, tuple) else (None, item)
        if isinstance(param, nn.Module):
            raise TypeError("params holds a module among parameters; pass the module itself, or {'params': module} as a group")
        if not isinstance(param, Tensor):
            raise TypeError(f"params must hold tensors, got {type(param).__name__}; pass model.parameters() or the model")
        if param in seen:
            warn(
                f"a group of params holds the same parameter twice (shape {tuple(param.shape)}): it is taken once "
                "(torch.optim steps it twice)"
            )
            continue
        seen.add(param)
        if param.is_floating_point() or param.requires_grad:  # integers and complex numbers only where they are to be trained
            pairs.append((None if name is None else unwrapped_name(name), param))
    return pairs


def _several(params: Any) -> Iterable[Any]:
    if isinstance(params, type) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be a module, or an iterable of parameters or groups, got {shown(params)}; pass the model, or model.parameters()"
        )
    return params


def _check(params: Sequence[Tensor]) -> None:
    if not params:
        raise ValueError("params holds no floating-point parameter: there is nothing to optimize")
    seen: set[Tensor] = set()
    for p in params:
        if is_lazy(p):
            raise ValueError("params holds parameters of lazy modules that have no shape yet; call the model on a batch first")
        if p in seen:
            raise ValueError(f"two groups of params hold the same parameter (shape {tuple(p.shape)}); put it into one of them")
        seen.add(p)
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(
                f"params holds a tensor that was computed (shape {tuple(p.shape)}), no leaf; pass what it was computed from"
            )
        if p.is_complex():
            raise TypeError(
                f"params holds a complex parameter that trains (shape {tuple(p.shape)}): let the model hold a real one with a last dimension "
                "of 2, and take torch.view_as_complex of it in forward; or freeze it"
            )
        if p.layout != torch.strided:
            raise TypeError(f"params holds a parameter of layout {p.layout}; only dense (strided) parameters are supported")


class ModuleGroups(list[dict[str, Any]]):
    """Parameter groups that remember the module they come from, so that an optimizer can protect its second passes."""

    def __init__(self, groups: Iterable[dict[str, Any]], module: nn.Module | None):
        super().__init__(groups)
        self.module = module


def _leaves_of(owner: str, model: nn.Module | Iterable[tuple[str, Tensor]]) -> list[Leaf]:
    """Of a model, or of named parameters."""
    pairs = _named(model, [])
    if any(name is None for name, _ in pairs):
        raise TypeError(
            f"{owner}: model must be a module or named parameters; of these the names are not known: pass the model itself"
        )
    models = Models([model] if isinstance(model, nn.Module) else [])
    named = [(n, p) for n, p in pairs if n is not None]
    return models.leaves([{"params": [p for _, p in named], "param_names": [n for n, _ in named]}])


def decay_groups(model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float) -> ModuleGroups:
    """Two parameter groups: matrices and kernels with decay; embeddings and all that is one-dimensional or a number without.

    Args:
        model: a module, or named parameters, of which embeddings are not known.
        weight_decay: of the first group; the second has 0.

    Returns:
        A list of groups for any optimizer; recipes given it know the module too. A group without parameters is left out.

    Raises:
        TypeError: for parameters without names.
        ValueError: for a decay that is negative.

    Example:
        >>> groups = decay_groups(torch.nn.Linear(3, 2), 0.1)
        >>> [(g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
        [(0.1, ['weight']), (0.0, ['bias'])]
    """
    checks.non_negative("decay_groups", weight_decay=weight_decay)
    leaves = _leaves_of("decay_groups", model)
    split: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for leaf in leaves:
        split[is_decayed(leaf)].append((leaf.name, leaf.param))
    groups = [{"params": split[True], "weight_decay": weight_decay}, {"params": split[False], "weight_decay": 0.0}]
    return ModuleGroups([g for g in groups if g["params"]], model if isinstance(model, nn.Module) else None)


def role_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    lr: float,
    *,
    embedding: float = 1.0,
    output: float = 1.0,
    vector: float = 1.0,
    **options: Any,
) -> ModuleGroups:
    """A parameter group for each role that occurs, with steps of its own length; every recipe takes them, and schedulers scale them alike.

    A layer has one role, with its bias: tables of embeddings; matrices that make the outputs, by their names (:func:`is_hidden`); other
    matrices, which take ``lr`` itself; and vectors, those of normalization layers among them. What several modules share takes ``lr``.

    Args:
        model: a module, or named parameters.
        lr: of hidden matrices.
        embedding, output, vector: what multiplies it for the others.
        options: further options of all groups.

    Returns:
        A list of groups for any optimizer; recipes given it know the module too.

    Raises:
        TypeError: for parameters without names.
        ValueError: for a rate or factor that is negative.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> [(g["lr"], [name for name, _ in g["params"]]) for g in role_groups(model, 0.01, embedding=10.0)]
        [(0.01, ['1.weight', '1.bias']), (0.1, ['0.weight']), (0.01, ['2.weight', '2.bias'])]
    """
    scales = {"hidden": 1.0, "embedding": embedding, "output": output, "vector": vector}
    for role, scale in scales.items():
        checks.non_negative("role_groups", **{role: scale})
    checks.learning_rate("role_groups", lr)
    leaves = _leaves_of("role_groups", model)
    of_layer: dict[tuple[str, ...], str] = {}
    for leaf in sorted(leaves, key=lambda leaf: -leaf.ndim):  # matrices decide for their biases
        of_layer.setdefault(leaf.holders, _role(leaf))
    split: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in scales}
    for leaf in leaves:
        split[of_layer[leaf.holders]].append((leaf.name, leaf.param))
    groups = [{"params": split[role], "lr": lr * scale, **options} for role, scale in scales.items() if split[role]]
    return ModuleGroups(groups, model if isinstance(model, nn.Module) else None)


def _role(leaf: Leaf) -> str:
    if leaf.shared and leaf.kind == "embedding":
        return "hidden"
    if leaf.kind == "embedding" or not is_matrix(leaf):
        return "embedding" if leaf.kind == "embedding" else "vector"
    return "hidden" if is_hidden(leaf) else "output"
