"""Trainings that are interrupted, run out of disk, or diverge."""

import copy
import dataclasses
import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from precond.analysis.curvature.errors import NoSecondDerivative
from precond.lab.workloads import (
    Architecture,
    Checkpoint,
    CheckpointError,
    Interrupted,
    Outcome,
    Peer,
    Plan,
    Workload,
    WriteError,
    load_workload,
    parse_entrants,
    train,
)
from precond.lab.workloads.evaluation import evaluate
from precond.lab.workloads.factory import Factory
from precond.lab.workloads.randomness import isolated, random_states, restore_random_states

PLAN = Plan(lr=0.003, steps=23, seed=3, decay="cosine", warmup=4, evaluations=5)


def loader() -> Any:
    """Shuffles and draws noise from the global generator, drops out, and counts batches."""
    torch_noise = TensorDataset(torch.randn(30, 4), torch.randn(30, 1))

    def noisy(items: list[Any]) -> Any:
        x, y = (torch.stack(column) for column in zip(*items, strict=True))
        return x + 0.1 * torch.randn_like(x), y

    data = DataLoader(torch_noise, 8, shuffle=True, collate_fn=noisy)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))
    return model, F.mse_loss, {"train": data, "validation": data, "test": data}


WORKLOADS: dict[str, Workload] = {
    "digits": load_workload("digits", Architecture("mlp", (16,), "batch", dropout=0.2), batch_size=128, examples=500),
    "loader": Factory("mine:loader", loader),
}
ENTRANTS = [
    "sgd(momentum=0.9)",
    "rmsprop",
    "adamw + SAM(0.01, space='z')",
    "sgd + GradientNorm(0.01, method='exact')",
    "adam(average=EMA(0.8))",
]


def numbers(outcome: Outcome) -> dict[str, Any]:
    """All but the seconds."""
    found = dataclasses.asdict(outcome)
    del found["curve"]["seconds"], found["curve"]["cpu_seconds"]
    return found


@pytest.mark.parametrize("entrant", ENTRANTS)
@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_interrupted_anywhere_it_ends_bit_identical(tmp_path: Path, workload: str, entrant: str) -> None:
    one, checkpoint = parse_entrants(entrant)[0], Checkpoint(tmp_path / "c.pt", 1e9)
    whole, model = train(WORKLOADS[workload], one, PLAN)
    for stop in (4, 11, 22):  # at an epoch's end, inside one, before the last step
        with pytest.raises(Interrupted):
            train(WORKLOADS[workload], one, PLAN, checkpoint=checkpoint, watch=lambda step, _, stop=stop: step == stop)  # type: ignore[misc]
    torch.manual_seed(99)  # what the process drew before must not matter
    resumed, again = train(WORKLOADS[workload], one, PLAN, checkpoint=checkpoint)
    assert numbers(resumed) == numbers(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_recipe_with_an_average_is_evaluated_there_and_trains_as_without(tmp_path: Path) -> None:
    with isolated(PLAN.seed):  # the same steps by hand, without BatchNorm's statistics of other weights
        problem = WORKLOADS["loader"].problem()
        model = problem.model
        optimizer = torch.optim.Adam(model.parameters(), 0.003)
        expected, mean = [], [torch.zeros_like(p) for p in model.parameters()]
        model.train()
        for step in range(8):  # two epochs of four batches
            batch = step % 4
            if batch == 0:
                stream = problem.parts["train"].epoch(PLAN.seed * 1_000_003 + step // 4)
            x, y = next(stream)
            optimizer.zero_grad()
            problem.loss_fn(model(x), y).backward()
            optimizer.step()
            for m, p in zip(mean, model.parameters(), strict=True):
                m.lerp_(p.detach(), 1 / (step + 1))
        trained = copy.deepcopy(model)
        for m, p in zip(mean, model.parameters(), strict=True):
            p.data.copy_(m)
        norm: Any = model[1]
        norm.reset_running_stats()
        norm.momentum = None
        before = random_states()
        with torch.no_grad():
            for x, _ in problem.parts["train"].epoch(0):
                model(x)
        restore_random_states(before)
        expected = [evaluate(problem, part).loss for part in ("train", "validation")]
    plan = Plan(0.003, 8, PLAN.seed, "constant", 0, 2)
    averaged, found = train(WORKLOADS["loader"], parse_entrants("adam(average=PolynomialAverage(0))")[0], plan)
    plain, last = train(WORKLOADS["loader"], parse_entrants("adam")[0], plan)
    # Float32 after eight of Adam's steps: by torch's kernels and by this library's.
    assert (averaged.curve.train_loss[-1], averaged.curve.validation_loss[-1]) == pytest.approx(expected, rel=1e-5)
    assert averaged.curve.train_loss[-1] != pytest.approx(plain.curve.train_loss[-1], rel=1e-3)
    for found_model, expected_model in ((found, model), (last, trained)):
        for a, b in zip(found_model.parameters(), expected_model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(WORKLOADS["loader"], parse_entrants("sgd")[0], PLAN)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_does_not_change_training() -> None:
    one = parse_entrants("adam")[0]
    ends = [
        train(WORKLOADS["loader"], one, dataclasses.replace(PLAN, evaluations=n))[0].curve.validation_loss[-1]
        for n in (1, 5, 23)
    ]
    assert ends[0] == ends[1] == ends[2]


def test_gradients_and_rows_are_counted() -> None:
    curve = train(WORKLOADS["digits"], parse_entrants("adam + SAM(0.01)")[0], PLAN)[0].curve
    assert curve.step == [0, 5, 9, 14, 18, 23]
    assert curve.gradients == [2 * step for step in curve.step]
    assert curve.seconds[0] == 0
    assert curve.seconds == sorted(curve.seconds)


@pytest.mark.parametrize("entrant", ["sgd(lr=1e12)", "sgd(lr=1e30) + SAM(0.1)"])
def test_nan_is_reported(entrant: str) -> None:
    outcome, _ = train(WORKLOADS["digits"], parse_entrants(entrant)[0], dataclasses.replace(PLAN, lr=None, warmup=0))
    assert outcome.status == "diverged"
    assert outcome.diverged_at is not None
    assert outcome.test_loss is None
    assert all(math.isfinite(x) for x in outcome.curve.train_loss)


def test_a_full_disk_leaves_the_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, checkpoint = parse_entrants("adam")[0], Checkpoint(tmp_path / "c.pt", 0)
    with pytest.raises(Interrupted):
        train(WORKLOADS["digits"], one, PLAN, checkpoint=checkpoint, watch=lambda step, _: step == 7)
    before = checkpoint.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"the disk is full; the one written before is intact; free some space"):
            train(WORKLOADS["digits"], one, PLAN, checkpoint=checkpoint)
    assert checkpoint.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [checkpoint.path]
    resumed, _ = train(WORKLOADS["digits"], one, PLAN, checkpoint=checkpoint)
    assert numbers(resumed) == numbers(train(WORKLOADS["digits"], one, PLAN)[0])


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, keep: float) -> None:
    one, checkpoint = parse_entrants("adam")[0], Checkpoint(tmp_path / "c.pt", 0)
    with pytest.raises(Interrupted):
        train(WORKLOADS["digits"], one, PLAN, checkpoint=checkpoint, watch=lambda step, _: step == 7)
    content = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"c\.pt is damaged.*delete it"):
        train(WORKLOADS["digits"], one, PLAN, checkpoint=checkpoint)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c.pt", 0)
    with pytest.raises(Interrupted):
        train(WORKLOADS["digits"], parse_entrants("adam")[0], PLAN, checkpoint=checkpoint, watch=lambda step, _: step == 7)
    with pytest.raises(CheckpointError, match="belongs to"):
        train(WORKLOADS["digits"], parse_entrants("rmsprop")[0], PLAN, checkpoint=checkpoint)


def test_an_optimizer_of_another_package_is_counted_by_its_closure_and_stopped_at_nan() -> None:
    twice = Peer("lbfgs", lambda model, lr: torch.optim.LBFGS(model.parameters(), lr, max_iter=2, max_eval=2))
    curve = train(WORKLOADS["digits"], twice, PLAN)[0].curve
    assert curve.gradients[-1] == 2 * PLAN.steps
    wild = Peer("sgd", lambda model, lr: torch.optim.SGD(model.parameters(), lr))
    outcome, _ = train(WORKLOADS["digits"], wild, dataclasses.replace(PLAN, lr=1e30, warmup=0))
    assert outcome.status == "diverged"
    with pytest.raises(ValueError, match="has no learning rate of its own"):
        train(WORKLOADS["digits"], wild, dataclasses.replace(PLAN, lr=None))


def test_a_peer_and_the_recipe_of_the_same_name_go_the_same_way() -> None:
    peer = Peer("sgd", lambda model, lr: torch.optim.SGD(model.parameters(), lr))
    a, b = (train(WORKLOADS["digits"], one, dataclasses.replace(PLAN, lr=0.01))[0] for one in (peer, parse_entrants("sgd")[0]))
    assert a.curve.train_loss == pytest.approx(b.curve.train_loss, rel=1e-5)
    assert a.curve.gradients == b.curve.gradients


def test_seconds_of_the_processor_leave_out_evaluation_and_sleep() -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            time.sleep(0.02)
            return super().step(closure)

    slow = Peer("slow", lambda model, lr: Slow(model.parameters(), lr))
    curve = train(WORKLOADS["digits"], slow, PLAN)[0].curve
    assert curve.seconds[-1] >= 0.02 * PLAN.steps
    assert 0 < curve.cpu_seconds[-1] < 0.02 * PLAN.steps
    assert curve.cpu_seconds == sorted(curve.cpu_seconds)


def test_without_test_the_test_part_is_not_read() -> None:
    class Forbidden:
        def __iter__(self) -> Any:
            raise AssertionError("the test part was read")

        def __len__(self) -> int:
            return 1

    def made() -> Any:
        model, loss_fn, parts = loader()
        return model, loss_fn, {**parts, "test": Forbidden()}

    one = parse_entrants("sgd")[0]
    assert train(Factory("mine:made", made), one, dataclasses.replace(PLAN, test=False))[0].test_loss is None
    with pytest.raises(AssertionError, match="was read"):
        train(Factory("mine:made", made), one, PLAN)


@pytest.mark.parametrize("recipe", ["adamw", "sgd+GradientNorm(0.1,method='exact')"])
def test_what_is_wrong_before_the_first_step_did_not_diverge(recipe: str) -> None:
    x, y = torch.rand(20, 3), torch.arange(20) % 2
    bad = x.clone()
    bad[19] = math.nan  # not in the first batch, which is tried before
    (entrant,) = parse_entrants(recipe)
    plan = Plan(0.01, 4, 0)
    made = nn.Linear(3, 2), F.cross_entropy, [(x[:10], y[:10]), (bad[10:], y[10:])]
    with pytest.raises(ValueError, match="no finite number before the first step"):
        train(Factory("mine:make", lambda: made), entrant, plan)
    made = nn.Linear(3, 2), lambda out, y: F.cross_entropy(out.detach(), y), [(x, y)]
    with pytest.raises(NoSecondDerivative, match="does not depend on the parameters"):
        train(Factory("mine:make", lambda: made), entrant, plan)
