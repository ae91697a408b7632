"""Where preconditioning the inputs of layers pays: one training task for each cell of data and architecture, and what is predicted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.measured import Measured, measured
from precond.lab.workloads.models import Activation, Architecture, Normalization
from precond.lab.workloads.networks import VisionTransformer
from precond.lab.workloads.pool import POOL
from precond.lab.workloads.pool.drawings import ABOUT, SHAPES, SIDE, shapes
from precond.lab.workloads.pool.images import ResNet, Separable
from precond.lab.workloads.pool.language import CONTEXT, Llama, Text, gpt, text
from precond.lab.workloads.pool.recurrent import CharacterLSTM
from precond.lab.workloads.problem import LossFn, Metric, Tensors
from precond.lab.workloads.randomness import isolated
from precond.lab.workloads.search import LogUniform, Search
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.text import ALPHABET
from precond.lab.workloads.training import Plan
from precond.optim import recipes

BASE = "AdamW"
"""What is trained in p, and in the coordinates of layer inputs."""

REMEDIES = {"AdamW in BNP's coordinates": "bnp", "AdamW in whitened coordinates": "whitened"}
"""Entrant ↦ the remedy of :func:`precond.diagnose` that it is."""

_RATES = 64.0  # of the highest and the lowest learning rate, for everyone
_ENTRANTS = (
    (BASE, "adamw(weight_decay=0)", 5e-4),
    ("AdamW in BNP's coordinates", "adamw(weight_decay=0, inputs=BNP())", 2.5e-4),
    ("AdamW in whitened coordinates", "adamw(weight_decay=0, inputs=Whitening())", 1.25e-4),
)

RULES = (
    "AdamW in p, in BNP's coordinates and in whitened ones, on cells of data and architecture: who reaches the lowest training loss of AdamW "
    "in p first, in steps. Each searches its rate over the same ratio of 64, with up to two rates more beyond an end.",
    "The prediction is made before training, from one look at the model as initialized and at the training inputs.",
)


@dataclass(frozen=True)
class Prediction:
    """What is predicted of one entrant in one cell, before training.

    Attributes:
        task, label: of the cell and the entrant.
        gain: likely ratio of steps without and with it; NaN where ``diagnose`` says nothing.
        layers: how many were looked at.
        traits: 1 or 0 for each of: the model has batch normalization; it has another one; most of the inputs' features have variance 1.
        measured: further numbers; None where they were not taken.
    """

    task: str
    label: str
    gain: float
    layers: int
    traits: tuple[float, ...] = ()
    measured: Measured | None = None


@dataclass(frozen=True)
class _Cell:
    data: str
    architecture: str
    steps: int
    workload: Callable[[], Tensors]

    @property
    def name(self) -> str:
        return f"{self.data}: {self.architecture}"


_CLASSES: tuple[int, LossFn, Metric] = (10, F.cross_entropy, "accuracy")
_VALUES: tuple[int, LossFn, Metric] = (1, F.mse_loss, "R²")


@cache
def _table(name: str) -> tuple[str, dict[str, Part], int, LossFn, Metric]:
    """Vectors and targets, as they are or standardized by the training part: what, parts, outputs, loss, metric."""
    base, standardize = name.removesuffix(", standardized"), name.endswith(", standardized")
    outputs, loss, metric = _CLASSES
    if base == "digits":
        data = load_data("digits")
        about, parts = data.about, {k: Part(p.inputs.flatten(1), p.targets) for k, p in data.parts.items()}
    elif base == "shapes":
        about, parts = ABOUT, {k: Part(p.inputs.flatten(1), p.targets) for k, p in shapes(91).items()}
        outputs = len(SHAPES)
    elif base == "wine":
        wine = load_data("wine")
        about, parts, outputs = wine.about, dict(wine.parts), 3
    else:
        member = next(m for m in POOL if m.name == "diabetes, raw").workload()
        about, parts = member.about, dict(member.parts)
        outputs, loss, metric = _VALUES
    if standardize:
        std, mean = torch.std_mean(parts["train"].inputs, 0)
        parts = {k: Part((p.inputs - mean) / std.clamp_min(1e-3), p.targets) for k, p in parts.items()}
        about = f"{about} Features standardized by the training part."
    return about, parts, outputs, loss, metric


def _mlp(name: str, activation: Activation, normalization: Normalization) -> Tensors:
    about, parts, outputs, loss, metric = _table(name)
    architecture = Architecture("mlp", (64, 64), normalization, activation)
    shape = tuple(parts["train"].inputs.shape[1:])
    words = f"MLP 64-64, {activation}, normalization of the layers' inputs: {normalization}"
    return Tensors(
        name, about, parts, partial(architecture.build, shape, outputs), loss, metric, 64, 256, words,
        "cross entropy" if metric == "accuracy" else "mean squared error",
    )  # fmt: skip


def _images(data: str, kind: str) -> Tensors:
    if data == "digits":
        found = load_data("digits")
        about, side, classes = f"{found.about} Divided by 16.", 8, 10
        parts = {k: Part(p.inputs / 16, p.targets) for k, p in found.parts.items()}
    else:
        about, side, classes, parts = ABOUT, SIDE, len(SHAPES), shapes(92)
    channels = (8, 16) if side == 8 else (8, 16, 24)
    nets: dict[str, Callable[[], nn.Module]] = {
        "conv net": partial(Architecture("convnet", channels).build, (1, side, side), classes),
        "conv net, BN": partial(Architecture("convnet", channels, "batch").build, (1, side, side), classes),
        "ResNet, BN": partial(ResNet, channels, classes),
        "separable, BN": partial(Separable, (8, 16, 24), classes),
        "ViT, pre-norm": partial(VisionTransformer, classes, side, side // 4, 32, 2, 4),
    }
    return Tensors(data, about, parts, nets[kind], F.cross_entropy, "accuracy", 32, 128, kind, "cross entropy")


def _characters(kind: Text, model: str) -> Tensors:
    about, parts = text(kind)
    nets: dict[str, Callable[[], nn.Module]] = {
        "GPT, pre-norm": gpt,
        "Llama, pre-norm": partial(Llama, len(ALPHABET), CONTEXT),
        "LSTM": partial(CharacterLSTM, len(ALPHABET), 64, 1),
    }
    return Tensors(
        kind, about, parts, nets[model], F.cross_entropy, "accuracy", 16, 64, model, "cross entropy of the next character"
    )


_MLPS: tuple[tuple[str, Activation, Normalization], ...] = (
    ("MLP, ReLU", "relu", "none"), ("MLP, tanh", "tanh", "none"), ("MLP, ReLU, BN", "relu", "batch"), ("MLP, GELU, LN", "gelu", "layer")
)  # fmt: skip
_TABLES = ("wine", "wine, standardized", "diabetes", "digits", "digits, standardized", "shapes")
_NETS = ("conv net", "conv net, BN", "ResNet, BN", "separable, BN", "ViT, pre-norm")
_TEXTS: tuple[Text, ...] = ("code", "English")
# From the pool: deep networks that are none of the above. Those of its development half alone.
_OF_POOL = (("deep autoencoder", "digits"), ("variational autoencoder", "digits"), ("PINN", "Poisson"), ("PINN", "Burgers"))


def _cells() -> tuple[_Cell, ...]:
    tables = (_Cell(t, name, 150, partial(_mlp, t, a, n)) for t in _TABLES for name, a, n in _MLPS)
    nets = (_Cell(data, net, 80, partial(_images, data, net)) for data in ("digits", "shapes") for net in _NETS)
    texts = (
        _Cell(kind, model, 80, partial(_characters, kind, model))
        for kind in _TEXTS
        for model in ("GPT, pre-norm", "Llama, pre-norm", "LSTM")
    )
    pool = {m.name: m for m in POOL}
    others = (_Cell(data, net, 200, pool[f"{net}, {data}"].workload) for net, data in _OF_POOL)
    return (*tables, *nets, *texts, *others)


def where_tasks(
    seeds: Iterable[int], trials: int, scale: float = 1.0, folder: Path | None = None, examples: int | None = None
) -> tuple[Task, ...]:
    """One task for each cell.

    Args:
        seeds: of the trainings that are reported.
        trials: of each entrant's search.
        scale: times the steps of the table.
        folder: none: the cells read no files.
        examples: none: all are trained on.

    Raises:
        DataError: where Python's own text is not installed.
        ImportError: where scikit-learn is not.
        ValueError: for a folder or a number of examples.
    """
    if folder is not None or examples is not None:
        raise ValueError("the cells of where read no files and train on all examples; leave out the data folder and examples")
    chosen = tuple(seeds)
    contenders = [(parse_recipe(recipe, label), LogUniform(low, low * _RATES)) for label, recipe, low in _ENTRANTS]

    def task(cell: _Cell) -> Task:
        steps, workload = max(2, round(scale * cell.steps)), cell.workload()
        search = Search(trials, judge="training", aim="steps", evaluations=20, beyond=2)
        return Task(
            cell.name, tuple(Contender(entrant, cell.workload, rates) for entrant, rates in contenders),
            Plan(None, steps, 0, "cosine", steps // 20, 20), chosen, search, metric=workload.metric,
            facts={**workload.facts, "steps": f"{steps:,}", "batch size": str(workload.batch_size)}, reference=BASE, allowance=0.0,
            target_part="train", family=cell.architecture,
        )  # fmt: skip

    return tuple(task(cell) for cell in _cells())


def predictions(task: Task, samples: int = 512) -> list[Prediction]:
    """Of each remedy in a cell, from the model as it is initialized with the search's seed and the first training examples.

    Args:
        task: one of :func:`where_tasks`.
        samples: training examples that are looked at.
    """
    workload = task.contenders[0].workload()
    assert isinstance(workload, Tensors)
    with isolated(task.search_seed):
        model = workload.make()
    part = workload.parts["train"]
    loss = Objective(model, workload.loss_fn, [(part.inputs[:samples], part.targets[:samples])], mode="train", seed=0)
    # Remedies are told against what is trained in p; its rate says nothing about them.
    found = diagnose(loss, recipes.adamw(model, lr=1e-3, weight_decay=0.0))
    gains = {considered.name: considered.gain for considered in found.considered}
    known, data = traits(model, part.inputs), (part.inputs[:samples], part.targets[:samples])
    with isolated(task.search_seed):
        numbers = measured(found, model.train(), workload.loss_fn, data, workload.batch_size)
    return [
        Prediction(task.name, label, gains[name].likely, len(found.layers), known, numbers) for label, name in REMEDIES.items()
    ]


def traits(model: nn.Module, inputs: Tensor) -> tuple[float, ...]:
    """Of a model and its training inputs: see :class:`Prediction`."""
    kinds = [
        (isinstance(m, nn.modules.batchnorm._BatchNorm), isinstance(m, nn.LayerNorm | nn.RMSNorm)) for m in model.modules()
    ]
    standard = False
    if inputs.is_floating_point():
        std = inputs.flatten(1).std(0)
        standard = bool(((std - 1).abs() < 0.1).float().mean() > 0.5)
    return float(any(batch for batch, _ in kinds)), float(any(other for _, other in kinds)), float(standard)
