"""Splits are deterministic, disjoint, stratified."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precond.lab.workloads import load_data
from precond.lab.workloads.splits import split, strata

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}


@given(st.lists(st.integers(0, 3), min_size=40, max_size=200), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_parts_are_disjoint_cover_all_and_keep_shares(labels: list[int], seed: int) -> None:
    y = torch.tensor(labels)
    parts = split(y, FRACTIONS, seed)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(len(y)))
    for name, indices in parts.items():
        for label in y.unique():
            share = (y[indices] == label).sum() / (y == label).sum()
            assert abs(share - FRACTIONS[name]) <= 1 / (y == label).sum() + 1e-6


def test_the_seed_decides() -> None:
    y = torch.arange(100) % 5
    same, other = split(y, FRACTIONS, 1), split(y, FRACTIONS, 2)
    assert all(torch.equal(split(y, FRACTIONS, 1)[k], same[k]) for k in same)
    assert not torch.equal(same["test"], other["test"])


def test_values_are_stratified_by_decile() -> None:
    y = torch.rand(200, 1)
    assert strata(y).bincount().tolist() == [20] * 10
    assert y[strata(y) == 0].max() <= y[strata(y) == 9].min()


@pytest.mark.parametrize(
    ("fractions", "words"),
    [({"a": 0.7, "b": 0.7}, "sum to at most 1"), ({"a": 0.0}, "must be > 0"), ({"a": 0.01}, "part 'a' of 4 examples is empty")],
)
def test_bad_fractions(fractions: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(torch.zeros(4, dtype=torch.long), fractions, 0)


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "largest"),
    [
        ("digits", (1, 8, 8), (1078, 360, 359), 16),
        ("wine", (13,), (107, 36, 35), 1680),
        ("breast-cancer", (30,), (341, 114, 114), 4254),
        ("diabetes", (10,), (265, 89, 88), 301),
    ],
)
def test_packaged_sets_are_raw(name: str, shape: tuple[int, ...], sizes: tuple[int, ...], largest: float) -> None:
    data = load_data(name)
    assert data.input_shape == shape
    assert max(abs(len(part) - n) for part, n in zip(data.parts.values(), sizes, strict=True)) <= 3
    assert max(part.inputs.max().item() for part in data.parts.values()) == pytest.approx(largest, rel=0.01)
    if data.task == "regression":
        assert data.parts["train"].targets.mean().item() == pytest.approx(0, abs=1e-5)


def test_a_sample_of_the_training_part() -> None:
    data = load_data("digits", examples=100)
    assert abs(len(data.parts["train"]) - 100) <= 5
    assert "sample" in data.about
    with pytest.raises(ValueError, match="between 1 and the"):
        load_data("wine", examples=10_000)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_data("digit")
