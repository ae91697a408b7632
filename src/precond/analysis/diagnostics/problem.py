"""Models as they come, as objectives: Hugging Face's with the loss inside, Lightning's, plain ones; data as loaders of dicts or pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from precond.algebra.vec import Vec
from precond.analysis.curvature import Objective
from precond.analysis.curvature.batches import moved, size
from precond.analysis.curvature.forward import carried_along
from precond.analysis.curvature.objective import Evaluation
from precond.optim.checking.arguments import shown


class Inside(Objective):
    """L(p) of a model that computes its own loss from a batch.

    Args:
        model: the module.
        loss_of: (model, batch, number of the batch) ↦ loss.
        data: batches of any structure.
        options: as in :class:`~precond.Objective`.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, Any, int], Tensor], data: Iterable[Any], **options: Any):
        super().__init__(model, lambda loss, _: loss, [(batch, ()) for batch in data], **options)
        self._loss_of = loss_of

    def loss_of(self, inputs: Any, index: int) -> Tensor:
        """Of a batch, in the model's present mode."""
        return self._loss_of(self.model, inputs, index)

    def evaluate(self, index: int, along: Vec | None = None) -> Evaluation:
        inputs, _ = moved(self._batch(index), self.device, self.dtype)
        forward, image = partial(self.loss_of, inputs, index), None
        if along is None:
            loss = forward()
        else:
            loss, image = carried_along(forward, self.model, self.params, along)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"diagnose: the model's loss must be one number, got {_shown(loss)}")
        loss = loss.reshape(())
        known = None if along is None or image is None else (along, image.reshape(()))
        return Evaluation(inputs, (), loss, loss, self.loss_fn, partial(self.measuring, index), known)


def as_objective(
    model: Objective | nn.Module,
    data: Iterable[Any] | None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    examples: int = 2048,
) -> Objective:
    """An objective of a model and its data, as a training loop has them.

    Args:
        model: an :class:`~precond.Objective`, which stays as it is; a LightningModule, whose ``training_step`` gives the loss; a model that
            returns an object or a dict with ``loss`` when called with a batch (Hugging Face's); or any module, with ``loss_fn``.
        data: a loader or list of batches: pairs (inputs, targets), or dicts of the model's arguments.
        loss_fn: a function of (outputs, targets); of outputs and the whole batch where batches are dicts; None: the loss is the model's own.
        examples: of the loader so many are taken, in its order.

    Raises:
        TypeError, ValueError: for a model without data, or whose loss is not found.
    """
    if isinstance(model, Objective):
        if data is not None or loss_fn is not None:
            raise TypeError("diagnose: an Objective has its data and its loss; leave data= and loss_fn= out")
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose: needs an Objective or an nn.Module with data=, got {type(model).__name__}")
    if data is None:
        raise TypeError(
            "diagnose: a model needs data=, a loader or a list of batches, or give precond.Objective(model, loss, data)"
        )
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(
            f"diagnose: data must be a loader or a list of batches, got {shown(data)}; a data set goes into torch.utils.data.DataLoader"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"diagnose: loss_fn must be a function of (outputs, targets), got {shown(loss_fn)}; give nn.functional.mse_loss, say"
        )
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    batches = first_batches([data] if pair else data, examples)
    if not batches:
        raise ValueError("diagnose: data yields no batches")
    if loss_fn is not None:
        if isinstance(batches[0], Mapping):
            given = loss_fn
            return Inside(model, lambda m, batch, _: given(m(**batch), batch), batches)
        return Objective(model, loss_fn, batches)
    if callable(getattr(model, "training_step", None)):
        return Inside(model, _lightning, batches)
    _check_call(model, batches[0])
    return Inside(model, _own_loss, batches)


def _check_call(model: nn.Module, batch: Any) -> None:
    """Raise TypeError where a model that is to return its loss does not take a batch."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a model that is no Python
        return
    args, kwargs = (
        ((), batch) if isinstance(batch, Mapping) else (tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})
    )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        what = f"a dict of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"{len(args)} parts"
        raise TypeError(
            f"diagnose: {type(model).__name__} does not take a batch of data, {what}, to return its loss ({error}): give loss_fn=, a "
            "function of (outputs, targets)"
        ) from None


def first_batches(data: Iterable[Any], examples: int) -> list[Any]:
    """The first batches that hold so many examples."""
    found, count = [], 0
    for batch in data:
        found.append(batch)
        count += size((batch, ()), len(found) - 1)
        if count >= examples:
            break
    return found


def _lightning(model: nn.Module, batch: Any, index: int) -> Tensor:
    out = model.training_step(batch, index)  # type: ignore[operator]
    return out["loss"] if isinstance(out, Mapping) else out


def _own_loss(model: nn.Module, batch: Any, index: int) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        remedy = "put labels into the batches" if isinstance(batch, Mapping) else "give loss_fn="
        raise ValueError(f"diagnose: {type(model).__name__} returned no loss ({_shown(out)}); {remedy}, or give loss_fn=")
    return loss


def _shown(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
