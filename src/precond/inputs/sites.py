"""Sites: a weight, its bias, and all the taps at which its inputs are seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from precond.inputs.attention import AttentionTap
from precond.inputs.conv import ConvTap
from precond.inputs.moments import Request
from precond.inputs.taps import LinearTap, Tap, Weight
from precond.maps import Layout
from precond.sharding import flattened

_TAPS: list[tuple[type[nn.Module], type[Tap]]] = [
    (nn.MultiheadAttention, AttentionTap),
    (nn.modules.conv._ConvNd, ConvTap),
    (nn.Linear, LinearTap),
]
_UNSEEN = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


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

    def shape(self, request: Request) -> tuple[int, int]:
        """(groups, features) of the statistics of a request."""
        layout = self.layout(request)
        return layout.groups, layout.inputs(self.weight.shape) // layout.repeat

    def layout(self, request: Request) -> Layout:
        """How the weight is seen by statistics of a request."""
        tap, weight = self.taps[0]
        return tap.layout(weight, request)


@dataclass(frozen=True)
class Survey:
    """What can be observed in a model.

    Attributes:
        sites: the weights.
        passed_by: names of modules with weights that cannot be observed, with the reason.
    """

    sites: tuple[Site, ...]
    passed_by: tuple[tuple[str, str], ...]


def survey(modules: Iterable[tuple[str, nn.Module]]) -> Survey:
    """Find the sites among named modules (of ``named_modules(remove_duplicate=False)`` or several such)."""
    taps: dict[Tensor, list[tuple[str, Tap, Weight]]] = {}
    others: dict[Tensor, str] = {}
    passed_by: list[tuple[str, str]] = []
    known: set[nn.Module] = set()
    for path, module in modules:
        if module in known:
            continue
        known.add(module)
        tap = _tap(module)
        seen: set[Tensor] = set()
        if flattened(module):
            raise TypeError(
                f"FSDP1 ({path or 'the model'!r}) flattens parameters, whose rows no layer's inputs belong to: "
                "shard with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if parametrize.is_parametrized(module):
            passed_by.append((path, "is parametrized: its weight is computed, not a parameter"))
        elif isinstance(module, _UNSEEN):
            passed_by.append((path, f"is a {type(module).__name__}, whose weights have no inputs of one layer"))
        elif tap is not None:
            if any(not isinstance(w.param, nn.Parameter) for w in tap.weights):
                passed_by.append((path, "computes its weight from other parameters"))
                continue
            for weight in tap.weights:
                seen.add(weight.param)
                taps.setdefault(weight.param, []).append((path, tap, weight))
            if isinstance(module, nn.MultiheadAttention):
                known.add(module.out_proj)  # never called as a module
        for own in module._parameters.values():
            if own is not None and own not in seen and not (tap is not None and own.ndim == 1):
                others[own] = path
    sites = []
    for param, found in taps.items():
        path, first, weight = found[0]
        alike = all(type(t) is type(first) and _shape(t, w) == _shape(first, weight) for _, t, w in found)
        if param in others or not alike:
            passed_by.append((path, "shares its weight with a layer that has other inputs"))
            continue
        bias = weight.bias if all(w.bias is weight.bias for _, _, w in found) else None
        attribute = next((n for n, p in first.module.named_parameters() if p is param), "weight")
        sites.append(Site(f"{path}.{attribute}".lstrip("."), param, bias, weight.rows, tuple((t, w) for _, t, w in found)))
    return Survey(tuple(sites), tuple(passed_by))


def _tap(module: nn.Module) -> Tap | None:
    return next((tap(module) for kind, tap in _TAPS if isinstance(module, kind)), None)


def _shape(tap: Tap, weight: Weight) -> Layout:
    return tap.layout(weight, Request(conv="patch"))
