"""Images of the fourth set, drawn with a seed: figures of Lissajous, spectrograms of vowels, clocks."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.lab.workloads.data import Part

π = torch.pi
LISSAJOUS_SIDE, RATIOS = 20, ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2))
BANDS, FRAMES = 16, 24
VOWELS = {
    "i": (280, 2250, 2900), "e": (400, 2100, 2700), "ɛ": (550, 1850, 2500), "a": (750, 1300, 2500),
    "ɔ": (580, 900, 2450), "o": (400, 780, 2400), "u": (310, 800, 2300), "y": (270, 1800, 2150),
}  # fmt: skip
CLOCK_SIDE, HOURS = 16, 12


def lissajous(seed: int, n: int) -> Part:
    """Figures (sin(at + φ), sin(bt)) of seven ratios a:b, any phase, size and place, in noise: images (N, 1, 20, 20) and ratios (N,)."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(RATIOS), (n,), generator=g)
    frequency = torch.tensor(RATIOS)[kind].T[..., None]
    phase = 2 * π * torch.rand(2, n, 1, generator=g)
    size, middle = 0.55 + 0.4 * torch.rand(2, n, 1, generator=g), 0.3 * torch.rand(2, n, 1, generator=g) - 0.15
    t = 2 * π * torch.arange(80) / 80
    place = (LISSAJOUS_SIDE - 1) / 2 * (1 + middle + size * (frequency * t + phase).sin())
    # A bump of two variables is the product of two of one: (2, N, t, side).
    x, y = (-(torch.arange(LISSAJOUS_SIDE) - place[..., None]).square()).exp()
    images = torch.zeros(n, LISSAJOUS_SIDE, LISSAJOUS_SIDE)
    for i in range(len(t)):
        images = torch.maximum(images, y[:, i, :, None] * x[:, i, None, :])
    noise = 0.4 * torch.randn(n, LISSAJOUS_SIDE, LISSAJOUS_SIDE, generator=g)
    return Part(((1.3 + 1.2 * torch.rand(n, 1, 1, generator=g)) * images - 0.4 + noise)[:, None], kind)


def vowels(seed: int, n: int) -> Part:
    """Logarithms of the power of vowels in 16 mel bands and 24 frames, (N, 1, 16, 24), and which of eight vowels each is (N,).

    A vowel has three formants; each example has a vocal tract, a tilt of the spectrum, a slow glide, an onset, an end and noise of its own.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    kind = torch.randint(len(VOWELS), (n,), generator=g)
    time = torch.linspace(-1, 1, FRAMES)
    tract, glide = 0.1 * normal(n, 1, 1), 0.05 * normal(n, 3, 1)
    formants = torch.tensor(list(VOWELS.values()), dtype=torch.float32)[kind]
    middle = mel((formants[..., None] * (tract + 0.04 * normal(n, 3, 1) + glide * time).exp()).clamp(150, 3800))
    band = torch.linspace(mel(torch.tensor(150.0)), mel(torch.tensor(3800.0)), BANDS)
    peaks = (-((band[:, None] - middle[:, :, None]) / 110).square() / 2).exp()  # (N, formants, bands, frames)
    loud = torch.tensor([1.0, 0.6, 0.35]).view(3, 1, 1) * (0.3 * normal(n, 3, 1, 1)).exp()
    tilt = (0.5 + 0.4 * normal(n, 1, 1)) * torch.linspace(0, 1, BANDS)[:, None]
    begin, end = (torch.rand(2, n, 1, 1, generator=g) * 0.5 + 0.4).unbind()
    envelope = torch.sigmoid(12 * (time + begin)) * torch.sigmoid(12 * (end - time))
    power = envelope * (-tilt).exp() * (loud * peaks).sum(1) + 0.03 * (0.5 * normal(n, 1, 1)).exp()
    return Part((power.log() + 2 + 0.5 * normal(n, BANDS, FRAMES))[:, None], kind)


def mel(frequency: Tensor) -> Tensor:
    """Pitch in mel of a frequency in Hz (O'Shaughnessy, 1987)."""
    return 2595 * (1 + frequency / 700).log10()


def clocks(seed: int, n: int) -> Part:
    """Clocks with a short thick hand and a long thin one, in noise: images (N, 1, 16, 16) and the last full hour, 0 to 11 (N,)."""
    g = torch.Generator().manual_seed(seed)
    hours = HOURS * torch.rand(n, 1, 1, generator=g)
    middle = 0.2 * torch.rand(2, n, 1, 1, generator=g) - 0.1
    size, bright = 0.8 + 0.2 * torch.rand(n, 1, 1, generator=g), 0.7 + 0.6 * torch.rand(n, 1, 1, generator=g)
    line = torch.linspace(-1, 1, CLOCK_SIDE)
    y, x = ((axis - m) / size for axis, m in zip(torch.meshgrid(line, line, indexing="ij"), middle, strict=True))
    rim = _soft(((x.square() + y.square()).sqrt() - 0.95).abs() - 0.03)
    short = _hand(x, y, hours / HOURS, 0.5, 0.1)
    long = _hand(x, y, hours % 1, 0.8, 0.03)
    images = bright * torch.maximum(torch.maximum(short, long), 0.5 * rim)
    return Part(
        (images - 0.2 + 0.15 * torch.randn(n, CLOCK_SIDE, CLOCK_SIDE, generator=g))[:, None], hours.floor().long().flatten()
    )


def _hand(x: Tensor, y: Tensor, turn: Tensor, length: float, width: float) -> Tensor:
    """A stroke from the middle outwards; turns are clockwise from the top, y points down."""
    east, south = (2 * π * turn).sin(), -(2 * π * turn).cos()
    along = (x * east + y * south).clamp(0, length)
    return _soft(((x - along * east).square() + (y - along * south).square()).sqrt() - width)


def _soft(distance: Tensor) -> Tensor:
    return torch.sigmoid(-20 * distance)
