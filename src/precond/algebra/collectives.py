"""The library's own collectives: torch's, with an error that says what it means where one fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra.memory import FRESH, Memory, joined

Group = dist.ProcessGroup | None
"""The ranks that come together; None: all."""


def all_reduce(t: Tensor, what: str, group: Group = None, op: Any = dist.ReduceOp.SUM) -> None:
    """t ← Σ over the ranks, or another operation; ``what`` says in an error what t is."""
    with _named(what, group, t.device):
        dist.all_reduce(t, op, group)


def all_gather(out: Tensor, t: Tensor, what: str, group: Group = None) -> None:
    """out ← the tensors of all ranks, one after the other; they are alike in shape."""
    with _named(what, group, t.device):
        dist.all_gather_single(out, t, group)


def share(
    parts: Sequence[Tensor], sizes: Sequence[int], what: str, group: Group = None, memory: Memory = FRESH
) -> list[Tensor]:
    """What each rank has, given to all: flat, and in the place of this rank, which has it, nothing.

    Args:
        parts: what this one gives, one after the other.
        sizes: how many numbers each rank gives, which all know.
    """
    rank, size, like = dist.get_rank(group), len(sizes), parts[0]
    others = [0 if r == rank else n for r, n in enumerate(sizes)]
    if _through_sockets(like.device):
        return all_to_all([() if r == rank else parts for r in range(size)], others, like, what, group, memory)
    longest = max(sizes)
    mine, every = like.new_empty(longest), like.new_empty(size * longest)
    torch.cat([t.reshape(-1) for t in parts], out=mine[: sizes[rank]])
    all_gather(every, mine, what, group)
    return [t[:n] for t, n in zip(every.split(longest), others, strict=True)]


def all_gather_v(mine: Tensor, sizes: Sequence[int], what: str, group: Group = None) -> list[Tensor]:
    """:func:`share` of one flat tensor, and in the place of this rank that itself: what each has, of so many numbers."""
    every = share([mine], sizes, what, group)
    every[dist.get_rank(group)] = mine
    return every


def _through_sockets(device: torch.device) -> bool:
    """Whether ranks are in contact by gloo, whose all_gather passes memory of its own twice, and whose all_to_all none."""
    return device.type == "cpu"


def all_to_all(
    gives: Sequence[Sequence[Tensor]],
    takes: Sequence[int],
    like: Tensor,
    what: str,
    group: Group = None,
    memory: Memory = FRESH,
) -> list[Tensor]:
    """What each rank gives to this one, flat.

    Args:
        gives: to each rank, one tensor after the other.
        takes: of each rank how many numbers.
        like: of their dtype and device.
        memory: for what is sent and received.
    """
    sent = joined([t.reshape(-1) for of in gives for t in of], memory, "sent", like)
    out = memory.numbers("received", sum(takes), like)
    with _named(what, group, like.device):
        dist.all_to_all_single(out, sent, list(takes), [sum(t.numel() for t in of) for of in gives], group)
    return list(out.split_with_sizes(list(takes)))


def broadcast(t: Tensor, owner: int, what: str, group: dist.ProcessGroup) -> None:
    """t ← that of ``owner``, a rank in the group."""
    with _named(what, group, t.device):
        dist.broadcast(t, dist.get_global_rank(group, owner), group)


@contextmanager
def _named(what: str, group: Group, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = dist.group.WORLD if group is None else group
        assert ranks is not None
        limit = getattr(getattr(ranks._get_backend(device), "options", None), "_timeout", None)
        within = "" if limit is None else f", {limit.total_seconds():g} s"
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {ranks.size()} could not exchange {what} with the others: one of them has ended or raised an error "
            f"of its own (see there), is later than the timeout of the process group{within}, or does not make the same steps. Start all ranks "
            f"again from a checkpoint: this step may be half taken. ({_first_sentence(error)})"
        ) from error


def _first_sentence(error: Exception) -> str:
    """Without the place in its source that gloo begins with."""
    return re.sub(r"^\[\S*\] ", "", str(error)).split(". ")[0].split("\n")[0]
