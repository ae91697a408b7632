"""The pool as an experiment: who takes part, and the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from precond.lab.workloads import peers
from precond.lab.workloads.entrant import Entrant, Peer
from precond.lab.workloads.pool import (
    autoencoders,
    blind,
    confirmation,
    final,
    finetuning,
    held_out,
    images,
    language,
    physics,
    recommenders,
    recurrent,
    renewed,
    sealed,
    tabular,
)
from precond.lab.workloads.pool.halves import HALVES, Half
from precond.lab.workloads.pool.member import Member
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.search import LogUniform, Search
from precond.lab.workloads.study import Contender, Task
from precond.lab.workloads.syntax import parse_recipe
from precond.lab.workloads.training import Plan

REFERENCE = "torch AdamW"
"""Who sets the targets."""

TRIALS, BEYOND, SEEDS = 7, 2, (0, 1, 2, 3, 4)
"""Rates of each search, more of them where the best lies at an end, and seeds of what is reported."""

TIMINGS = 3
"""Rounds in which reported trainings are timed."""

EVALUATIONS = 40
"""Of a training: steps to a target are known to 2.5 % of its length. A search has half as many."""

POOL: tuple[Member, ...] = tuple(
    member
    for module in (
        tabular,
        autoencoders,
        images,
        language,
        recurrent,
        physics,
        recommenders,
        finetuning,
        renewed,
        confirmation,
        held_out,
        sealed,
        final,
        blind,
    )
    for member in module.MEMBERS
)

RULES = (
    "Small trainings of many kinds, half of them for development, half locked: locked tasks are run for a final table alone, and nothing "
    "is chosen by them. A third set, for confirmation, a fourth, held out, and a fifth, sealed, were each written by someone who did not "
    "know how auto does on it, and are each run once; a sixth, final, and a seventh, blind, were written as the fifth was.",
    "In a task all have the same model, initialization, data, batches, number of steps, warm-up over a twentieth of them, and a learning "
    "rate that falls to 0 along half a cosine.",
    f"Each searches its learning rate alone, over the same ratio: {TRIALS} rates, each twice the one before, with its own published default "
    f"among them; where the best lies at an end, up to {BEYOND} rates more beyond it. All else is each optimizer's own default, but weight "
    "decay is 0 for those of others. auto is taken as it comes. Two are evaluated at averages of their weights over about the last tenth "
    "of the steps so far, AdamW by this library's recipe, which takes torch's steps.",
    "A search looks at trainings with another seed than those reported, and at their loss on training examples that the reported curves are "
    "not evaluated on (where there are enough). torch's AdamW takes the rate of its lowest final loss; the others that which reaches, in the "
    "fewest steps, the lowest loss on the curve of this training of AdamW, and among equals, or where none reaches it, that of the lowest "
    "final loss.",
    "There are two targets: the lowest training loss and the lowest validation loss on the curves of torch's AdamW (β₂ = 0.999), each the "
    f"median over seeds. Work to a target is that of the first of {EVALUATIONS} evaluations that meets it. Seconds are the processor's, of "
    f"one thread, for fetching batches, forward, backward and the optimizer; of trainings that take less than five, medians of {TIMINGS} rounds "
    "through all entrants.",
    "Muon has all matrices but embeddings and the layers called head, recurrent ones and convolutions included; AdamW has the rest, at the "
    "same rate.",
)
"""What is the same for all."""


def _rates(lowest: float) -> LogUniform:
    """So that seven rates are the lowest, and each twice the one before."""
    return LogUniform(lowest / 2**0.5, lowest * 2**6.5)


# Who, where its rates begin, and the package that it needs. A new row goes to the end: files of trainings are named by the place.
_ENTRANTS: tuple[tuple[Callable[[], Entrant], LogUniform, str | None], ...] = (
    (lambda: Peer(REFERENCE, peers.adamw, "torch-adamw"), _rates(5e-4), None),
    (lambda: Peer("torch AdamW, β₂ = 0.95", partial(peers.adamw, betas=(0.9, 0.95)), "torch-adamw-95"), _rates(5e-4), None),
    (lambda: Peer("torch Muon", peers.muon, "torch-muon"), _rates(1e-3), None),
    (lambda: Peer("pytorch-optimizer SOAP", peers.pytorch_optimizer("SOAP"), "po-soap"), _rates(7.5e-4), "pytorch_optimizer"),
    (lambda: parse_recipe("auto", "auto"), _rates(1.25e-3), None),
    (lambda: parse_recipe("adamw(weight_decay=0, average=PolynomialAverage())", "AdamW, averaged"), _rates(5e-4), None),
    (lambda: parse_recipe("auto(average=PolynomialAverage())", "auto, averaged"), _rates(1.25e-3), None),
)


def entrants() -> tuple[tuple[int, Entrant, LogUniform], ...]:
    """Number, entrant, and where its rate is searched, of all whose packages are installed."""
    return tuple((i, make(), rates) for i, (make, rates, package) in enumerate(_ENTRANTS) if _installed(package))


def absent() -> tuple[str, ...]:
    """Who does not take part, and why."""
    return tuple(
        f"{make().label}: the package {package} is not installed (pip install 'precond[bench]')"
        for make, _, package in _ENTRANTS
        if not _installed(package)
    )


def _installed(package: str | None) -> bool:
    return package is None or find_spec(package) is not None


def members(half: Half) -> tuple[Member, ...]:
    """The tasks of a half, in its order."""
    by_name = {member.name: member for member in POOL}
    return tuple(by_name[name] for name in HALVES[half])


def pool_tasks(
    half: Half, seeds: Iterable[int], trials: int, scale: float = 1.0, folder: Path | None = None, examples: int | None = None
) -> tuple[Task, ...]:
    """The tasks of a half of the pool.

    Args:
        half: of the pool.
        seeds: of the trainings that are reported.
        trials: of each entrant's search, all over the same ratio of rates.
        scale: times the steps of the table.
        folder: none: the pool reads no files.
        examples: train on the first so many at most; None: on all.

    Raises:
        DataError: where Python's own text is not installed.
        ImportError: where scikit-learn is not.
        ValueError: where a folder is given.
    """
    if folder is not None:
        raise ValueError(f"the pool reads no files; leave out the data folder, got {folder}")
    chosen = tuple(seeds)
    return tuple(_task(member, chosen, trials, scale, examples) for member in members(half))


def _task(member: Member, seeds: tuple[int, ...], trials: int, scale: float, examples: int | None) -> Task:
    racers = entrants()
    make = partial(_limited, member.workload, examples)
    workload, steps = make(), max(2, round(scale * member.steps))
    facts = {
        **workload.facts,
        "batch size": str(workload.batch_size),
        "steps": f"{steps:,}",
        "evaluated on": f"at most {workload.evaluated:,} training and as many validation examples, all test examples",
    }
    search = Search(trials, judge="training", aim="steps", evaluations=EVALUATIONS // 2, beyond=BEYOND)
    return Task(
        member.name,
        tuple(Contender(entrant, make, rates) for _, entrant, rates in racers),
        Plan(None, steps, 0, "cosine", steps // 20, EVALUATIONS),
        seeds,
        search,
        metric=workload.metric,
        facts=facts,
        reference=REFERENCE,
        allowance=0.0,
        target_part="train",
        numbers=tuple(i for i, _, _ in racers),
        family=member.family,
        skipped=absent(),
        timings=TIMINGS,
    )


def _limited(workload: Callable[[], Tensors], examples: int | None) -> Tensors:
    whole = workload()
    if examples is None:
        return whole
    train = whole.parts["train"]
    kept = {**whole.parts, "train": type(train)(train.inputs[:examples], train.targets[:examples])}
    return replace(whole, parts=kept)
