"""The race: every recipe of this library and the optimizers of others, on tasks that one thread trains in seconds.

The rules (:data:`RULES`) are in the spirit of AlgoPerf (Dahl et al., 2023).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import nn

from precond.lab.workloads import peers
from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import DataSet, Part
from precond.lab.workloads.entrant import RECIPES, Entrant, Peer
from precond.lab.workloads.models import Architecture
from precond.lab.workloads.networks import CharacterTransformer, VisionTransformer, autoencoder
from precond.lab.workloads.problem import BuiltIn, Tensors
from precond.lab.workloads.search import LogUniform, Search
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.text import ALPHABET, library_text
from precond.lab.workloads.training import Plan

REFERENCE = "torch AdamW"
"""Who sets the target."""

EVALUATIONS = 40
"""Of a training: steps to the target are known to 2.5 % of its length. A search has half as many."""

RULES = (
    "Optimizers of this library and of others on tasks that one thread trains in seconds: who reaches the best training loss of "
    "torch's AdamW first, in steps and in seconds.",
    "In a task all have the same model, initialization, data, batches, number of steps, warm-up over a twentieth of them, and linear "
    "decay to 0. A schedule-free optimizer keeps its learning rate after the warm-up, by its own design.",
    "Each searches its learning rate alone, in the same number of trials: first its own default, then evenly over two decades, "
    "as densely over three in the small tasks on raw features and on digits. Weight decay is 0; everything else is each optimizer's own "
    "default, but pytorch-optimizer's Shampoo refreshes every 10 steps instead of every 1,000, and heavyball does not compile.",
    "A search looks at trainings with another seed than those reported, and at their loss on training examples that the reported curves "
    "are not evaluated on. (Where a data set is so small that curves are evaluated on all of it, on the same.) torch's AdamW takes the "
    "rate of its lowest final loss; the others that which reaches, in the fewest steps, the lowest loss on the curve of this training of "
    "AdamW, and among equals, or where none reaches it, that of the lowest final loss.",
    "The target is the lowest training loss on the curve of torch's AdamW, median over seeds. Work to the target is that of the first "
    f"of {EVALUATIONS} evaluations that meets it, median over seeds. Seconds are the processor's, of one thread, for fetching batches, "
    "forward, backward and the optimizer; of short trainings of the small tasks and the MLP, medians of rounds through all entrants.",
    "Muon, torch's and ours, orthogonalizes the weights of linear and convolutional layers but not those of a transformer's head; "
    "AdamW has the rest, at the same learning rate.",
)
"""What is the same for all."""


# Two decades for each: steps of unit size for each entry in the one, steps in units of the gradient in the other.
_BY_ENTRY = LogUniform(3e-4, 0.03)
_BY_GRADIENT = LogUniform(0.01, 1.0)
# Where the best learning rates of different methods lie farther apart: three decades, with as many trials in each.
_WIDER = {_BY_ENTRY: LogUniform(3e-4, 0.3), _BY_GRADIENT: LogUniform(1e-3, 1.0)}


def entrants() -> tuple[tuple[Entrant, LogUniform], ...]:
    """Who takes part, and in which range its learning rate is searched, its own default first."""
    others: tuple[tuple[Entrant, LogUniform, float], ...] = (
        (Peer("torch SGD, momentum 0.9", peers.sgd, "torch-sgd"), _BY_GRADIENT, 1e-3),
        (Peer(REFERENCE, peers.adamw, "torch-adamw"), _BY_ENTRY, 1e-3),
        (Peer("torch Muon", peers.muon, "torch-muon"), _BY_ENTRY, 1e-3),
        (Peer("pytorch-optimizer SOAP", peers.pytorch_optimizer("SOAP"), "po-soap"), _BY_ENTRY, 3e-3),
        (peers.Unsaved("pytorch-optimizer Shampoo, every 10", peers.shampoo, "po-shampoo"), _BY_GRADIENT, 1e-3),
        (Peer("pytorch-optimizer Kron", peers.pytorch_optimizer("Kron"), "po-kron"), _BY_ENTRY, 1e-3),
        (Peer("heavyball AdamW", peers.heavyball("AdamW"), "hb-adamw"), _BY_ENTRY, 2.5e-3),
        (Peer("heavyball SOAP", peers.heavyball("SOAP"), "hb-soap"), _BY_ENTRY, 3e-3),
        (peers.ScheduleFree("schedule-free AdamW", peers.schedule_free, "schedule-free"), _BY_ENTRY, 2.5e-3),
    )
    # A new row goes to the end: files of trainings are named by the place.
    ours = (
        ("adamw", "adamw(weight_decay=0)", _BY_ENTRY),
        ("bnp", "bnp", _BY_GRADIENT),
        ("whitening", "whitening(weight_decay=0)", _BY_ENTRY),
        ("muon", "muon(weight_decay=0)", _BY_ENTRY),
        ("soap", "soap(weight_decay=0)", _BY_ENTRY),
        ("soap, smaller side", "soap(weight_decay=0, sides='smaller', factor_frequency=5)", _BY_ENTRY),
        ("shampoo", "shampoo(weight_decay=0)", _BY_ENTRY),
        ("Whitening∘Muon", "muon(weight_decay=0, inputs=Whitening())", _BY_ENTRY),
        ("auto", "auto(weight_decay=0)", _BY_ENTRY),
        ("soap, rank 16", "soap(weight_decay=0, rank=16)", _BY_ENTRY),
    )
    found = [(entrant, replace(space, recommended=lr)) for entrant, space, lr in others]
    for label, text, space in ours:
        name = text.split("(")[0]
        if name in RECIPES:
            default = inspect.signature(RECIPES[name]).parameters["lr"].default
            found.append((parse_recipe(text, label), replace(space, recommended=default)))
    return tuple(found)


@dataclass(frozen=True)
class _Run:
    """What a task trains, for how many steps, whether rates are searched widely, and in how many rounds short trainings are timed."""

    name: str
    workload: Callable[[], BuiltIn | Tensors]
    steps: int
    wide: bool = False
    timings: int = 1

    def space(self, usual: LogUniform) -> LogUniform:
        """Where learning rates are searched."""
        return replace(_WIDER[replace(usual, recommended=None)], recommended=usual.recommended) if self.wide else usual

    def trials(self, usual: int) -> int:
        """How many: the first is the default, the others as dense in each decade."""
        return 1 + round(1.5 * (usual - 1)) if self.wide else usual


def race_tasks(
    seeds: Iterable[int], trials: int, scale: float = 1.0, folder: Path | None = None, examples: int | None = None
) -> tuple[Task, ...]:
    """The tasks of the race.

    Args:
        seeds: of the trainings that are reported.
        trials: of each entrant's search; half as many more over a wider range for the small tasks.
        scale: times the steps of the table.
        folder: of the IDX files of Fashion-MNIST; None: where Debian puts them.
        examples: train on so many images and windows of text at most; None: on all.

    Raises:
        DataError: where files are absent or damaged.
    """
    fashion = load_data("fashion-mnist", folder=folder, examples=examples)
    text = library_text(_CONTEXT)
    if examples is not None:
        text["train"] = Part(text["train"].inputs[:examples], text["train"].targets[:examples])
    racers = entrants()

    def task(run: _Run) -> Task:
        steps, workload = max(2, round(scale * run.steps)), run.workload()
        contenders = tuple(Contender(entrant, run.workload, run.space(space)) for entrant, space in racers)
        facts = {
            **workload.facts,
            "batch size": str(workload.batch_size),
            "steps": f"{steps:,}",
            "evaluated on": f"{workload.evaluated:,} training and as many validation examples, all test examples"
            if workload.evaluated
            else "all training, validation and test examples",
        }
        search = Search(run.trials(trials), judge="training", aim="steps", evaluations=EVALUATIONS // 2)
        return Task(
            run.name, contenders, Plan(None, steps, 0, "linear", steps // 20, EVALUATIONS), tuple(seeds), search,
            metric=workload.metric, facts=facts, reference=REFERENCE, allowance=0.0,
            target_part="train", timings=run.timings,
        )  # fmt: skip

    return tuple(task(run) for run in _runs(fashion, text))


_CONTEXT = 64


def _runs(fashion: DataSet, text: dict[str, Part]) -> tuple[_Run, ...]:
    def built_in(
        data: DataSet, architecture: Architecture, batch: int, evaluated: int | None
    ) -> Callable[[], BuiltIn | Tensors]:
        return partial(BuiltIn, data, architecture, batch, evaluated=evaluated)

    pixels = {name: Part(part.inputs.flatten(1), part.inputs.flatten(1)) for name, part in fashion.parts.items()}
    autoencoding = Tensors(
        "autoencoder", f"{fashion.about} The targets are the pixels.", pixels, autoencoder, F.binary_cross_entropy_with_logits,
        None, 128, 2000, "784-500-250-30-250-500-784, tanh, linear code", "sigmoid cross entropy, mean over pixels",
    )  # fmt: skip
    characters = Tensors(
        "text", "Python's standard library, 96 characters: windows of its modules, one module in ten for validation, one for testing.",
        text, partial(CharacterTransformer, len(ALPHABET), _CONTEXT), F.cross_entropy, "accuracy", 16, 200,
        "causal transformer, pre-LayerNorm, width 96, 3 layers, 4 heads, context 64", "cross entropy of the next character",
    )  # fmt: skip
    patches = Tensors(
        "fashion-mnist", fashion.about, fashion.parts, _vision_transformer, F.cross_entropy, "accuracy", 128, 1000,
        "vision transformer, patches of 7 x 7, width 64, 3 layers, 4 heads", "cross entropy",
    )  # fmt: skip
    logistic, convnet = Architecture("logistic"), Architecture("convnet", (16, 32, 32))
    return (
        _Run("logistic, wine", built_in(load_data("wine"), logistic, 32, None), 600, wide=True, timings=15),
        _Run("logistic, breast cancer", built_in(load_data("breast-cancer"), logistic, 32, None), 600, wide=True, timings=15),
        _Run("digits MLP", built_in(load_data("digits"), Architecture("mlp", (64, 64)), 64, 500), 600, wide=True, timings=15),
        _Run("Fashion MLP", built_in(fashion, Architecture("mlp", (300, 100)), 128, 2000), 800, timings=3),
        _Run("Fashion conv net", built_in(fashion, convnet, 128, 1000), 250),
        _Run("Fashion conv net, BN", built_in(fashion, Architecture("convnet", (16, 32, 32), "batch"), 128, 1000), 250),
        _Run("autoencoder", lambda: autoencoding, 400),
        _Run("character transformer", lambda: characters, 300),
        _Run("vision transformer", lambda: patches, 250),
    )


def _vision_transformer() -> nn.Module:
    return VisionTransformer(10)
