"""The tasks that are locked now: made after the first locked half had been looked at, before anything was trained on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.networks import CharacterTransformer, VisionTransformer
from precond.lab.workloads.pool.finetuning import trained, tuned_with_lora
from precond.lab.workloads.pool.member import Family, Member, in_parts, standard
from precond.lab.workloads.pool.physics import physics
from precond.lab.workloads.pool.tabular import MLP
from precond.lab.workloads.problem import LossFn, Metric, Tensors

SIDE, GRATINGS = 16, 6
SIGNS = "0123456789+=;"
SUM_LENGTH = 30


class ConvAutoencoder(nn.Module):
    """Strided convolutions with batch normalization to a code, and transposed ones back: (N, 1, 16, 16) ↦ the same."""

    def __init__(self, channels: int = 8, code: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1), nn.BatchNorm2d(2 * channels), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * channels, code),
        )  # fmt: skip
        self.widen = nn.Linear(code, 32 * channels)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.ConvTranspose2d(channels, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(F.relu(self.widen(self.encoder(images))).unflatten(1, (2 * self.channels, 4, 4)))


class GroupNormNet(nn.Module):
    """Convolutions 3×3 with group normalization and GELU, two of them strided, averaged over the image before the last layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = ((1, channels, 1), (channels, 2 * channels, 2), (2 * channels, 2 * channels, 2))
        self.body = nn.Sequential(
            *(layer for a, b, stride in sizes for layer in (nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.GELU()))
        )
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Forecaster(nn.Module):
    """A later value of a series from those so far, (N, T, 1) ↦ (N, T, 1): an LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(1, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


class FactorizationMachine(nn.Module):
    """Σ bᵢ + Σ ⟨vᵢ, vⱼ⟩ + MLP(v) over fields' vectors (Guo et al., 2017): codes (N, fields) ↦ (N, 1)."""

    def __init__(self, fields: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.biases = nn.ModuleList(nn.Embedding(rows, 1) for rows in fields)
        self.vectors = nn.ModuleList(nn.Embedding(rows, width) for rows in fields)
        for table in (*self.biases, *self.vectors):
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.1)
        self.deep = MLP(width * len(fields), 48, 1)

    def forward(self, codes: Tensor) -> Tensor:
        v = torch.stack([table(codes[:, i]) for i, table in enumerate(self.vectors)], 1)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True) / 2
        biases = torch.stack([table(codes[:, i]) for i, table in enumerate(self.biases)]).sum(0)
        return biases + pairs + self.deep(v.flatten(1))


def gratings(seed: int, noise: float = 1.0, n: int = 3072) -> dict[str, Part]:
    """Waves of one of six directions, of any wavelength and phase, in noise: images (N, 1, 16, 16) and directions (N,)."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(GRATINGS, (n,), generator=g)
    angle = (torch.pi * kind / GRATINGS)[:, None, None]
    length, phase = (torch.rand(2, n, 1, 1, generator=g) * torch.tensor([3.0, 2 * torch.pi]).view(2, 1, 1, 1)).unbind()
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = (2 * torch.pi * (x * angle.cos() + y * angle.sin()) / (3 + length) + phase).sin()
    return in_parts(Part((waves + noise * torch.randn(n, SIDE, SIDE, generator=g))[:, None], kind))


def arm(seed: int, n: int = 3072) -> Part:
    """Where an arm of four joints ends, squared distance and height, from its angles (degrees) and lengths (mm)."""
    g = torch.Generator().manual_seed(seed)
    angles = 360 * torch.rand(n, 4, generator=g) - 180
    lengths = 100 + 300 * torch.rand(n, 4, generator=g)
    turned = angles.deg2rad().cumsum(1)
    x, y = (lengths * turned.cos()).sum(1), (lengths * turned.sin()).sum(1)
    return Part(torch.cat([angles, lengths], 1), standard(torch.stack([x, y], 1)))


def pendulums(seed: int, n: int, steps: int) -> Tensor:
    """Angles of damped pendulums with a seen noise of 0.05, (n, steps), every 0.3; symplectic Euler steps of 0.01."""
    g = torch.Generator().manual_seed(seed)
    angle, speed = (torch.rand(2, n, generator=g) * 4 - 2).unbind()
    speed, stiffness = speed / 2, 1 + torch.rand(n, generator=g)  # none goes over the top
    seen = []
    for i in range(30 * steps):
        speed = speed - 0.01 * (stiffness * angle.sin() + 0.05 * speed)
        angle = angle + 0.01 * speed
        if i % 30 == 29:
            seen.append(angle)
    return torch.stack(seen, 1) + 0.05 * torch.randn(n, steps, generator=g)


def sums(seed: int, n: int) -> Part:
    """Lines like ``37+8=45;12+61=73;…`` of 30 signs as numbers of signs, and the sign that follows each."""
    g = torch.Generator().manual_seed(seed)
    lines = []
    for pairs in torch.randint(100, (n, SUM_LENGTH, 2), generator=g).tolist():
        line = "".join(f"{a}+{b}={a + b};" for a, b in pairs[: SUM_LENGTH // 6 + 2])
        lines.append([SIGNS.index(sign) for sign in line[: SUM_LENGTH + 1]])
    signs = torch.tensor(lines)
    return Part(signs[:, :-1], signs[:, 1:])


def baskets(seed: int, fields: tuple[int, ...], n: int) -> Part:
    """Codes of fields with Zipf's frequencies, and standardized values: effects, and products of rank 2 of all pairs, with noise."""
    g = torch.Generator().manual_seed(seed)
    codes = [torch.multinomial(torch.arange(1, f + 1.0) ** -0.8, n, replacement=True, generator=g) for f in fields]
    hidden = [torch.randn(f, 2, generator=g)[code] for f, code in zip(fields, codes, strict=True)]
    total = torch.stack(hidden).sum(0)
    products = (total.square() - torch.stack(hidden).square().sum(0)).sum(1)
    values = products + sum(torch.randn(f, generator=g)[code] for f, code in zip(fields, codes, strict=True))
    return Part(torch.stack(codes, 1), standard(values + 0.5 * torch.randn(n, generator=g))[:, None])


def _task(
    name: str,
    about: str,
    parts: dict[str, Part],
    model: Callable[[], nn.Module],
    words: str,
    loss: LossFn,
    metric: Metric | None,
    batch: int,
) -> Tensors:
    told = "cross entropy" if loss is F.cross_entropy else "mean squared error"
    evaluated = min(512, len(parts["train"]) // 2)
    return Tensors(name, about, parts, model, loss, metric, batch, evaluated, words, told)


@cache
def _tumors() -> Tensors:
    data = load_data("breast-cancer")
    return _task(
        "breast-cancer",
        data.about,
        dict(data.parts),
        partial(MLP, 30, 48, 48, 2),
        "MLP 30-48-48-2, ReLU",
        F.cross_entropy,
        "accuracy",
        32,
    )


@cache
def _arm() -> Tensors:
    parts = standardized(in_parts(arm(101)))
    make = lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))  # noqa: E731
    about = "Arms of four joints (seed 101): place of the end from angles in degrees and lengths in millimeters; targets standardized."
    return _task("arm", about, parts, make, "MLP 8-64-64-2, tanh", F.mse_loss, "R²", 64)


@cache
def _waves() -> Tensors:
    noisy = gratings(102, 0.2)
    parts = {name: Part(part.inputs, part.inputs) for name, part in noisy.items()}
    words = "convolutional autoencoder with BN, 8 and 16 channels, code of 16, transposed convolutions"
    return _task("gratings", "Gratings, 16 x 16, noise 0.2 (seed 102)", parts, ConvAutoencoder, words, F.mse_loss, None, 32)


@cache
def _gratings(which: str, seed: int) -> Tensors:
    makes: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "conv": (partial(GroupNormNet, 8, GRATINGS), "conv net with group normalization, 8, 16 and 16 channels, GELU"),
        "ViT": (
            partial(VisionTransformer, GRATINGS, SIDE, 4, 32, 2, 4),
            "vision transformer, patches of 4 x 4, width 32, 2 layers",
        ),
    }
    make, words = makes[which]
    about = f"Gratings, 16 x 16, six directions, any wavelength from 3 to 6 pixels and phase, noise 1 (seed {seed})"
    return _task("gratings", about, gratings(seed), make, words, F.cross_entropy, "accuracy", 32)


@cache
def _sums() -> Tensors:
    parts = in_parts(sums(105, 3072))
    make = partial(CharacterTransformer, len(SIGNS), SUM_LENGTH, 48, 2, 4)
    about = "Sums, 13 signs: lines like 37+8=45;12+61=73; (seed 105)"
    return _task(
        "sums",
        about,
        parts,
        make,
        "causal transformer, pre-LayerNorm, width 48, 2 layers, 4 heads",
        F.cross_entropy,
        "accuracy",
        16,
    )


@cache
def _pendulums() -> Tensors:
    ahead, length = 4, 28
    series = standard(pendulums(106, 1536, length + ahead).reshape(-1, 1)).view(1536, -1, 1)
    parts = in_parts(Part(series[:, :length], series[:, ahead:]), (1024, 256, 256))
    about = f"Pendulums with damping and noise (seed 106); the target is the angle {ahead} places later."
    return _task(
        "pendulums", about, parts, partial(Forecaster, 40), "LSTM of width 40, one layer, 28 places", F.mse_loss, None, 32
    )


@cache
def _baskets() -> Tensors:
    fields = (400, 250, 24, 7)
    parts = in_parts(baskets(108, fields, 10_000), (8000, 1000, 1000))
    words = "factorization machine with vectors of 8 beside an MLP 32-48-1"
    about = (
        f"Baskets with fields of {', '.join(map(str, fields))} values (seed 108): effects and products of rank 2, standardized."
    )
    return _task("baskets", about, parts, partial(FactorizationMachine, fields), words, F.mse_loss, "R²", 128)


@cache
def _tuned() -> Tensors:
    data = load_data("digits")
    parts = {name: Part(part.inputs.flatten(1) / 16, part.targets) for name, part in data.parts.items()}
    old, new = ({k: p[(p.targets >= 5) == late] for k, p in parts.items()} for late in (False, True))
    new = {name: Part(1 - p.inputs, p.targets - 5) for name, p in new.items()}
    make = partial(MLP, 64, 96, 96, 5)
    state = trained(make, old["train"], 64, 120, 0.005)

    def tuned() -> nn.Module:
        return tuned_with_lora(make(), state, rank=4, alpha=8)

    words = "MLP 64-96-96-5 trained before on the digits 0 to 4; LoRA of rank 4 on its hidden layers, and a new last layer"
    return _task(
        "digits",
        f"{data.about} The digits 5 to 9, with dark and light exchanged.",
        new,
        tuned,
        words,
        F.cross_entropy,
        "accuracy",
        32,
    )


_ROWS: tuple[tuple[str, Family, int, Callable[[], Tensors]], ...] = (
    ("breast cancer, raw", "tabular", 400, _tumors),
    ("arm of four joints, raw", "tabular", 500, _arm),
    ("conv autoencoder with BN, gratings", "autoencoders", 240, _waves),
    ("conv net with group normalization, gratings", "conv nets", 240, partial(_gratings, "conv", 103)),
    ("vision transformer, gratings", "vision transformers", 240, partial(_gratings, "ViT", 104)),
    ("GPT, sums", "language models", 240, _sums),
    ("LSTM, pendulums", "recurrent nets", 300, _pendulums),
    ("PINN, wave", "PINNs", 500, partial(physics, "wave", 107)),
    ("factorization machine, baskets", "recommenders", 400, _baskets),
    ("MLP with LoRA, to new digits", "fine-tuning", 300, _tuned),
)
MEMBERS = tuple(Member(*row) for row in _ROWS)
