"""The text is the same every time, and windows do not cross from one module or part into another."""

import pytest
import torch

from precond.lab.workloads.idx import DataError
from precond.lab.workloads.text import ALPHABET, library_text, windows


def spelled(row: torch.Tensor) -> str:
    return "".join(ALPHABET[i] for i in row.tolist())


def test_the_alphabet() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 96
    assert set(ALPHABET) == {chr(i) for i in range(32, 127)} | {"\n"}


def test_windows_by_hand() -> None:
    texts = [f"module {i}: abcdé\n" for i in range(10)]
    parts = windows(texts, context=4, characters=1000)
    assert [spelled(row) for row in parts["validation"].inputs] == ["modu", "le 8", ": ab"]
    assert [spelled(row) for row in parts["validation"].targets] == ["odul", "e 8:", " abc"]
    assert [spelled(row) for row in parts["test"].inputs] == ["modu", "le 9", ": ab"]
    assert len(parts["train"]) == 8 * 3
    # Fifteen characters of each module are left (é is not), so that 140 end with the fifth of the last one.
    assert [spelled(row) for row in windows(texts, 4, 140)["test"].targets] == ["odul"]


def test_too_little_text() -> None:
    with pytest.raises(DataError, match="too little text for windows of 4 characters in three parts"):
        windows(["abcdefgh"] * 9, 4, 1000)


def test_the_librarys_text_is_the_same_again() -> None:
    once, again = library_text(64, 200_000), library_text(64, 200_000)
    for name in ("train", "validation", "test"):
        assert torch.equal(once[name].inputs, again[name].inputs)
        assert once[name].inputs.shape == once[name].targets.shape
        assert torch.equal(once[name].inputs[:, 1:], once[name].targets[:, :-1])
        assert len(once[name]) > 20
    assert sum(map(len, once.values())) * 64 <= 200_000
    assert "import" in "".join(spelled(row) for row in once["train"].inputs[:50])
