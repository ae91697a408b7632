"""Which strategies go together, and which parameters they can step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from precond.algebra import checks
from precond.algebra.sharding import flattened
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf, matches
from precond.optim.checking import contracts
from precond.optim.engine.cells import Cell, Choice
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import Preconditioner
from precond.optim.regularizers import Regularizer


def validate(name: str, choice: Choice, statistics_from: str) -> None:
    """Raise where strategies do not go together."""
    contracts.instance(name, "preconditioner", choice.preconditioner, Preconditioner, "one, such as precond.RMS()")
    if choice.momentum is not None:
        contracts.instance(name, "momentum", choice.momentum, Momentum, "None or an average, and Momentum(0.9) is one")
    for strategy in (choice.preconditioner, *choice.regularizers):
        contracts.frozen(name, strategy)
    _check_momenta(name, choice.preconditioner)
    for r in choice.regularizers:
        kind = type(r).__name__
        if missing := [field for field in ("space", *r.scalars) if not hasattr(r, field)]:
            raise TypeError(
                f'{name}: {kind} lacks {missing[0]!r}; give it a field, such as `lam: float` and `space: str = "z"` '
                "(scalars names the numbers that groups may set)"
            )
        r.validate(choice.preconditioner)
        if statistics_from == "total" and r.circular:
            raise ValueError(
                f"{name}: statistics_from='total' builds P from the regularized gradient, and {type(r).__name__} in z needs P "
                "for that gradient; use statistics_from='loss' or 'lagged', or space='p'"
            )
    second = [type(r).__name__ for r in choice.regularizers if r.probes or r.exact]
    if len(second) > 1:
        raise ValueError(f"{name}: {' and '.join(second)} both need a second gradient; at most one regularizer may")


def _check_momenta(name: str, choice: Any) -> None:
    """Raise where a preconditioner within a choice has a momentum of its own that is none."""
    if isinstance(choice, tuple | list):
        for item in choice:
            _check_momenta(name, item)
    elif isinstance(choice, Preconditioner) and is_dataclass(choice):
        if not isinstance(choice.momentum, Momentum | None):
            raise TypeError(f"{name}: momentum of {type(choice).__name__} must be a Momentum or None, got {choice.momentum!r}")
        _check_momenta(name, [getattr(choice, f.name) for f in fields(choice)])


def listed(name: str, regularizers: Any) -> tuple[Regularizer, ...]:
    """Regularizers as a tuple; raise TypeError where they are none."""
    if isinstance(regularizers, Regularizer | Tensor):
        raise TypeError(f"{name}: regularizers must be a list of them, got {regularizers!r}; put it in brackets")
    contracts.instance(name, "regularizers", regularizers, Iterable, "a list, such as [precond.L2(1e-4)]")
    out = tuple(regularizers)
    for r in out:
        contracts.instance(name, "each of regularizers", r, Regularizer, "one, such as precond.L2(1e-4)")
    return out


def check_patterns(name: str, leaves: Sequence[Leaf], choices: Iterable[Choice]) -> None:
    """Warn of patterns for names, of a rule, that no parameter's name fits."""
    names = [leaf.name for leaf in leaves]
    patterns = dict.fromkeys(p for choice in choices for p in _patterns((choice.preconditioner, *choice.regularizers)))
    for pattern in patterns:
        if not any(matches(pattern, leaf) for leaf in leaves):
            near = (
                checks.nearest(pattern, names)
                or f"; the parameters are {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
            )
            warn(f"{name}: the pattern {pattern!r} fits no parameter's name{near}")


def _patterns(choice: Any) -> Iterator[str]:
    """Of the rules within a strategy."""
    if isinstance(choice, tuple | list):
        for item in choice:
            yield from _patterns(item)
    elif isinstance(choice, Preconditioner | Regularizer) and is_dataclass(choice):
        rules = [choice.where] if hasattr(choice, "where") else [branch[0] for branch in getattr(choice, "branches", ())]
        yield from (rule for rule in rules if isinstance(rule, str))
        yield from _patterns([getattr(choice, f.name) for f in fields(choice)])


def check_precision(leaves: Sequence[Leaf], choice: Choice, rounding: str) -> None:
    """Refuse finite differences on 16-bit parameters that would mostly not move."""
    narrow = [leaf.name for leaf in leaves if leaf.param.dtype in (torch.float16, torch.bfloat16)]
    for r in choice.regularizers:
        if r.probes and narrow and rounding != "kahan":
            raise ValueError(
                f"{type(r).__name__} moves parameters by steps that 16-bit parameters ({narrow[0]}) mostly round away: keep "
                "float32 parameters under torch.autocast, or pass rounding='kahan'"
            )


def check_acting(cells: Sequence[Cell], choice: Choice) -> None:
    """Raise ValueError where a penalty needs of P what the map of some parameters has not: of a choice by layers it is not known before."""
    for cell in [inside for outer in cells for inside in outer.cells]:
        for r in choice.regularizers:
            try:
                r.validate(cell.preconditioner)
            except ValueError as error:
                raise ValueError(f"{error} (it acts on {cell.block.name})") from None


def check_shared(name: str, modules: Iterable[nn.Module], preconditioner: Preconditioner) -> None:
    """Raise TypeError where a wrapper made flat vectors of what a preconditioner would take for matrices or rows."""
    if preconditioner.needs != "entry" and any(flattened(m) for root in modules for m in root.modules()):
        raise TypeError(
            f"{name}: FSDP1 makes flat vectors of parameters, in which there are no matrices and no rows: shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2) before the optimizer is made, or take adamw or another recipe that acts by entries"
        )


def check_same(name: str, leaves: Sequence[Leaf], cells: Sequence[Cell], options: Sequence[Any]) -> None:
    """Raise RuntimeError on every rank where ranks that share parameters would step them in different ways."""
    what = {i: _kinds(each.preconditioner) for cell in cells for each in cell.cells for i in each.index}
    mine = [(leaf.name, tuple(leaf.shape), what.get(i, "frozen"), leaf.group) for i, leaf in enumerate(leaves)]
    plain = [[x for x in of if _is_plain(x)] for of in options]
    for leaf in leaves:
        if leaf.pieces is not None:
            _check_backend(name, leaf, leaf.pieces.group)
    for group in dict.fromkeys(leaf.pieces.group for leaf in leaves if leaf.pieces is not None):
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (mine, plain), group)
        for rank, (theirs, numbers) in enumerate(everyone):
            if theirs != everyone[0][0]:
                odd = sorted({entry[0] for entry in set(theirs) ^ set(everyone[0][0])})
                raise RuntimeError(
                    f"{name}: rank {rank} has other parameters, or steps them otherwise, than rank 0 ({', '.join(odd[:3])}): build the "
                    "same model and the same optimizer on every rank"
                )
            if numbers != everyone[0][1]:
                raise RuntimeError(
                    f"{name}: rank {rank} has other options than rank 0: {numbers!r}, not {everyone[0][1]!r}; give all ranks the same"
                )


def _check_backend(name: str, leaf: Leaf, group: dist.ProcessGroup) -> None:
    """Raise ValueError where ranks cannot send each other tensors of the device that a parameter is on."""
    device = leaf.tensor.device
    try:
        group._get_backend(device)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: {leaf.name!r} is on {device.type} (CPUOffloadPolicy?), and the ranks that share it have no backend for such tensors: "
            "init_process_group('cpu:gloo,cuda:nccl') has one for each"
        ) from error


def check_in_place(name: str, params: Iterable[Tensor]) -> None:
    """Raise TypeError for parts of parameters that stand in their place between forwards, which an optimizer would take for the whole."""
    if any(hasattr(p, "_st_info") for p in params):
        raise TypeError(
            f"{name}: parameters of tensor parallelism were made local for DistributedDataParallel: their parts are no matrices, and others "
            "stand in their place after each forward; copy the model by fully_shard, or by replicate, of torch.distributed, over the mesh "
            "of copies instead"
        )


def _is_plain(x: Any) -> bool:
    return all(map(_is_plain, x)) if isinstance(x, tuple) else x is None or isinstance(x, int | float | str)


def _kinds(P: Preconditioner) -> str:
    inside = ", ".join(map(_kinds, P.constituents))
    return f"{type(P).__name__}({inside})"
