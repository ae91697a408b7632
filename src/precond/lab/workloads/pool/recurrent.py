"""LSTM and GRU: characters of texts, and a chaotic series of which one coordinate is seen."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.language import CONTEXT, text
from precond.lab.workloads.pool.member import Member, in_parts
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.text import ALPHABET


class CharacterLSTM(nn.Module):
    """Next characters, (N, T) ↦ (N, characters, T)."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.recurrent = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.token(tokens))[0]).transpose(1, 2)


class SeriesGRU(nn.Module):
    """A later value of a series from those so far, (N, T, 1) ↦ (N, T, 1)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(1, width, layers, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


def lorenz(seed: int, n: int, steps: int, interval: float = 0.04) -> Tensor:
    """First coordinates of n trajectories of Lorenz's (1963) system, (n, steps) in float64; Runge-Kutta steps of interval/4."""
    state = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 8 + torch.tensor(
        [0.0, 0.0, 25.0]
    )
    h = interval / 4

    def slope(s: Tensor) -> Tensor:
        x, y, z = s.unbind(1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)

    seen = []
    for i in range(4 * (steps + 50)):  # the first 50 lead onto the attractor
        a = slope(state)
        b = slope(state + h / 2 * a)
        c = slope(state + h / 2 * b)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c))
        if i % 4 == 3 and i >= 200:
            seen.append(state[:, 0])
    return torch.stack(seen, 1)


@cache
def _characters() -> Tensors:
    about, parts = text("code")
    return Tensors(
        "code",
        about,
        parts,
        partial(CharacterLSTM, len(ALPHABET), 64, 1),
        F.cross_entropy,
        "accuracy",
        16,
        64,
        f"LSTM of width 64, one layer, context {CONTEXT}",
        "cross entropy of the next character",
    )


@cache
def _series() -> Tensors:
    ahead, length = 6, 32
    seen = lorenz(78, 1536, length + ahead)
    series = ((seen - seen.mean()) / seen.std()).float()[:, :, None]
    parts = in_parts(Part(series[:, :length], series[:, ahead:]), (1024, 256, 256))
    about = (
        f"Trajectories of Lorenz's system (seed 78), of which the first coordinate is seen every 0.04; the target is its value {ahead} "
        "places later."
    )
    net, model = "GRU of width 48, one layer, 32 places", partial(SeriesGRU, 48, 1)
    return Tensors("Lorenz", about, parts, model, F.mse_loss, None, 32, 128, net, "mean squared error")


MEMBERS = (
    Member("LSTM, code", "recurrent nets", 400, _characters),
    Member("GRU, Lorenz series", "recurrent nets", 400, _series),
)
