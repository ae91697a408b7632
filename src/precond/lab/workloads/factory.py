"""A user's own model, loss and data: ``package.module:factory``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.batches import Batches, StreamBatches, moved
from precond.lab.workloads.problem import EVALUATED_TRAINING_EXAMPLES, LossFn, Metric, Problem, Workload
from precond.lab.workloads.suggestions import did_you_mean

PARTS = ("train", "validation", "test")
_WANTED = (
    "(model, loss_fn, data): an nn.Module, a function of (outputs, targets), and an iterable of (inputs, targets) batches "
    "or a dict of such iterables under 'train', 'validation', 'test'"
)


class FactoryError(ValueError):
    """A factory cannot be imported, fails, or returns something else than model, loss and data."""


def import_factory(name: str) -> Callable[[], Any]:
    """The function that ``package.module:factory`` names.

    Raises:
        FactoryError: where the module or the function is not found, or it cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise FactoryError(f"{name!r} names no function; write {module_name}:factory")
    if "/" in module_name or module_name.endswith(".py"):
        module = f"{PurePath(module_name).stem}:{attribute}"
        raise FactoryError(f"{name!r} names a file; run from the folder that holds it, and write {module}")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise FactoryError(
            f"cannot import {module_name!r} of {name!r}: {type(error).__name__}: {error}; run from the folder that holds it, "
            "or add that folder to PYTHONPATH"
        ) from error
    for step in attribute.split("."):
        if not hasattr(found, step):
            raise FactoryError(f"{module_name!r} has no {attribute!r}{did_you_mean(step, dir(found))}")
        found = getattr(found, step)
    if not callable(found):
        raise FactoryError(
            f"{name!r} is a {type(found).__name__}; it must be a function without arguments that returns {_WANTED}"
        )
    return found


@dataclass(frozen=True, eq=False)
class Factory(Workload):
    """What a user's function returns; it is called anew, after seeding, for every training.

    Args:
        name: ``package.module:factory``.
        make: the function, without required arguments.
        device: where model and batches are moved.
    """

    name: str
    make: Callable[[], Any]
    device: str = "cpu"

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"What {self.name} returns."

    def problem(self) -> Problem:
        """A fresh problem.

        Raises:
            FactoryError: where the function fails or returns something else than model, loss and data.
        """
        try:
            made = self.make()
        except Exception as error:
            raise FactoryError(f"{self.name}() failed: {type(error).__name__}: {error}") from error
        if not (isinstance(made, tuple | list) and len(made) == 3):
            raise self._error(f"returned {_described(made)}")
        model, loss_fn, data = made
        if not isinstance(model, nn.Module):
            raise self._error(f"returned a model of type {type(model).__name__}")
        if not callable(loss_fn):
            raise self._error(f"returned a loss of type {type(loss_fn).__name__}")
        if not any(p.requires_grad for p in model.parameters()):
            raise FactoryError(
                f"{self.name}: {type(model).__name__} has no parameter that requires a gradient; call requires_grad_() on some"
            )
        model, sources = model.to(self.device), self._sources(data)
        parts = self._parts(sources)
        return Problem(model, loss_fn, parts, self._metric(loss_fn, self._check(model, loss_fn, sources["train"])))

    @property
    def facts(self) -> Mapping[str, str]:
        return {"data": self.about}

    def _error(self, found: str) -> FactoryError:
        return FactoryError(f"{self.name}() must return {_WANTED}; it {found}")

    def _sources(self, data: Any) -> dict[str, Any]:
        """Batches by the name of their part; one pair of tensors is one batch."""
        sources = dict(data) if isinstance(data, Mapping) else {"train": data}
        unknown = set(sources) - set(PARTS)
        if unknown or "train" not in sources:
            raise self._error(f"returned a dict with the keys {sorted(map(str, sources))}")
        for name, source in sources.items():
            if not isinstance(source, Iterable) or isinstance(source, Tensor):
                raise self._error(f"returned {name} data of type {type(source).__name__}")
            if isinstance(source, Iterator):
                raise self._error(
                    f"returned {name} data that can be read only once ({type(source).__name__}); wrap it in a list"
                )
            if isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
                sources[name] = [source]
        return sources

    def _parts(self, sources: Mapping[str, Any]) -> dict[str, Batches]:
        limits = {"train": EVALUATED_TRAINING_EXAMPLES}
        found: dict[str, Batches] = {}
        for name, source in sources.items():
            try:
                found[name] = StreamBatches(source, self.device, limits.get(name))
            except ValueError as error:
                raise FactoryError(f"{self.name}: in the {name} data, {str(error).removeprefix('Objective: ')}") from error
            if not len(found[name]):
                raise self._error(f"returned {name} data without a batch")
        return found

    def _check(self, model: nn.Module, loss_fn: LossFn, source: Iterable[Any]) -> Tensor:
        """Targets of the first batch, after one evaluation on it."""
        first = next(iter(source), None)
        if first is None:
            raise self._error("returned data without a batch")
        if not (isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[1], Tensor) and first[1].ndim):
            raise self._error(f"returned data whose first batch is {_described(first)}")
        inputs, targets = moved(tuple(first), self.device)
        model.eval()
        try:
            with torch.no_grad():
                loss = loss_fn(model(inputs), targets)
        except Exception as error:
            raise FactoryError(
                f"the model and loss of {self.name} fail on their first batch: {type(error).__name__}: {error}"
            ) from error
        finally:
            model.train()
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()):
            raise self._error(
                f"returned a loss function with the value {_described(loss)}; it must be one floating number, the mean"
            )
        if not loss.isfinite():
            raise FactoryError(
                f"{self.name}: the loss is {loss.item()} before the first step; look at the data, the loss function and the parameters"
            )
        return targets

    @staticmethod
    def _metric(loss_fn: LossFn, targets: Tensor) -> Metric | None:
        if isinstance(loss_fn, nn.MSELoss) or loss_fn is F.mse_loss:
            return "R²"
        classes = isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) or loss_fn in (F.cross_entropy, F.nll_loss)
        return "accuracy" if classes and not targets.is_floating_point() else None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    return f"{type(value).__name__} {value!r}"[:80]
