"""What is written for one block, and tells blocks alike apart or does what cannot be taken side by side, does to each what it does alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import BNP, RMS, SOAP, Muon, Orthogonalized, PreconditionedGD, Route
from precond.optim.blocks import Stack, State
from precond.optim.preconditioners.each import Each, stackable

TOLERANCE = 1e-11
"""Of float64 parameters of size 1: six steps, in which products are summed in another order side by side; Muon's iteration enlarges that."""


@dataclass(frozen=True)
class Own(precond.Preconditioner):
    """Adam's denominator without its momentum."""

    def init(self, block):
        return {"r": tuple(block.zeros())}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.mul_(0.9)
            self.fold(r, g, state.block)

    def fold(self, r: Tensor, g: Tensor, block: Any) -> None:
        r.add_(g * g, alpha=0.1)

    def map(self, state):
        return precond.InverseRoot(tuple((r.sqrt() + 1e-2) / self.scale(state) for r in state["r"]))

    def scale(self, state: Any) -> Any:
        return 1.0


def own(base: type = Own, **methods: Any) -> precond.Preconditioner:
    return dataclass(frozen=True)(type("Mine", (base,), methods))()


def scaled(asked: Callable[[Any], Any], base: type = Own) -> precond.Preconditioner:
    """Another scale where something is so of the block."""
    return own(base, scale=lambda self, state: 1.0 + asked(state.block))


def folded(fold: Callable[[Tensor, Tensor], Any]) -> precond.Preconditioner:
    return own(fold=lambda self, r, g, block: fold(r, g))


def masked(r: Tensor, g: Tensor) -> None:
    r[g.abs() > g.abs().mean()] += 0.1


def told(r: Tensor, g: Tensor) -> None:
    if g.abs().max() > 0.05:
        r.add_(g * g)


def counted(self, state, seen):
    for r, g in zip(state["r"], seen.gradient, strict=True):
        r.mul_(0.9).add_(g * g, alpha=0.1)
        if state.steps[0] == 4:  # what went well three times does not now, and r is written already
            r.add_(float(g.abs().max()))


def changing(self, state, seen):
    for r, g in zip(state["r"], seen.gradient, strict=True):
        g.mul_(2)
        r.mul_(0.9).add_((g * float(g.sum())).abs())


def positioned(self, state, seen):
    for r, g, z in zip(state["r"], seen.gradient, seen.position(), strict=True):
        r.mul_(0.9).add_(g * g + z * z, alpha=0.1)


def first(block: Any) -> Any:
    return block.leaves[0]


def kept(block: Any) -> int:
    return block.derived.setdefault("seen", len(block.leaves[0].name))


class Entrywise(Own):
    entrywise = True

    def map(self, state):
        scales = [1.0 + leaf.name.startswith("2.") for leaf in state.block.leaves]
        return precond.InverseRoot(tuple((r.sqrt() + 1e-2) / s for r, s in zip(state["r"], scales, strict=True)))


@dataclass(frozen=True)
class OwnRMS(RMS):
    def map(self, state):
        scales = [1.0 + leaf.name.startswith("2.") for leaf in state.block.leaves]
        like = zip(state.block.tensors, scales, strict=True)
        return super().map(state) @ precond.Diagonal(tuple(torch.full_like(t, s) for t, s in like))


class Stateless(Own):
    """Of some layers nothing, told by handles; there is no statistic that would tell them apart."""

    def handles(self, block):
        return block.leaves[0].name.startswith("2.")

    def init(self, block):
        return {}

    def observe(self, state, seen):
        pass

    def map(self, state):
        return precond.Diagonal(tuple(torch.full_like(t, 3.0) for t in state.block.tensors))


BY_NAME = scaled(lambda block: first(block).name.startswith("2."))
APART = {
    "a name": BY_NAME,
    "the block's name": scaled(lambda block: "2." in block.name),
    "a layer": scaled(lambda block: first(block).layer == "2"),
    "a module": scaled(lambda block: first(block).module.number),
    "a group": scaled(lambda block: first(block).group),
    "groups": scaled(lambda block: max(block.groups)),
    "a turn": scaled(lambda block: first(block).turn),
    "turns": scaled(lambda block: block.turns[0]),
    "a rule": scaled(lambda block: precond.optim.blocks.matches("2.*", first(block))),
    "the parameter": scaled(lambda block: first(block).param.detach().norm()),
    "the parameters": scaled(lambda block: block.params[0].detach().norm()),
    "which parameter": scaled(lambda block: getattr(block.params[0], "number", 5)),
    "which leaf": scaled(lambda block: {first(block): 2}[first(block)] + len(repr(first(block)))),
    "what is kept with a block": scaled(kept),
    "a name, of a part": scaled(lambda block: block.subset([0]).leaves[0].name.startswith("2.")),
    "a name, in observe": own(
        fold=lambda self, r, g, block: r.add_(g * g, alpha=0.5 if first(block).name.startswith("2.") else 0.1)
    ),
    "a name, in factors": own(
        factors=lambda self, s: (precond.Identity(s.block.tensors), self.map(s)),
        scale=lambda self, s: 1.0 + first(s.block).name.startswith("2."),
    ),
    "a name, entry by entry": Entrywise(),
    "a name, in a class of RMS": OwnRMS(),
    "a position": own(observe=positioned),
    "a mask": folded(masked),
    "out=": folded(lambda r, g: torch.maximum(r, g * g, out=r)),
    "random numbers": folded(lambda r, g: r.add_(g * g * torch.rand_like(g))),
    "different values": folded(lambda r, g: r.add_(torch.unique(g.sign()).numel())),
    "a condition": folded(told),
    "a number": folded(lambda r, g: r.add_(g.abs().max().item())),
    "numpy": folded(lambda r, g: r.add_(torch.from_numpy(g.numpy() ** 2))),
    "a number, in map": own(scale=lambda self, state: 1.0 + float(state["r"][0].max() > 0.01)),
    "a number, in the fourth step": own(observe=counted),
    "a gradient that it changes": own(observe=changing),
}
TOGETHER = {
    "nothing": own(),
    "a shape": scaled(lambda block: len(first(block).shape)),
    "a kind": scaled(lambda block: first(block).kind == "bias"),
    "values": scaled(lambda block: block.tensors[0].norm()),
    "a leaf's values": scaled(lambda block: first(block).tensor.norm()),
    "a name, in init": own(init=lambda self, b: {"r": tuple(z + first(b).name.startswith("2.") for z in b.zeros())}),
    "eigenvalues": own(
        scale=lambda self, s: 1 + torch.linalg.eigvalsh(s["r"][0] @ s["r"][0].mT).amax() if s["r"][0].ndim > 1 else 1
    ),
}
COMPOSED = {
    "inside BNP": BNP() @ BY_NAME,
    "inside SOAP": SOAP(every=2) @ BY_NAME,
    "around Muon": BY_NAME @ Muon(),
    "around Adam's": BY_NAME @ RMS(),
    "each in the other": BY_NAME @ folded(masked),
    "inside BNP, its position": BNP() @ own(observe=positioned),
    "inside BNP, entry by entry": BNP() @ Entrywise(),
    "inside SOAP, a class of RMS": SOAP(every=2) @ OwnRMS(),
    "inside BNP, some layers": BNP() @ Stateless(),
    "around Adam's, some layers": Stateless() @ RMS(),
    "routed": Route([("0.*", BY_NAME), (precond.is_matrix, folded(masked))], otherwise=BY_NAME),
    "orthogonalized": Orthogonalized(BY_NAME, where=None),
}


IN_ORDER = "random numbers"
"""Draws are compared where one stack holds all tensors: of several they come in the order of the stacks."""


def trained(name: str, P: precond.Preconditioner, engine: str) -> tuple[Tensor, PreconditionedGD]:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6, bias=name != IN_ORDER) for _ in range(5))).double()
    for k, layer in enumerate(net):
        layer.number = layer.weight.number = k
    groups = [{"params": layer} for layer in net] if "group" in name else net
    optimizer = PreconditionedGD(groups, lr=0.01, preconditioner=P, engine=engine)
    for t in range(6):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        net(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer


def alone(optimizer: PreconditionedGD) -> list[bool]:
    """Of each stack of several blocks, whether some preconditioner takes them one by one."""

    def blocks(state):
        yield state.block
        for value in state.values():
            if isinstance(value, State):
                yield from blocks(value)

    stacks = [cell for cell in optimizer._bound.cells if isinstance(cell.block, Stack) and len(cell.members) > 1]
    return [any(Each in block.derived for block in blocks(cell.state)) for cell in stacks]


def compared(name: str, P: precond.Preconditioner) -> list[bool]:
    (found, optimizer), (expected, _) = (trained(name, P, engine) for engine in ("auto", "loop"))
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    return alone(optimizer)


@pytest.mark.parametrize("name", APART)
def test_told_apart_each_is_what_it_is_alone(name):
    compared(name, APART[name])


@pytest.mark.parametrize("name", TOGETHER)
def test_what_all_share_is_asked_for_side_by_side(name):
    one_by_one = compared(name, TOGETHER[name])
    assert one_by_one and not any(one_by_one)


@pytest.mark.parametrize("name", COMPOSED)
def test_told_apart_in_compositions(name):
    compared(name, COMPOSED[name])


def test_once_told_apart_it_is_tried_no_more():
    calls = []

    def asked(block):
        calls.append(block)
        return first(block).name.startswith("2.")

    optimizer = trained("", scaled(asked), "auto")[1]
    assert all(alone(optimizer))
    assert len(calls) == 6 * 10 + 2  # of five weights and five biases, and once of each stack


@pytest.mark.parametrize("method", ["observe", "map"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_an_error_of_its_own_is_raised_with_the_name_of_the_method(method, engine):
    def broken(self, state, *seen):
        state["r"][0].add_(1)
        raise LookupError("of the author")

    with pytest.raises(LookupError, match="of the author") as raised:
        trained("", own(**{method: broken}), engine)
    assert engine == "loop" or raised.value.__notes__ == [f"raised by Mine.{method} of '0.weight'"]


@pytest.mark.parametrize("method", ["refresh", "ready", "settled", "findings", "program"])
def test_what_is_of_one_block_is_not_given_stacks(method):
    P = own(**{method: lambda self, *of: None})
    assert not stackable(P) and stackable(Own())
