"""Statistics of layers that are folded all at once: each layer's are what it alone would have."""

import pytest
import torch
from torch import Tensor, nn

from precond import BNP, Momentum, Polar, PreconditionedGD, Whitening
from precond.optim.preconditioners import input_side


class Net(nn.Module):
    """Layers of different widths: with biases and without, in groups, and one that sees a tenth of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain = nn.Linear(5, 8), nn.Linear(8, 6, bias=False)
        self.grouped, self.head = nn.Conv1d(6, 4, 1, groups=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, 10, 5)
        h = torch.tanh(self.plain(torch.relu(self.first(x))))
        return self.head(self.grouped(h.mT).mT.mean(1))


def rows(name: str, x: Tensor) -> Tensor:
    """What the rows of a layer met, (groups, N, n)."""
    return x.transpose(0, 1).reshape(2, 3, -1).mT if name == "grouped" else x.reshape(1, -1, x.shape[-1])


class Oracle:
    """μ, C and a of a layer from its samples, batch by batch, and σ̃ of them: sums over samples, in float64."""

    def __init__(self) -> None:
        self.N = 0.0

    def see(self, x: Tensor, rho: float, least: bool) -> None:
        N, mean = x.shape[1], x.mean(1)
        C = torch.stack([torch.cov(g.T, correction=0) for g in x])
        if not self.N:
            self.mu, self.C, self.a = torch.zeros_like(mean), torch.zeros_like(C), torch.zeros_like(mean)
        g, d, old = max(N / (self.N + N), 1 - rho), mean - self.mu, self.C.diagonal(dim1=1, dim2=2)
        size = (1 - g) * self.a * old.sqrt() + g * (x - self.mu[:, None]).abs().mean(1)
        square = (1 - g) * old + g * (x - self.mu[:, None]).square().mean(1)
        found = (size / square.sqrt()).nan_to_num(0.0)
        if least and self.N:
            about = ((x - self.mu[:, None]).abs().mean(1) - d.abs()).clamp_min(0) / x.var(1, correction=0).sqrt()
            found = torch.minimum(found, (1 - g) * self.a + g * about.nan_to_num(0.0, 0.0))
        self.C = (1 - g) * self.C + g * C + g * (1 - g) * d[:, :, None] * d[:, None, :]
        self.mu, self.a, self.N = self.mu + g * d, found, N if not rho else self.N + N

    def scales(self, bias: bool, eps: float) -> tuple[Tensor, Tensor]:
        variance = self.C.diagonal(dim1=1, dim2=2)
        square = variance + self.mu.square()
        rare = (1 - 3 * self.a.square() * self.N / (self.N + 8)).clamp_min(0) / 3 * square.mean(1, keepdim=True)
        std = ((variance if bias else square) + eps * square + rare).sqrt()
        return (self.mu if bias else torch.zeros_like(self.mu)), torch.where(std == 0, 1.0, std)


@pytest.mark.parametrize(
    ("P", "rho"),
    [
        (BNP(decay=0.9), lambda N, n: 0.9),
        (BNP(decay=0.0), lambda N, n: 0.0),
        (Whitening(decay=0.8), lambda N, n: 0.8),
        (Whitening(root="cholesky", samples=32.0, observe_steps=200), lambda N, n: min(max(1 - N / (32 * n), 0.0), 0.95)),
    ],
    ids=["bnp", "bnp of the batch", "whitening", "whitening of samples"],
)
def test_layers_folded_at_once_have_the_statistics_of_their_samples(P, rho, monkeypatch) -> None:
    torch.manual_seed(0)
    model, seen, together = Net().double(), {}, []
    kept = input_side.fold
    monkeypatch.setattr(input_side, "fold", lambda folds, active: (together.append(len(folds)), kept(folds, active)))
    inner = P @ Polar() if isinstance(P, Whitening) else P
    optimizer = PreconditionedGD(model, lr=1e-3, preconditioner=inner, momentum=Momentum(0.9, "heavy_ball"))
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, rows(name, args[0].detach())))
    oracles = {name: Oracle() for name, _ in model.named_children()}
    for step, size in enumerate((6, 2, 9, 4)):
        x = torch.randn(size, 10, 5, dtype=torch.float64) * (1 + step) + step
        optimizer.zero_grad()
        model(x * (torch.arange(5) > 0)).square().mean().backward()  # one input is always zero
        optimizer.step()
        for name, found in seen.items():
            oracles[name].see(found, rho(*found.shape[1:]), isinstance(P, Whitening) and bool(P.samples))
    assert max(together) >= 3
    blocks = {cell.leaves[0].name.split(".")[0]: cell for cell in optimizer.cells}
    for name, oracle in oracles.items():
        cell = blocks[name]
        state = cell.state.get("outer", cell.state).as_stack()
        (part,) = P.parts(state.block)
        mine = P.statistics(part, state)
        spread = oracle.C if isinstance(P, Whitening) else oracle.C.diagonal(dim1=1, dim2=2)
        expected = {"mean": oracle.mu, "covariance" if isinstance(P, Whitening) else "variance": spread, "activity": oracle.a}
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-12)
        for a, b in zip(P.scales(part, mine), oracle.scales(part.bias is not None, P.damping), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
