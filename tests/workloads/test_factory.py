"""A user's own model, loss and data."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from precond.lab.workloads import Architecture, FactoryError, evaluate, load_workload
from precond.lab.workloads.factory import Factory

X, Y = torch.rand(20, 3), torch.arange(20) % 2
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]


class Lengthless(IterableDataset[Any]):
    """A data set that does not tell its length."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return iter(self.examples)


def good() -> Any:
    return nn.Linear(3, 2), F.cross_entropy, {"train": BATCHES, "test": DataLoader(TensorDataset(X, Y), 8)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package.at_all:make", "cannot import 'no_such_package.at_all'.*PYTHONPATH"),
        ("math:make", "'math' has no 'make'"),
        ("math:squrt", "did you mean 'sqrt'"),
        ("math:pi", "'math:pi' is a float; it must be a function"),
    ],
)
def test_what_cannot_be_imported(name: str, words: str) -> None:
    with pytest.raises(FactoryError, match=words):
        load_workload(name, Architecture(), batch_size=4)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (nn.Linear(3, 2), r"must return \(model, loss_fn, data\).*it returned Linear"),
        ((nn.Linear(3, 2), F.cross_entropy), "a tuple of 2"),
        ((3, F.cross_entropy, BATCHES), "a model of type int"),
        ((nn.Linear(3, 2), "mse", BATCHES), "a loss of type str"),
        ((nn.Linear(3, 2), F.cross_entropy, 7), "train data of type int"),
        ((nn.Linear(3, 2), F.cross_entropy, X), "train data of type Tensor"),
        ((nn.Linear(3, 2), F.cross_entropy, iter(BATCHES)), "can be read only once"),
        ((nn.Linear(3, 2), F.cross_entropy, {"training": BATCHES}), r"the keys \['training'\]"),
        ((nn.Linear(3, 2), F.cross_entropy, []), "without a batch"),
        ((nn.Linear(3, 2), F.cross_entropy, [X]), r"train data, batch 0 of data must be a pair"),
        (
            (nn.Linear(3, 2), F.cross_entropy, [*BATCHES, (X, Y, Y)]),
            r"train data, batch 2 of data must be a pair .* got 3 parts",
        ),
        ((nn.Linear(3, 2), F.cross_entropy, [*BATCHES, (X[:0], Y[:0])]), r"train data, batch 2 of data has 0 examples"),
        (
            (nn.Linear(3, 2), F.cross_entropy, {"train": BATCHES, "test": [(X[:0], Y[:0])]}),
            r"test data, batch 0 of data has 0 examples",
        ),
        ((nn.Linear(3, 2), F.cross_entropy, {"train": BATCHES, "validation": []}), "validation data without a batch"),
        (
            (nn.Linear(3, 2), F.cross_entropy, DataLoader(Lengthless([(X[0], Y[0]), (X[0],)]), 1)),
            r"train data, batch 1 of data must be a pair",
        ),
        ((nn.Linear(3, 2).requires_grad_(False), F.cross_entropy, BATCHES), "Linear has no parameter that requires a gradient"),
        ((nn.Linear(3, 2), F.cross_entropy, [(X / 0, Y)]), "the loss is nan before the first step"),
        ((nn.Linear(4, 2), F.cross_entropy, BATCHES), "fail on their first batch: RuntimeError"),
        ((nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="none"), BATCHES), "it must be one floating number"),
    ],
)
def test_what_is_no_model_loss_and_data(made: Any, words: str) -> None:
    with pytest.raises(FactoryError, match=words):
        Factory("mine:make", lambda: made).problem()


def test_a_failing_factory_is_named() -> None:
    with pytest.raises(FactoryError, match=r"mine:make\(\) failed: ZeroDivisionError"):
        Factory("mine:make", lambda: 1 / 0).problem()


def test_scores_weigh_batches_by_size() -> None:
    problem = Factory("mine:make", good).problem()
    assert (problem.metric, len(problem.parts["train"])) == ("accuracy", 2)
    whole = F.cross_entropy(problem.model(X), Y).item()
    hits = (problem.model(X).argmax(1) == Y).float().mean().item()
    for part in ("train", "test"):
        score = evaluate(problem, part)
        assert (score.loss, score.metric) == (pytest.approx(whole), pytest.approx(hits))


def test_r2_is_one_minus_the_share_of_variance() -> None:
    y = torch.randn(20, 1) + 5
    problem = Factory("mine:make", lambda: (nn.Linear(3, 1), F.mse_loss, [(X[:8], y[:8]), (X[8:], y[8:])])).problem()
    score = evaluate(problem, "train")
    residual = (y - problem.model(X)).square().mean()
    assert score.loss == pytest.approx(residual.item())
    assert score.metric == pytest.approx((1 - residual / y.var(correction=0)).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("data", "batches"),
    [(DataLoader(Lengthless(list(zip(X, Y, strict=True))), 8), 3), ((X, Y), 1)],
    ids=["no length", "one pair"],
)
def test_loaders_without_a_length_and_one_pair_of_tensors(data: Any, batches: int) -> None:
    model = nn.Linear(3, 2)
    problem = Factory("mine:make", lambda: (model, F.cross_entropy, data)).problem()
    assert len(problem.parts["train"]) == len(list(problem.parts["train"].epoch(0))) == batches
    assert evaluate(problem, "train").loss == pytest.approx(F.cross_entropy(model(X), Y).item())
