"""Workloads by name."""

from __future__ import annotations

from pathlib import Path

from precond.lab.workloads.data import DataSet
from precond.lab.workloads.factory import Factory, import_factory
from precond.lab.workloads.fashion_mnist import fashion_mnist
from precond.lab.workloads.models import Architecture
from precond.lab.workloads.packaged import PACKAGED
from precond.lab.workloads.problem import BuiltIn, Workload
from precond.lab.workloads.suggestions import did_you_mean

DATA = (*PACKAGED, "fashion-mnist")
"""Names of the data sets."""


def load_data(name: str, *, folder: Path | None = None, examples: int | None = None, seed: int = 0) -> DataSet:
    """A data set by name.

    Args:
        name: one of :data:`DATA`.
        folder: where the files of ``fashion-mnist`` are; None: where Debian puts them.
        examples: train on a stratified sample of so many examples; None: on all.
        seed: of the split and the sample.

    Raises:
        ValueError: for an unknown name (the message offers the nearest) or more examples than there are.
        DataError: for files that are absent or damaged.
    """
    if name not in DATA:
        module, _, function = name.rpartition(".")
        meant = f"; did you mean '{module}:{function}'?" if module and function else did_you_mean(name, DATA)
        raise ValueError(f"unknown data {name!r}{meant} (there are {', '.join(DATA)}, and any package.module:factory)")
    data = fashion_mnist(folder, seed) if name == "fashion-mnist" else PACKAGED[name](seed)
    return data if examples is None else data.limited(examples, seed)


def load_workload(
    name: str,
    architecture: Architecture,
    *,
    batch_size: int,
    device: str = "cpu",
    folder: Path | None = None,
    examples: int | None = None,
    seed: int = 0,
) -> Workload:
    """A workload by name: a data set with a model, or a user's ``package.module:factory``.

    Raises:
        ValueError: for an unknown name or a model that does not fit.
        FactoryError: where the factory cannot be imported.
        DataError: for files that are absent or damaged.
    """
    if ":" in name:
        return Factory(name, import_factory(name), device)
    data = load_data(name, folder=folder, examples=examples, seed=seed)
    return BuiltIn(data.to(device), architecture, batch_size, device)
