"""Every task can be trained, every entrant trains and goes on after an interruption, and the rules are the same for all."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond.lab.workloads import Checkpoint, Interrupted, LogUniform, Outcome, Plan, Task, peers, train
from precond.lab.workloads.data import Part
from precond.lab.workloads.models import Architecture
from precond.lab.workloads.networks import CharacterTransformer
from precond.lab.workloads.problem import Tensors, in_batches
from precond.lab.workloads.race import REFERENCE, RULES, entrants, race_tasks

PLAN = Plan(0.003, 6, 3, "linear", 2, 3)
ENTRANTS = {entrant.label: entrant for entrant, _ in entrants()}


def some(seed: int, inputs: Callable[[torch.Generator], torch.Tensor], targets: tuple[int, ...]) -> Part:
    generator = torch.Generator().manual_seed(seed)
    return Part(inputs(generator), torch.randint(5, targets, generator=generator))


def small(
    make: Callable[[], nn.Module], inputs: Callable[[torch.Generator], torch.Tensor], targets: tuple[int, ...]
) -> Tensors:
    parts = {name: some(i, inputs, targets) for i, name in enumerate(("train", "validation", "test"))}
    return Tensors("small", "noise", parts, make, F.cross_entropy, "accuracy", 8, 10, "small", "cross entropy")


CONV = small(
    lambda: Architecture("convnet", (4, 6), "batch").build((1, 8, 8), 5), lambda g: torch.rand(40, 1, 8, 8, generator=g), (40,)
)
TEXT = small(lambda: CharacterTransformer(5, 7, 8, 2, 2), lambda g: torch.randint(5, (40, 7), generator=g), (40, 7))


def needs_package(label: str) -> None:
    for start, package in {"pytorch-": "pytorch_optimizer", "heavyball": "heavyball", "schedule-free": "schedulefree"}.items():
        if label.startswith(start):
            pytest.importorskip(package, reason=f"{package} is not installed (extra [bench])")


def numbers(outcome: Outcome) -> dict[str, Any]:
    found = dataclasses.asdict(outcome)
    del found["curve"]["seconds"], found["curve"]["cpu_seconds"]
    return found


@pytest.fixture(scope="module")
def tasks(fashion_mnist: Path) -> dict[str, Task]:
    return {task.name: task for task in race_tasks((0, 1, 2), trials=5, scale=0.01, folder=fashion_mnist, examples=300)}


def test_the_rules_are_the_same_for_all(tasks: dict[str, Task]) -> None:
    assert len(tasks) == 9
    for task in tasks.values():
        wide = task.name.startswith(("logistic", "digits"))
        trials, decades = (7, 3) if wide else (5, 2)
        search = task.search
        assert (search.trials, search.judge, search.aim, search.evaluations) == (trials, "training", "steps", 20)
        assert (task.target_part, task.allowance) == ("train", 0.0)
        assert task.reference == REFERENCE and task.search_seed not in task.seeds
        assert [c.label for c in task.contenders] == list(ENTRANTS)
        for contender in task.contenders:
            assert isinstance(contender.lr, LogUniform)
            assert math.log10(contender.lr.high / contender.lr.low) == pytest.approx(decades)
            assert contender.lr.first(5)[0] == contender.lr.recommended
        assert (task.plan.decay, task.plan.warmup, task.plan.evaluations) == ("linear", task.plan.steps // 20, 40)
    assert len(RULES) > 3


@pytest.mark.parametrize(
    "name", ["logistic, wine", "logistic, breast cancer", "digits MLP", "Fashion MLP", "Fashion conv net", "Fashion conv net, BN",
             "autoencoder", "character transformer", "vision transformer"],
)  # fmt: skip
def test_every_task_can_be_trained(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    plan = dataclasses.replace(task.plan, lr=1e-3, steps=2, evaluations=1, test=False)
    outcome, _ = train(task.contenders[1].workload(), ENTRANTS[REFERENCE], plan)
    assert outcome.status == "finished"
    assert len(outcome.curve.train_loss) == 2
    assert math.isnan(outcome.curve.train_metric[-1]) == (task.metric is None)
    problem = task.contenders[0].workload().problem()
    inputs, targets = next(problem.parts["train"].epoch(0))
    assert problem.model(inputs).shape[0] == len(targets)
    # Before training, logits of classes are close to even; an autoencoder's say 1/2 for every pixel.
    if "logistic" not in name and "digits" not in name:
        even = math.log(2) if name == "autoencoder" else math.log(96 if "character" in name else 10)
        assert outcome.curve.train_loss[0] == pytest.approx(even, rel=0.12)


@pytest.mark.parametrize("label", list(ENTRANTS))
@pytest.mark.parametrize("workload", [CONV, TEXT], ids=["conv", "text"])
def test_every_entrant_trains_and_goes_on_to_the_same_numbers(label: str, workload: Tensors, tmp_path: Path) -> None:
    needs_package(label)
    entrant, checkpoint = ENTRANTS[label], Checkpoint(tmp_path / "c.pt", 1e9)
    whole, model = train(workload, entrant, PLAN)
    assert whole.status == "finished"
    torch.manual_seed(PLAN.seed)
    for (name, before), after in zip(workload.make().named_parameters(), model.parameters(), strict=True):
        # A bias of all keys shifts each query's scores alike: its gradient is 0.
        assert "key.bias" in name or not torch.equal(before, after), name
    with pytest.raises(Interrupted):
        train(workload, entrant, PLAN, checkpoint=checkpoint, watch=lambda step, _: step == 3)
    resumed, again = train(workload, entrant, PLAN, checkpoint=checkpoint)
    assert numbers(resumed) == numbers(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_muon_takes_kernels_as_matrices_and_leaves_the_head_to_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(2, 4, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("hidden", nn.Linear(16, 6))
    model.add_module("head", nn.Linear(6, 3))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = peers.muon(model, 0.01)
    optimizer.zero_grad()
    model(torch.randn(5, 2, 4, 4)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, p in model.named_parameters():
        if name in ("conv.weight", "hidden.weight"):
            alone = nn.Parameter(start[name].flatten(1))
            alone.grad = gradients[name].flatten(1)
            torch.optim.Muon([alone], 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw").step()
            assert torch.equal(p.detach().flatten(1), alone.detach()), name
        else:
            # Adam's first step.
            assert torch.allclose(p.detach() - start[name], -0.01 * gradients[name].sign(), atol=1e-4), name


def test_schedule_free_is_evaluated_at_its_average_and_trained_at_another_point() -> None:
    needs_package("schedule-free")
    entrant = ENTRANTS["schedule-free AdamW"]
    problem = CONV.problem()
    optimizer: Any = entrant.optimizer(problem.model, 0.05)
    inputs, targets = next(problem.parts["train"].epoch(0))
    for _ in range(4):
        optimizer.zero_grad()
        problem.loss_fn(problem.model(inputs), targets).backward()
        optimizer.step()
    model = problem.model
    trained = [p.detach().clone() for p in model.parameters()]
    with entrant.evaluating(optimizer, problem):
        averages = [p.detach().clone() for p in model.parameters()]
        # x = y + (1 − 1/β₁)·(y − z) undone: y = (1 − β₁)z + β₁x.
        for y, x, p in zip(trained, averages, model.parameters(), strict=True):
            z = optimizer.state[p]["z"]
            assert torch.allclose(y, 0.1 * z + 0.9 * x, atol=1e-5)
        # Statistics of batch normalization are those of the average on the first batches.
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        seen = torch.cat([x.mean((0, 2, 3))[None] for x, _ in problem.parts["train"].epoch(0)])
        assert torch.allclose(norm.running_mean, seen.mean(0), atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(trained, averages, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained, model.parameters(), strict=True))
    assert norm.momentum == 0.1
    assert entrant.decay == "constant"
    assert all(e.decay is None for e in ENTRANTS.values() if e is not entrant)


def test_a_search_may_be_judged_on_training_examples_that_no_curve_shows() -> None:
    part = Part(torch.arange(100.0)[:, None], torch.zeros(100, dtype=torch.long))
    parts = in_batches({"train": part}, 8, 40)
    shown, judging = (torch.cat([x for x, _ in parts[name].once()]).flatten().tolist() for name in ("train", "search"))
    assert len(shown) == len(judging) == 40
    assert not set(shown) & set(judging)
    few = in_batches({"train": part}, 8, 60)
    shown, judging = (torch.cat([x for x, _ in few[name].once()]).flatten().tolist() for name in ("train", "search"))
    assert shown == judging
    # It is trained on as the training part is.
    assert all(torch.equal(a[0], b[0]) for a, b in zip(parts["train"].epoch(5), parts["search"].epoch(5), strict=True))
    of_curve, _ = train(CONV, ENTRANTS[REFERENCE], PLAN)
    of_search, _ = train(CONV, ENTRANTS[REFERENCE], dataclasses.replace(PLAN, training_loss_on="search"))
    assert of_curve.curve.validation_loss and not of_search.curve.validation_loss  # all that a search looks at is what judges
    assert of_curve.curve.train_loss != of_search.curve.train_loss
