"""The data sets that scikit-learn ships, with raw features: badly scaled on purpose, so that preconditioning has work to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from precond.lab.workloads.data import DataSet, Part, parts_of, standardized

_FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}
_SPLIT = "Stratified split 60/20/20 with seed {seed}."


def _load(name: str, **options: Any) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"the data set {name!r} comes with scikit-learn; install it: pip install 'precond[cli]'") from error
    return getattr(datasets, f"load_{name.replace('-', '_')}")(**options)


def _classes(name: str, about: str, shape: tuple[int, ...], seed: int) -> DataSet:
    raw = _load(name)
    inputs = torch.from_numpy(raw.data).float().reshape(-1, *shape)
    targets = torch.from_numpy(raw.target).long()
    parts = parts_of(Part(inputs, targets), _FRACTIONS, seed)
    return DataSet(name, "classification", parts, len(raw.target_names), f"{about} {_SPLIT.format(seed=seed)}")


def _diabetes(seed: int) -> DataSet:
    raw = _load("diabetes", scaled=False)
    whole = Part(torch.from_numpy(raw.data).float(), torch.from_numpy(raw.target).float()[:, None])
    about = (
        "Disease progression after a year from 10 raw measurements (442 patients); targets standardized by the training part."
    )
    parts = standardized(parts_of(whole, _FRACTIONS, seed))
    return DataSet("diabetes", "regression", parts, 1, f"{about} {_SPLIT.format(seed=seed)}")


PACKAGED: dict[str, Callable[[int], DataSet]] = {
    "digits": partial(
        _classes, "digits", "Handwritten digits, 8 x 8 pixels, raw values 0 to 16 (1797 images, 10 classes).", (1, 8, 8)
    ),
    "wine": partial(_classes, "wine", "13 raw chemical measurements, 0.13 to 1680 (178 wines, 3 classes).", (13,)),
    "breast-cancer": partial(
        _classes, "breast-cancer", "30 raw measurements of cell nuclei, 0 to 4254 (569 tumors, 2 classes).", (30,)
    ),
    "diabetes": _diabetes,
}
"""Data sets by name, as functions of the seed of the split."""
