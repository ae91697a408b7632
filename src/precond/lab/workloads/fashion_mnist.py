"""Fashion-MNIST from a folder of IDX files."""

from __future__ import annotations

import os
from pathlib import Path

from precond.lab.workloads.data import DataSet, Part, parts_of
from precond.lab.workloads.idx import DataError, read_idx

FOLDER = Path(os.environ.get("FASHION_MNIST") or "/usr/share/datasets/fashion-mnist")
"""Where the files are if nobody says: ``$FASHION_MNIST``, or where Debian's package ``dataset-fashion-mnist`` puts them."""

_VALIDATION = 10_000


def fashion_mnist(folder: Path | None, seed: int) -> DataSet:
    """Fashion-MNIST (Xiao et al., 2017): pixels divided by 255; the official test part; 10,000 examples for validation.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and its three siblings, plain or ``.gz``; None: :data:`FOLDER`.
        seed: of the split.

    Raises:
        DataError: where files are absent or damaged.
    """
    folder = folder or FOLDER
    test, rest = _part(folder, "t10k"), _part(folder, "train")
    share = _VALIDATION / len(rest) if len(rest) > 2 * _VALIDATION else 0.2
    parts = {**parts_of(rest, {"train": 1 - share, "validation": share}, seed), "test": test}
    about = (
        "Fashion-MNIST, 28 x 28 pixels divided by 255 (10 classes); the official test part, and a stratified "
        f"{share:.0%} of the training part for validation, seed {seed}."
    )
    return DataSet("fashion-mnist", "classification", parts, 10, about)


def _part(folder: Path, prefix: str) -> Part:
    images = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: expected as many {prefix} labels as the {len(images)} images, found {len(labels)}")
    if len(labels) and labels.max() > 9:
        raise DataError(f"{folder}: expected {prefix} labels from 0 to 9, found {int(labels.max())}")
    return Part(images.unsqueeze(1).float() / 255, labels.long())


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"no {name} or {name}.gz in {folder}; get Fashion-MNIST on Debian or Ubuntu with `apt-get install "
        "dataset-fashion-mnist`, or name the folder of its four IDX files with --data-dir or in $FASHION_MNIST"
    )
