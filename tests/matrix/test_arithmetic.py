"""In what precision kernels multiply: 16 bits only where the processor has instructions for them."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import precond
from precond.algebra import precision


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
    ids=str,
)
def test_processors_that_multiply_bfloat16(has: dict, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(has))
    assert precision.multiplies_bfloat16.__wrapped__() is expected


def test_without_a_library_for_it_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.multiplies_bfloat16.__wrapped__()


def trained(recipe: Callable[..., precond.PreconditionedGD], engine: str) -> list[Tensor]:
    """A layer of 200 × 160, above the size from which products are in 16 bits, after four steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 200), nn.Tanh(), nn.Linear(200, 3))
    optimizer = recipe(model, engine=engine)
    for _ in range(4):
        x = torch.randn(32, 160) * torch.linspace(0.1, 3, 160)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("recipe", [precond.auto, precond.whitening, precond.muon], ids=lambda r: r.__name__)
def test_without_instructions_steps_are_those_of_float32(
    recipe: Callable[..., precond.PreconditionedGD], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits the weights are some percent of their way off; torch's products of bfloat16 without instructions take 30 times as long."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    for ours, theirs in zip(trained(recipe, "auto"), trained(recipe, "loop"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_momenta_of_one_direction_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix of rank 1 rounding to 16 bits leaves eigenvalues at −6e-4 of the largest, more than what is damped keeps positive."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)

    def first(engine: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 1))
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = precond.auto(model, engine=engine)
        model(torch.randn(250, 256)).square().mean().backward()
        optimizer.step()
        return [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]

    ours, theirs = (torch.cat([step.flatten() for step in first(engine)]) for engine in ("auto", "loop"))
    # L^(−1/2) is of 1/√ε = 32 where m is not, and of 8 bits.
    assert (ours - theirs).norm() <= 32 * 2**-8 * theirs.norm()
