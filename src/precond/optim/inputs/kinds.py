"""The kinds of layers whose inputs are observed, and how a user adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from precond.algebra import checks
from precond.algebra.maps import ExpertLayout, Layout
from precond.optim.inputs.attention import AttentionTap
from precond.optim.inputs.bilinear import BilinearTap
from precond.optim.inputs.conv import ConvTap
from precond.optim.inputs.experts import HFExpertsTap, is_hf_experts
from precond.optim.inputs.moments import Request, Rows
from precond.optim.inputs.reading import Unreadable, argument, plain
from precond.optim.inputs.recurrent import CellTap, RecurrentTap
from precond.optim.inputs.taps import LinearTap, Tap, Weight

Axes = Literal["oi", "io", "eoi", "eio"]
Kind = type[nn.Module] | str | Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Observed:
    """A weight of a kind of layer, and the inputs that its rows meet: what :func:`register_layer` takes.

    Args:
        weight: its name in the module.
        bias: of the bias that is added to its product, or None; a module that has none of that name has no bias.
        axes: what its dimensions are: outputs and inputs, ``"oi"`` as in ``nn.Linear`` or ``"io"``; with experts first, ``"eoi"`` or
            ``"eio"``.
        inputs: ``(module, *args, **kwargs)``, the module's call, ↦ what the weight is multiplied with: a tensor whose last dimension
            is the inputs'; with experts a tensor whose first dimension is theirs, or one tensor for each (:func:`routed` makes them).
            None: the one argument of the call that has this shape.

    Raises:
        ValueError: for axes of another form.

    Example:
        >>> import torch, precond
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.W = torch.nn.Parameter(torch.eye(2))
        ...
        ...     def forward(self, x):
        ...         return (2 * x) @ self.W
        >>> handle = precond.register_layer(Twice, precond.Observed("W", bias=None, axes="io", inputs=lambda layer, x: 2 * x))
        >>> model = Twice()
        >>> with precond.optim.inputs.observe(model) as observation:
        ...     _ = model(torch.ones(3, 2))
        ...     print(observation.collect()[model.W].mean)
        tensor([[2., 2.]])
        >>> handle.remove()
    """

    weight: str = "weight"
    bias: str | None = "bias"
    axes: Axes = "oi"
    inputs: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        checks.one_of("Observed", "axes", self.axes, get_args(Axes))

    def layout(self, weight: Tensor) -> Layout:
        """How the weight is seen as (groups, rows, n)."""
        transposed = self.axes.endswith("io")
        return ExpertLayout(weight.shape[0], transposed) if self.axes[0] == "e" else Layout(1, transposed)


class RegisteredTap(Tap):
    """What :class:`Observed` says of a module."""

    def __init__(self, module: nn.Module, observed: tuple[Observed, ...]):
        super().__init__(module)
        self.observed = observed

    @property
    def weights(self) -> list[Weight]:
        bias = lambda name: None if name is None else getattr(self.module, name, None)  # noqa: E731
        return [Weight(getattr(self.module, o.weight), bias(o.bias), slot=k) for k, o in enumerate(self.observed)]

    @property
    def refused(self) -> list[tuple[Tensor, str]]:
        found = [(w.param, len(o.axes)) for o, w in zip(self.observed, self.weights, strict=True)]
        return [(p, f"has {p.ndim} dimensions, not the {n} of its kind") for p, n in found if p.ndim != n]

    def layout(self, weight: Weight, request: Request) -> Layout:
        return self._of(weight).layout(weight.param)

    def _of(self, weight: Weight) -> Observed:
        return self.observed[weight.slot]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs  # each weight may meet another input

    def _met(self, seen: Any, weight: Weight) -> Any:
        (args, kwargs), found = seen, self._of(weight).inputs
        if found is not None:
            return found(self.module, *args, **kwargs)
        n = self.layout(weight, Request()).inputs(weight.param.shape)
        return argument(self.module, args, kwargs, lambda t: t.shape[-1] == n)

    def rows(self, seen: Any, weight: Weight) -> Rows:
        layout, met = self.layout(weight, Request()), self._met(seen, weight)
        n = layout.inputs(weight.param.shape)
        if not isinstance(layout, ExpertLayout):
            return _flat(met, n)[None]
        if len(met) != layout.groups:
            raise Unreadable(f"has {layout.groups} experts, for which `inputs` of its kind made {len(met)} tensors")
        return tuple(_flat(x, n) for x in met)

    def origin(self, seen: Any, weight: Weight) -> Tensor | str:
        met = self._met(seen, weight)
        return met if isinstance(met, Tensor) else next((x for x in met if len(x)), "data")


def _flat(x: Any, n: int) -> Tensor:
    """A tensor (…, n) as rows."""
    if isinstance(x, Tensor) and not x.numel():
        return x.detach().reshape(0, n)
    found = plain(x)
    if found is None or found.shape[-1:] != (n,):
        raise Unreadable(f"has {n} inputs, of which `inputs` of its kind made a tensor of shape {tuple(x.shape)}")
    return found.detach().reshape(-1, n)


@dataclass(frozen=True)
class _Registered:
    kind: Kind
    tap: Callable[[nn.Module], Tap]

    def has(self, module: nn.Module) -> bool:
        if isinstance(self.kind, type):
            return isinstance(module, self.kind)
        if isinstance(self.kind, str):
            return any(self.kind in (c.__name__, f"{c.__module__}.{c.__qualname__}") for c in type(module).__mro__)
        return bool(self.kind(module))


def _is_hf_conv1d(module: nn.Module) -> bool:
    """GPT-2's layers: a product with a weight (in, out), by the name of the class, so that nothing need be imported."""
    weight = getattr(module, "weight", None)
    named = any(c.__name__ == "Conv1D" for c in type(module).__mro__)
    return named and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == getattr(module, "nf", None)


_KINDS: list[_Registered] = [
    _Registered(nn.MultiheadAttention, AttentionTap),
    _Registered(nn.modules.conv._ConvNd, ConvTap),
    _Registered(nn.Linear, LinearTap),
    _Registered(nn.Bilinear, BilinearTap),
    _Registered(nn.RNNBase, RecurrentTap),
    _Registered(nn.RNNCellBase, CellTap),
    _Registered(_is_hf_conv1d, lambda module: RegisteredTap(module, (Observed(axes="io"),))),
    _Registered(is_hf_experts, HFExpertsTap),
]
"""The first that has a module is its kind."""


class Registration:
    """What :func:`register_layer` returns; :meth:`remove` takes it back.

    Args:
        registered: the kind, with what is observed of it.
    """

    def __init__(self, registered: _Registered):
        self._registered = registered

    def remove(self) -> None:
        """Forget the kind; optimizers that exist keep what they observe."""
        if self._registered in _KINDS:
            _KINDS.remove(self._registered)


def register_layer(kind: Kind, *weights: Observed, tap: Callable[[nn.Module], Tap] | None = None) -> Registration:
    """Say what the weights of a kind of layer are multiplied with, so that their inputs are observed.

    It holds for optimizers that are made afterwards, and for :func:`~precond.diagnose`. What is registered last goes first, so that a
    subclass of a known layer, or a known layer itself, may be given another meaning.

    Args:
        kind: a class of modules, the name of one (``"Conv1D"``, ``"package.module.Class"``), which then need not be imported, or a
            predicate of modules.
        weights: what is observed; none: ``weight`` (outputs, inputs) and ``bias``, with the one argument of the call that fits.
        tap: in place of ``weights``, a subclass of :class:`precond.optim.inputs.Tap`, such as :class:`precond.optim.inputs.OneHot`.

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError: for a kind that is no class, name or predicate, or weights that are not :class:`Observed`.
        ValueError: for both ``weights`` and ``tap``.

    Example:
        >>> import torch, precond
        >>> class Scaled(torch.nn.Module):  # a kind of layer that nobody knows
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.W = torch.nn.Parameter(torch.eye(2))
        ...
        ...     def forward(self, x, scale):
        ...         return (scale * x) @ self.W
        >>> handle = precond.register_layer(Scaled, precond.Observed("W", None, "io", lambda layer, x, scale: scale * x))
        >>> model = Scaled()
        >>> optimizer = precond.bnp(model, lr=1.0, decay=0.0, damping=0.0)
        >>> model(torch.tensor([[1.0, 100.0]]), 2.0).sum().backward()
        >>> optimizer.step()
        >>> model.W.tolist()  # W − g/E[h²], h = (2, 200), with g = h for each output
        [[0.5, -0.5], [-0.004999999888241291, 0.9950000047683716]]
        >>> handle.remove()
    """
    if tap is not None and weights:
        raise ValueError("register_layer: `tap` stands in place of `weights`; pass one of them")
    if not (isinstance(kind, (type, str)) or callable(kind)):
        raise TypeError(f"register_layer: kind must be a class of modules, its name or a predicate, got {kind!r}")
    if bad := [w for w in weights if not isinstance(w, Observed)]:
        raise TypeError(f"register_layer: weights must be precond.Observed(...), got {bad[0]!r}")
    observed = weights or (Observed(),)
    registered = _Registered(kind, (lambda module: RegisteredTap(module, observed)) if tap is None else tap)
    _KINDS.insert(0, registered)
    return Registration(registered)


def tap_of(module: nn.Module) -> Tap | None:
    """The tap of a module's kind; None where that is not known."""
    return next((registered.tap(module) for registered in _KINDS if registered.has(module)), None)


def inputs_first(module: nn.Module, param: Tensor) -> bool:
    """Whether a parameter of a module is a weight (in, out, …), by the module's kind."""
    tap = tap_of(module) if param.ndim > 1 else None
    if tap is None:
        return False
    try:
        layouts = [tap.layout(w, Request("covariance", "patch")) for w in tap.weights if w.param is param]
    except AttributeError:
        return False
    return any(layout.transposed and not isinstance(layout, ExpertLayout) for layout in layouts)
