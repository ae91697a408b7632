r"""The mean loss of a model over a full data set, as a function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from precond.algebra import checks, vec
from precond.algebra.vec import Vec
from precond.analysis.curvature import batches
from precond.analysis.curvature.errors import NoSecondDerivative
from precond.analysis.curvature.forward import carried_along
from precond.analysis.curvature.isolation import Mode, isolated, random_states
from precond.analysis.curvature.selection import chosen_parameters, parameters_named


@dataclass(frozen=True)
class Evaluation:
    """One batch, forwarded.

    Attributes:
        inputs: of the batch, on the model's device.
        targets: of the batch.
        outputs: what the model returned.
        loss: ℓ_b, as the loss function gave it.
        loss_fn: the loss function.
        again: the state in which it was forwarded, for passes that come later.
        along: (v, J v), how the outputs change along a vector, where one was given.
    """

    inputs: Any
    targets: Any
    outputs: Any
    loss: Tensor
    loss_fn: Callable[[Any, Any], Tensor]
    again: Callable[[], AbstractContextManager[None]]
    along: tuple[Vec, Tensor] | None = None

    def relossed(self, outputs: Tensor) -> Tensor:
        """ℓ_b as a function of the outputs alone."""
        return self.loss_fn(outputs, self.targets).reshape(())


class Objective:
    r"""L(p) = Σ_b w_b ℓ_b(p), the mean loss over all batches b of ``data``.

    Where the loss function averages over its batch, w_b = n_b / Σn, so that batches of unequal size count by their size.
    Nothing about the model changes by measuring: modes, ``.grad``, buffers and random state are as before.

    Args:
        model: any module whose backward can be differentiated.
        loss_fn: a function of (outputs, targets) that returns one number; a penalty on the parameters may be part of it.
        data: batches (inputs, targets): a list, a ``DataLoader`` (read once and kept), one pair of tensors, or a sequence that
            loads from disk. Inputs are a tensor, or a tuple or dictionary of the model's arguments.
        params: parameters of the model, or their names or patterns of names (``"0.*"``); None: all that require a gradient.
        reduction: what ``loss_fn`` does over its batch, ``"mean"`` or ``"sum"`` (then w_b = 1/Σn).
        mode: ``"eval"`` (no dropout, running statistics), ``"train"`` (the batch's own statistics), or ``"unchanged"``.
        seed: of the random numbers that a forward in training mode draws (dropout), the same in every pass; such a forward is
            refused without one.
        size: a function of (inputs, targets) that gives n_b, where it is not the first dimension of the first tensor: for
            example the number of tokens that are not masked.

    Raises:
        TypeError, ValueError: for data that yields nothing, single examples or batches of different structure, parameters that
            do not exist, are frozen or are complex, a loss that is not one number.

    Example:
        >>> from precond.analysis.curvature import hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> half_square = lambda out, y: 0.5 * (out - y).square().mean()
        >>> hessian(Objective(model, half_square, [(x, torch.zeros(2, 1))])).to_dense()  # XXᵀ/N
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        params: Iterable[Tensor | str] | Tensor | str | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        mode: Mode = "eval",
        seed: int | None = None,
        size: Callable[[Any, Any], float] | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Objective: model must be an nn.Module, got {type(model).__name__}")
        for name, value, choices in (("reduction", reduction, ("mean", "sum")), ("mode", mode, get_args(Mode))):
            if value not in choices:
                raise ValueError(f"Objective: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        self.model, self.loss_fn, self.batches = model, loss_fn, batches.kept(data)
        self.reduction, self.mode, self.seed, self._size = reduction, mode, seed, size
        self.names, self.params = chosen_parameters(model, params)
        self.dtype: torch.dtype | None = None
        self._twins: dict[int, Tensor] = {}
        self._structure = batches.structure(batches.checked(self.batches[0], 0))

    @property
    def device(self) -> torch.device:
        """Where the first parameter is; batches are moved there."""
        return self.params[0].device

    @property
    def originals(self) -> Vec:
        """The model's own parameters that :attr:`params` are, or are the copies of (:meth:`double`)."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        return tuple(own[name] for name in self.names)

    @cached_property
    def sizes(self) -> tuple[float, ...]:
        """n_b of each batch.

        Raises:
            ValueError: for a size that is not positive.
        """
        sizes = []
        for i in range(len(self.batches)):
            batch = self._batch(i)
            sizes.append(float(self._size(*batch) if self._size is not None else batches.size(batch, i)))
            if not sizes[-1] > 0:
                raise ValueError(
                    f"Objective: size must be positive, got {sizes[-1]} for batch {i} of data; leave the batch out"
                )
        return tuple(sizes)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """w_b."""
        return tuple((n if self.reduction == "mean" else 1.0) / self.total for n in self.sizes)

    def standing_for(self, t: Tensor) -> Tensor:
        """What stands in the place of a parameter of the model while this objective measures: itself, or its copy in float64."""
        return self._twins.get(id(t), t)

    @property
    def tensors(self) -> Vec:
        """Parameters and buffers that a loss is made of: the model's, and those of a loss function that is a module."""
        loss = (self.loss_fn,) if isinstance(self.loss_fn, nn.Module) else ()
        return tuple(self.standing_for(t) for m in (self.model, *loss) for t in (*m.parameters(), *m.buffers()))

    @cached_property
    def total(self) -> float:
        """N = Σn, the number of examples."""
        return sum(self.sizes)

    def only(self, params: Iterable[Tensor | str] | Tensor | str) -> Objective:
        """The same loss as a function of some of its parameters, the others being what they are.

        Args:
            params: parameters among :attr:`params`, or their names or patterns of names.
        """
        known = dict(zip(self.names, self.params, strict=True))
        other = copy.copy(self)
        chosen = parameters_named(known, params)
        other.names, other.params = tuple(chosen), tuple(chosen.values())
        return other

    def first(self, count: int) -> Objective:
        """The same loss on the first batches alone.

        Args:
            count: how many, one at least.
        """
        checks.positive("Objective.first", count=count)
        other = copy.copy(self)
        other.batches = [self.batches[i] for i in range(min(count, len(self.batches)))]
        for name in ("sizes", "weights", "total"):
            vars(other).pop(name, None)
        return other

    @contextmanager
    def measuring(self, index: int = 0) -> Iterator[None]:
        """The state in which batch ``index`` is evaluated; everything is as before afterwards."""
        seed = None if self.seed is None else self.seed + index
        loss = self.loss_fn if isinstance(self.loss_fn, nn.Module) else None
        with isolated(self.model, self.mode, [p.device for p in self.params], seed, self._twins, loss):
            yield

    def evaluate(self, index: int, along: Vec | None = None) -> Evaluation:
        """Batch ``index`` forwarded; call it inside :meth:`measuring`.

        Args:
            index: b.
            along: a vector aligned to ``params`` whose image under the Jacobian of the outputs is wanted as well.

        Raises:
            ValueError: for a forward that draws random numbers without a ``seed``, or a loss that is not one number.
        """
        inputs, targets = batches.moved(self._batch(index), self.device, self.dtype)
        devices = [p.device for p in self.params]
        before = random_states(devices) if self.seed is None else []
        forward, image = partial(_call, self.model, inputs), None
        if along is None:
            outputs = forward()
        else:
            outputs, image = carried_along(forward, self.model, self.params, along)
        loss = self.loss_fn(outputs, targets)
        if self.seed is None and not all(map(torch.equal, before, random_states(devices))):
            otherwise = "" if self.mode == "eval" else "use mode='eval', or "
            raise ValueError(
                f"Objective: the forward pass drew random numbers (mode={self.mode!r}{_dropouts(self.model)}), so the loss is not a "
                f"function of the parameters; {otherwise}give seed= to fix them"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Objective: loss_fn must return one number, got {found}; use reduction='mean' in the loss")
        known = None if along is None or image is None else (along, image)
        return Evaluation(inputs, targets, outputs, loss.reshape(()), self.loss_fn, partial(self.measuring, index), known)

    def value(self) -> float:
        """L(p)."""
        total = 0.0
        for i, w in enumerate(self.weights):
            with self.measuring(i), torch.no_grad():
                total += w * self.evaluate(i).loss.item()
        return total

    def gradient(self) -> Vec:
        """∇L(p), aligned to ``params``; ``.grad`` is left alone.

        Raises:
            NoSecondDerivative: for a loss that does not depend on the parameters at all.
        """
        total = vec.zeros_like(vec.map_(Tensor.detach, self.params))
        for i, w in enumerate(self.weights):
            with self.measuring(i):
                loss = w * depending(self.evaluate(i).loss)
                g = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
            total = vec.add(total, g)
        return total

    def double(self) -> Objective:
        """The same objective in float64: what small eigenvalues need (float32 loses λ_min from κ ≈ 1e5).

        The model itself stays as it is: while the new objective measures, float64 copies, made here, take the places of its
        parameters and buffers, also for a loss that refers to them. ``params`` are these copies.
        """
        if self._twins:
            return self
        other = copy.copy(self)
        other._twins = {id(t): _twin(t) for t in self.tensors if t.is_floating_point()}
        other.params = tuple(other._twins[id(p)] for p in self.params)
        other.dtype = torch.float64
        return other

    def _batch(self, index: int) -> batches.Batch:
        batch = batches.checked(self.batches[index], index)
        found = batches.structure(batch)
        if found != self._structure:
            raise ValueError(
                f"Objective: batch {index} of data is {found}, batch 0 is {self._structure}; give batches of one structure"
            )
        return batch


def depending(loss: Tensor) -> Tensor:
    """A loss that has a gradient.

    Raises:
        NoSecondDerivative: where it has none.
    """
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise NoSecondDerivative("the loss does not depend on the parameters; is it computed under no_grad or detached?")
    return loss


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _twin(t: Tensor) -> Tensor:
    copied = t.detach().to(torch.float64, copy=True)
    return nn.Parameter(copied, t.requires_grad) if isinstance(t, nn.Parameter) else copied


def _dropouts(model: nn.Module) -> str:
    active = [name for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    return f", {type(model.get_submodule(active[0])).__name__} {active[0]!r}" if active else ""
