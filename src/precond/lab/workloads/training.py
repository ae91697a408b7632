"""Training one model with one entrant, so that it can be interrupted anywhere and goes on to the same numbers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from precond import LossClosure, PreconditionedGD
from precond.analysis.curvature.objective import depending
from precond.lab.workloads.checkpoint import Checkpoint, CheckpointError
from precond.lab.workloads.curve import Curve, Outcome
from precond.lab.workloads.entrant import Entrant
from precond.lab.workloads.evaluation import evaluate
from precond.lab.workloads.learning_rates import Decay, factor
from precond.lab.workloads.problem import Problem, Workload
from precond.lab.workloads.randomness import isolated, random_states, restore_random_states

Watch = Callable[[int, Any], bool]
"""Called after each step with the number of steps done and the loss; True asks to stop."""


@dataclass(frozen=True)
class Plan:
    """How one training goes.

    Args:
        lr: peak learning rate; None: the entrant's own, or the recipe's default.
        steps: number of steps.
        seed: of initialization, order of the data, and dropout.
        decay: of the learning rate after its warm-up.
        warmup: steps over which the learning rate rises from 0.
        evaluations: number of evaluations, equally spaced, after the one before the first step.
        test: evaluate on the test part after the last step; a search does not look at it.
        training_loss_on: the part of which the curve's training loss is the loss; of ``"search"``, the examples by which searches are
            judged, it is all that is evaluated.
    """

    lr: float | None
    steps: int
    seed: int
    decay: Decay = "constant"
    warmup: int = 0
    evaluations: int = 40
    test: bool = True
    training_loss_on: Literal["train", "search"] = "train"


class Interrupted(Exception):
    """A training was asked to stop.

    Attributes:
        step: steps done.
        saved: whether they are in a checkpoint.
    """

    def __init__(self, step: int, saved: bool) -> None:
        super().__init__(f"interrupted after {step} steps")
        self.step, self.saved = step, saved


def train(
    workload: Workload, entrant: Entrant, plan: Plan, *, checkpoint: Checkpoint | None = None, watch: Watch | None = None
) -> tuple[Outcome, nn.Module]:
    """Train a fresh model of the workload, or go on from the checkpoint to the same numbers (all but the seconds).

    Gradients are those that the optimizer evaluated; seconds, and those of the processor, are of its steps and of fetching
    batches, not of evaluation. inf or NaN, in a gradient or an evaluated loss, ends the training as diverged. The caller's
    random generators are untouched.

    Args:
        workload: makes the model and the data.
        entrant: makes the optimizer.
        plan: length, learning rates and seed.
        checkpoint: where the state is kept, if the entrant's can be; None: nowhere. It is left there at the end.
        watch: called after each step; True asks to stop.

    Returns:
        What came of it, and the model, with the weights at which it is evaluated.

    Raises:
        Interrupted: where ``watch`` asked to stop; the state is in the checkpoint.
        CheckpointError: where the checkpoint is damaged or belongs to another training.
        WriteError: where the checkpoint cannot be written; the one before is intact.
    """
    with isolated(plan.seed):
        training = _Training(workload.problem(), entrant, plan, checkpoint if entrant.restorable else None, watch)
        return training.run(), training.settled()


class _Training:
    def __init__(
        self, problem: Problem, entrant: Entrant, plan: Plan, checkpoint: Checkpoint | None, watch: Watch | None
    ) -> None:
        self.problem, self._plan, self._checkpoint, self._watch = problem, plan, checkpoint, watch
        self._identity = {"entrant": entrant.label, **asdict(plan)}
        self._entrant = entrant
        self._optimizer: Any = entrant.optimizer(problem.model, plan.lr)
        self._exact, self._ours = entrant.exact, isinstance(self._optimizer, PreconditionedGD)
        self._calls = 0  # of the closure, in this step
        self._lr = float(self._optimizer.param_groups[0]["lr"])
        self._scheduler = LambdaLR(self._optimizer, factor(entrant.decay or plan.decay, plan.warmup, plan.steps))
        evaluations = min(plan.evaluations, plan.steps)
        self._evaluated = {round(i * plan.steps / evaluations) for i in range(1, evaluations + 1)}
        self._holds_out = "validation" in problem.parts and plan.training_loss_on == "train"
        self._step = self._gradients = 0
        self._seconds = self._cpu_seconds = 0.0
        self._random: dict[str, Any] | None = None
        self._curve = Curve()
        self._saved_at = time.monotonic()

    def run(self) -> Outcome:
        self._resume()
        self.problem.model.train()
        if not self._curve.step and not self._evaluate():
            raise ValueError(
                "the loss is no finite number before the first step; look at the data, the loss function and the parameters"
            )
        while self._step < self._plan.steps:
            if not self._epoch():
                return self._outcome(diverged=True)
        return self._outcome(diverged=False)

    def settled(self) -> nn.Module:
        model = self.problem.model
        with self._entrant.evaluating(self._optimizer, self.problem):
            found = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict(found)
        return model

    def _epoch(self) -> bool:
        """Steps to the end of the epoch or of the training; False where it diverged."""
        batches = self.problem.parts["train"]
        epoch, position = divmod(self._step, len(batches))
        stream = itertools.islice(batches.epoch(self._plan.seed * 1_000_003 + epoch), len(batches))
        for _ in range(position):
            next(stream, None)
        if self._random is not None:
            # Only now: skipping batches may have drawn numbers.
            restore_random_states(self._random)
            self._random = None
        began = self._step
        start, cpu_start = time.perf_counter(), time.process_time()
        for inputs, targets in stream:
            closure = self._closure(inputs, targets)
            try:
                loss = self._optimizer.step(closure)
            except FloatingPointError:
                return False
            if not self._ours and not math.isfinite(float(torch.as_tensor(loss).detach())):
                return False
            self._scheduler.step()
            self._step += 1
            self._gradients += self._optimizer.last.gradients if self._ours else self._calls
            self._calls = 0
            evaluated = self._step in self._evaluated
            if evaluated and torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds += time.perf_counter() - start
            self._cpu_seconds += time.process_time() - cpu_start
            if evaluated and not self._evaluate():
                return False
            self._look_up(loss)
            if self._step == self._plan.steps:
                return True
            start, cpu_start = time.perf_counter(), time.process_time()
        if self._step < began - position + len(batches):
            raise ValueError(
                f"the training data held {self._step - began + position} batches in epoch {epoch}, {len(batches)} before"
            )
        return True

    def _closure(self, inputs: Any, targets: Tensor) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            return depending(self.problem.loss_fn(self.problem.model(inputs), targets))

        def closure() -> Tensor:
            self._calls += 1
            self._optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        return LossClosure(loss) if self._exact else closure

    def _evaluate(self) -> bool:
        """Add a row to the curve; False where a loss is inf or NaN."""
        with self._entrant.evaluating(self._optimizer, self.problem):
            train = evaluate(self.problem, self._plan.training_loss_on)
            held_out = evaluate(self.problem, "validation") if self._holds_out else None
        if not (math.isfinite(train.loss) and (held_out is None or math.isfinite(held_out.loss))):
            return False
        curve = self._curve
        curve.step.append(self._step)
        curve.gradients.append(self._gradients)
        curve.seconds.append(self._seconds)
        curve.cpu_seconds.append(self._cpu_seconds)
        curve.train_loss.append(train.loss)
        curve.train_metric.append(train.metric)
        if held_out is not None:
            curve.validation_loss.append(held_out.loss)
            curve.validation_metric.append(held_out.metric)
        return True

    def _look_up(self, loss: Any) -> None:
        """Between two steps: save if it is time, stop if asked."""
        stop = self._watch is not None and self._watch(self._step, loss)
        due = self._checkpoint is not None and time.monotonic() - self._saved_at >= self._checkpoint.seconds
        if self._checkpoint is not None and (stop or due):
            self._checkpoint.save(self._state())
            self._saved_at = time.monotonic()
        if stop:
            raise Interrupted(self._step, self._checkpoint is not None)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity,
            "step": self._step,
            "gradients": self._gradients,
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "model": self.problem.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "random": random_states(),
            "curve": asdict(self._curve),
        }

    def _resume(self) -> None:
        state = None if self._checkpoint is None else self._checkpoint.load()
        if state is None:
            return
        assert self._checkpoint is not None
        try:
            identity = state["identity"]
            if identity == self._identity:
                self._load(state)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"{self._checkpoint.path} holds no state of this training ({reason}); delete it to repeat this "
                "training from its start, or start all over with --no-resume"
            ) from error
        if identity != self._identity:
            raise CheckpointError(f"{self._checkpoint.path} belongs to {identity}, not to {self._identity}; use another folder")

    def _load(self, state: dict[str, Any]) -> None:
        self._step, self._gradients = state["step"], state["gradients"]
        self._seconds, self._cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.problem.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._random = state["random"]
        restore_random_states(self._random)
        self._curve = Curve(**state["curve"])

    def _outcome(self, diverged: bool) -> Outcome:
        outcome = Outcome(self._plan.seed, self._lr, self._curve)
        if diverged:
            outcome.status, outcome.diverged_at = "diverged", self._step
        elif self._plan.test and "test" in self.problem.parts:
            with self._entrant.evaluating(self._optimizer, self.problem):
                score = evaluate(self.problem, "test")
            outcome.test_loss, outcome.test_metric = score.loss, score.metric
        return outcome
