"""Sites: a weight, its bias, and all the taps at which its inputs are seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from precond.algebra.maps import Layout
from precond.algebra.sharding import flattened
from precond.optim.inputs.kinds import tap_of
from precond.optim.inputs.moments import Request
from precond.optim.inputs.roles import kind_of
from precond.optim.inputs.taps import Tap, Weight


@dataclass(frozen=True, eq=False)
class Site:
    """A weight whose inputs are observed.

    Attributes:
        name: qualified name of the weight.
        weight: the weight.
        bias: the bias that goes with it at every tap, or None where there is none or taps differ in it.
        rows: which entries of the bias.
        taps: where its inputs are seen; several for a tied weight, whose statistics are pooled.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    rows: slice
    taps: tuple[tuple[Tap, Weight], ...]

    def answers(self, request: Request) -> bool:
        """Whether it has the statistics of a request."""
        return all(tap.answers(request) for tap, _ in self.taps)

    def shape(self, request: Request) -> tuple[int, int]:
        """(groups, features) of the statistics of a request."""
        layout = self.layout(request)
        return layout.groups, layout.inputs(self.weight.shape) // layout.repeat

    def layout(self, request: Request) -> Layout:
        """How the weight is seen by statistics of a request."""
        tap, weight = self.taps[0]
        return tap.layout(weight, request)


@dataclass(frozen=True, eq=False)
class Passed:
    """Weights whose inputs cannot be observed.

    Attributes:
        name: of their module, or of the weight.
        why: continues "its inputs are not observed: it …".
        params: they, and what else the module has.
    """

    name: str
    why: str
    params: tuple[Tensor, ...]


@dataclass(frozen=True)
class Survey:
    """What can be observed in a model.

    Attributes:
        sites: the weights.
        passed_by: what cannot.
    """

    sites: tuple[Site, ...]
    passed_by: tuple[Passed, ...]

    def of(self, known: Mapping[Tensor, Tensor]) -> Survey:
        """The same with parameters in place of what stood in the modules for them."""
        if not known:
            return self
        own = lambda t: known.get(t, t)  # noqa: E731
        return Survey(
            tuple(replace(s, weight=own(s.weight), bias=None if s.bias is None else own(s.bias)) for s in self.sites),
            tuple(replace(passed, params=tuple(map(own, passed.params))) for passed in self.passed_by),
        )


def survey(modules: Iterable[tuple[str, nn.Module]]) -> Survey:
    """Find the sites among named modules (of ``named_modules(remove_duplicate=False)`` or several such).

    Args:
        modules: pairs (name, module); the same module may come twice.

    Returns:
        The weights whose inputs can be observed, and those whose cannot, each with the reason.

    Raises:
        TypeError: for a model that FSDP1 has flattened.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> [site.name for site in survey(model.named_modules(remove_duplicate=False)).sites]
        ['0.weight']
    """
    taps: dict[Tensor, list[tuple[str, Tap, Weight]]] = {}
    others: dict[Tensor, tuple[str, str, nn.Module]] = {}
    passed_by: list[Passed] = []
    computed: set[Tensor] = set()  # what other weights are made of
    known: set[nn.Module] = set()
    for path, module in modules:
        if module in known:
            continue
        known.add(module)
        if flattened(module):
            raise TypeError(
                f"FSDP1 ({path or 'the model'!r}) flattens parameters, whose rows no layer's inputs belong to: "
                "shard with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if isinstance(module, nn.MultiheadAttention):
            known.add(module.out_proj)  # never called as a module
        if parametrize.is_parametrized(module):
            known |= set(module.parametrizations.values())  # type: ignore[operator]
        tap, weights, why = _weights_of(module)
        refused = {} if tap is None or why else dict(tap.refused)
        if why:
            passed_by.append(Passed(path, why, tuple(module.parameters())))
            computed |= set(module.parameters())
            continue
        seen: set[Tensor] = set(refused)
        for weight in weights:
            seen |= {p for p in (weight.param, weight.bias) if p is not None}
            if weight.param not in refused:
                taps.setdefault(weight.param, []).append((path, tap, weight))  # type: ignore[arg-type]
        for name, own in module._parameters.items():
            if own is None:
                continue
            if own in refused:
                passed_by.append(Passed(f"{path}.{name}".lstrip("."), refused[own], (own,)))
            if own not in seen and not (weights and own.ndim == 1):
                others[own] = path, name, module
    passed_by += [_of_no_kind(own, *where) for own, where in others.items() if own not in taps and _is_matrix(own, *where)]
    sites = []
    for param, found in taps.items():
        path, first, weight = found[0]
        alike = all(type(t) is type(first) and _shape(t, w) == _shape(first, weight) for _, t, w in found)
        if param in others or param in computed or not alike:
            passed_by.append(Passed(path, "shares its weight with a layer that has other inputs", (param,)))
            continue
        bias = weight.bias if all(w.bias is weight.bias for _, _, w in found) else None
        attribute = next((n for n, p in first.module.named_parameters() if p is param), "weight")
        sites.append(Site(f"{path}.{attribute}".lstrip("."), param, bias, weight.rows, tuple((t, w) for _, t, w in found)))
    return Survey(tuple(sites), tuple(passed_by))


def _weights_of(module: nn.Module) -> tuple[Tap | None, list[Weight], str]:
    """The tap of a module, its weights, and why it has none where its kind would have."""
    tap = tap_of(module)
    if parametrize.is_parametrized(module):
        return tap, [], "is parametrized: its weight is computed, not a parameter"
    if tap is None:
        return None, [], ""
    try:
        weights = [w for w in tap.weights if w.param is not None]
    except AttributeError as error:
        return tap, [], f"has not the weights that its kind has ({error})"
    if any(not isinstance(w.param, nn.Parameter) for w in weights):
        return tap, [], "computes its weight from other parameters"
    return tap, weights, ""


def _is_matrix(param: Tensor, path: str, name: str, module: nn.Module) -> bool:
    """Whether one would take it for the weight of a layer, by its shape and its module: positions (1, n, d) are none."""
    rows = param.shape[0] if param.ndim else 1
    return rows > 1 and param.numel() > rows and kind_of(f"{path}.{name}", param, module) == "weight"


def _of_no_kind(param: Tensor, path: str, name: str, module: nn.Module) -> Passed:
    kind = type(module).__name__
    what = f"is in a {kind}, a kind of layer that is not known (precond.register_layer)"
    if any(True for _ in module.children()):
        what = f"is a parameter that {kind} has beside its layers, not the weight of one that is known (precond.register_layer)"
    return Passed(f"{path}.{name}".lstrip("."), what, (param,))


def _shape(tap: Tap, weight: Weight) -> Layout:
    return tap.layout(weight, Request(conv="patch"))
