"""Single operations on the pretended device, each with what it must be charged: run by :mod:`device.process`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from device.meter import METER, Count
from device.pretended import move, to_device
from precond.optim.preconditioners import iteration


def on(device: str, *shape: int) -> Tensor:
    return to_device(torch.ones(shape), device)


def many(count: int, device: str = "cuda") -> list[Tensor]:
    return [on(device, 3) for _ in range(count)]


@dataclass(frozen=True)
class Operation:
    """What it does with a (4, 4) matrix of ones on ``cuda:0``, and its price."""

    run: Callable[[Tensor], Any]
    launches: int = 0
    reads: int = 0
    mixed: int = 0
    scattered: int = 0
    copies_in: int = 0
    copies_out: int = 0
    solvers: int = 0


OPERATIONS: dict[str, Operation] = {
    "view": Operation(lambda x: x.view(16)[2:].unsqueeze(0).expand(3, -1)),
    "allocate": Operation(torch.empty_like),
    "fill": Operation(torch.zeros_like, launches=1),
    "make": Operation(lambda x: torch.zeros(3, device="cuda"), launches=1),
    "product": Operation(lambda x: x @ x, launches=1),
    "item": Operation(lambda x: x[0, 0].item(), reads=1),
    "if": Operation(lambda x: bool(x[0, 0] > 0), launches=1, reads=1),
    "equal": Operation(lambda x: torch.equal(x, x.view(4, 4)), reads=1),
    "nonzero": Operation(lambda x: x.nonzero(), launches=1, reads=1),
    "mask": Operation(lambda x: x[x > 0], launches=2, reads=1),
    "where": Operation(lambda x: torch.where(x > 0, x, x), launches=2),
    "eigh": Operation(lambda x: torch.linalg.eigh(x), launches=1, reads=1, solvers=1),
    "qr": Operation(lambda x: torch.linalg.qr(x), launches=1, solvers=1),
    "to the host": Operation(lambda x: x.cpu(), launches=1, reads=1, copies_out=1),
    "from the host": Operation(lambda x: torch.ones(2).to("cuda"), launches=1, copies_in=1),
    "copied into the host": Operation(lambda x: torch.ones(4, 4).copy_(x), reads=1, copies_out=1),
    "between devices": Operation(lambda x: x.to("cuda:1"), launches=1),
    "host's number": Operation(lambda x: x * torch.tensor(2.0), launches=1, mixed=1),
    "two devices": Operation(lambda x: x + on("cuda:1", 4, 4), launches=1, mixed=1),
    # 64 tensors of two lists a launch, 48 of three: what is new is one more list.
    "foreach in place": Operation(lambda x: torch._foreach_add_(many(148), many(148)), launches=3),
    "foreach": Operation(lambda x: torch._foreach_add(many(148), many(148)), launches=4),
    "foreach norm": Operation(lambda x: torch._foreach_norm(many(148)), launches=4),
    "foreach of blocks": Operation(lambda x: torch._foreach_mul_([on("cuda", 400 * 65536)], 2.0), launches=2),
    "foreach on two": Operation(
        lambda x: torch._foreach_mul_([*many(5), *many(4, "cuda:1"), *many(3, "cpu")], 2.0), launches=9, scattered=1
    ),
    "foreach across two": Operation(lambda x: torch._foreach_add_(many(5), many(5, "cuda:1")), launches=1, mixed=1),
    "fused": Operation(lambda x: torch._fused_sgd_(many(148), many(148), many(148), weight_decay=0.0, momentum=0.9, lr=1.0,
                                                   dampening=0.0, nesterov=False, maximize=False, is_first_step=False),
                       launches=4),
    "stack": Operation(lambda x: torch.stack(many(148)), launches=2),
}  # fmt: skip


def charged(name: str) -> dict[str, int]:
    """By kind."""
    x, count = on("cuda", 4, 4), Count()
    with METER.into(count):
        OPERATIONS[name].run(x)
    return {kind: getattr(count, kind).total() for kind in vars(count)}


def bytes_of_a_sum() -> tuple[int, int]:
    """Of (x + 1) + 1, x of 100 numbers: at the peak, and left alive."""
    x = on("cuda", 100)
    before = METER.mark()
    y = (x + 1) + 1
    return METER.peak - before, METER.live - before + 0 * len(y)


def places() -> dict[str, str]:
    """Where results are, by what makes them."""
    x, y = on("cuda:0", 2), on("cuda:1", 2)
    outer, inner = torch._foreach_neg([y, x])
    layer = nn.Linear(2, 2).to("cuda:1")
    return {
        "sum": str((y + y).device),
        "list": f"{outer.device} {inner.device}",
        "itself": str(y.add_(1) is y),
        "module": f"{layer.weight.device} {isinstance(layer.weight, nn.Parameter)}",
        "forward": str(layer(y).device),
        "moved": str(move(nn.Linear(2, 2), "cuda:1").weight.device),
    }


def bytes_of_a_basis_that_follows(scratch: float) -> float:
    """At the peak, by those of Q (64, 64), where scratch memory is for so many of them, and a piece is an eighth of one."""
    S, Q = on("cuda", 1, 64, 64), to_device(torch.eye(64)[None].clone())
    with mock.patch.object(iteration, "PIECE", Q.nbytes // 8):
        before = METER.mark()
        iteration.follow(S, Q, None, int(scratch * Q.nbytes))
    return (METER.peak - before) / Q.nbytes
