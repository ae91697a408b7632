"""M g, Pᵀg, P z and solve of BNP equal dense matrices made of unfolded inputs, for every layer of the table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from inputs import layers, unfolded
from inputs.kinds import KINDS
from inputs.layers import CONV, Case
from precond import BNP, LinearMap, PreconditionedGD
from precond.algebra import vec
from precond.optim.inputs.watching import unwatched

torch.set_num_threads(1)
CASES = [*layers.CASES, *KINDS]


@dataclass
class Stepped:
    """A layer after one step of BNP, and what is known of it from before."""

    rows: list[unfolded.Rows]
    params: list[Tensor]
    before: Tensor
    g: Tensor
    found: LinearMap

    @property
    def like(self) -> tuple[Tensor, ...]:
        return tuple(p.detach() for p in self.params)

    def entries(self, part: unfolded.Rows) -> Tensor:
        """Where the weights of some rows, and then their biases, stand among all entries."""
        starts = dict(zip(self.params, torch.tensor([0] + [p.numel() for p in self.params]).cumsum(0).tolist(), strict=False))
        own = starts[part.weight] + part.index.flatten()
        centered = part.bias is not None and part.bias.requires_grad
        return torch.cat([own, starts[part.bias] + part.bias_index]) if centered else own

    @property
    def preconditioned(self) -> list[unfolded.Rows]:
        return [part for part in self.rows if part.weight.requires_grad]


def stepped(case: Case, conv: str, engine: str = "auto", **options) -> Stepped:
    module = case.build()
    preconditioner = BNP(decay=0.0, damping=0.0, conv=conv, **options)
    optimizer = PreconditionedGD(module, lr=0.1, preconditioner=preconditioner, engine=engine)
    out = case.call(module)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)).sum().backward()
    params = list(module.parameters())
    with unwatched():
        rows = case.rows(module)
    before = vec.flatten(tuple(p.detach() for p in params)).clone()
    optimizer.step()
    g = vec.flatten(tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in params))
    return Stepped(rows, params, before, g, optimizer.map())


def random(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_unfolding_gives_the_layers_output(case: Case):
    module = case.build()
    out = case.call(module)
    rows = case.rows(module)
    if case.kind == "recurrent":
        return  # compared where they are unrolled
    if case.kind == "attention":
        rows = rows[-1:]  # the projections' outputs are not seen from outside
    found = []
    for part in rows:
        W = part.weight.reshape(-1)[part.index]
        b = 0 if part.bias is None else part.bias.reshape(-1)[part.bias_index]
        found.append(part.samples @ W.T + b)
    y = torch.cat(found, 0 if case.kind == "experts" else 1)
    if case.kind == "conv":  # positions × batch, channels
        dims = module.weight.ndim - 2
        out = out.reshape(-1, module.out_channels, *out.shape[-dims:]).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(out.reshape(y.shape), y, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("conv", "engine"), [("channel", "auto"), ("channel", "loop"), ("patch", "auto")])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_map_is_the_dense_one(case: Case, conv: str, engine: str):
    s = stepped(case, conv, engine)
    P = unfolded.dense(s.params, s.rows, conv)
    inverse, x = torch.linalg.inv(P), random(len(P))
    for method, matrix in [("mv", P), ("rmv", P.T), ("solve", inverse), ("rsolve", inverse.T), ("gram", P @ P.T)]:
        y = vec.flatten(getattr(s.found, method)(vec.unflatten(x, s.like)))
        torch.testing.assert_close(y, matrix @ x, rtol=1e-9, atol=1e-9, msg=lambda m, method=method: f"{method}: {m}")
    torch.testing.assert_close(vec.flatten(s.like), s.before - 0.1 * P @ P.T @ s.g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in CONV if "groups" in c.name or "stride" in c.name], ids=repr)
def test_patch_statistics_differ_from_channel_statistics(case: Case):
    module = case.build()
    maps = [unfolded.dense(list(module.parameters()), case.rows(module), conv) for conv in ("channel", "patch")]
    assert (maps[0] - maps[1]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_damped_map_is_the_dense_one(case: Case):
    """(M⁻¹ + δd̄I)⁻¹, d̄ the mean of M⁻¹'s eigenvalues: over each weight with its bias."""
    s, delta = stepped(case, "channel"), 0.3
    P = unfolded.dense(s.params, s.rows)
    M = P @ P.T
    x = torch.zeros(len(P), dtype=P.dtype)
    for weight in dict.fromkeys(part.weight for part in s.preconditioned):
        i = torch.cat([s.entries(part) for part in s.preconditioned if part.weight is weight])
        inverse = torch.linalg.inv(M[i[:, None], i])
        mean = torch.linalg.eigvalsh(inverse).mean()
        M[i[:, None], i] = torch.linalg.inv(inverse + delta * mean * torch.eye(len(i), dtype=P.dtype))
        x[i] = random(len(i))
    y = vec.flatten(s.found.damped(delta).gram(vec.unflatten(x, s.like)))
    torch.testing.assert_close(y, M @ x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_width_scaling_divides_the_step(case: Case):
    """M/q² with q² = max(n/N, 1), n entries of a row and N samples behind the statistics."""
    plain, scaled = stepped(case, "patch"), stepped(case, "patch", width_scaling=True)
    expected = vec.flatten(plain.found.gram(vec.unflatten(plain.g, plain.like))).clone()
    for part in scaled.preconditioned:
        expected[scaled.entries(part)] /= max(part.index.shape[1] / max(len(part.samples), 1), 1.0)
    y = vec.flatten(scaled.found.gram(vec.unflatten(scaled.g, scaled.like)))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
