"""IDX files, good and damaged, and Fashion-MNIST made of them."""

import gzip
from pathlib import Path

import pytest
import torch

from fashion import idx, written
from precond.lab.workloads import DataError, load_data, read_idx

IMAGES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
GOOD = idx(IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_what_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(GOOD, mtime=0) if suffix else GOOD)
    assert torch.equal(read_idx(path, 3), IMAGES)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("truncated", GOOD[:-5], "expected 24 entries of shape 2 x 3 x 4, found 19"),
        ("longer", GOOD + b"x", "expected 24 entries of shape 2 x 3 x 4, found 25"),
        ("header", GOOD[:7], "expected a header of 16 bytes, found 7"),
        ("labels", idx(torch.zeros(4, dtype=torch.uint8)), "magic number 00000803.*found 00000801"),
        ("text", b"<html>not found</html>", "found 3c68746d"),
        ("empty", b"", "found an empty file"),
        ("cut.gz", gzip.compress(GOOD, mtime=0)[:-9], "expected a complete gzip file"),
        ("plain.gz", GOOD, "expected a complete gzip file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


def white(folder: Path, labels: torch.Tensor | None = None) -> Path:
    images = torch.full((200, 28, 28), 255, dtype=torch.uint8)
    return written(folder, images, torch.arange(200, dtype=torch.uint8) % 10 if labels is None else labels)


def test_fashion_mnist_from_a_folder(tmp_path: Path) -> None:
    data = load_data("fashion-mnist", folder=white(tmp_path))
    assert {name: len(part) for name, part in data.parts.items()} == {"train": 160, "validation": 40, "test": 200}
    assert data.parts["test"].inputs.shape == (200, 1, 28, 28)
    assert data.parts["test"].inputs.max() == 1


def test_fashion_mnist_absent_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*--data-dir"):
        load_data("fashion-mnist", folder=tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(7, dtype=torch.uint8), "as the 200 images, found 7"),
        (torch.full((200,), 77, dtype=torch.uint8), "found 77"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_data("fashion-mnist", folder=white(tmp_path, labels))
