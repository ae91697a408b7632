"""Models of pictures of the seventh set: a variational autoencoder, a denoiser of diffusion, an inverted-residual net, shifted windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvVAE(nn.Module):
    """Strided convolutions to a normal code and transposed ones back (Kingma & Welling, 2014): (N, 1, 16, 16) ↦ (N, 256 + 2·code), pixels
    beside means and log variances of the code."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.channels = channels
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(),
            nn.Conv2d(channels, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_variance = nn.Linear(16 * channels, code), nn.Linear(16 * channels, code)
        self.widen = nn.Linear(code, 16 * channels)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(),
            nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(),
            nn.Conv2d(channels, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder(images)
        mean, log_variance = self.mean(x), self.log_variance(x)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        code = mean + (log_variance / 2).exp() * noise
        pixels = self.decoder(self.widen(code).view(-1, self.channels, 4, 4))
        return torch.cat([pixels.flatten(1), mean, log_variance], 1)


class TimedBlock(nn.Module):
    """x ↦ two convolutions, each behind group normalization and SiLU, the time added between them, + x (Ho et al., 2020)."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class NoiseUNet(nn.Module):
    """The noise in pictures of side 8 at a time, by a U-Net of two levels: (N, 64 + 1) ↦ (N, 1, 8, 8)."""

    frequencies: Tensor

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, time // 2))
        self.time = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.before = TimedBlock(channels, channels, time)
        self.down = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.middle = TimedBlock(2 * channels, 2 * channels, time)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, 2)
        self.after = TimedBlock(2 * channels, channels, time)
        self.norm, self.head = nn.GroupNorm(4, channels), nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        turns = pixels[:, 64:] * self.frequencies
        time = self.time(torch.cat([turns.sin(), turns.cos()], 1))
        x = self.before(self.stem(pixels[:, :64].view(-1, 1, 8, 8)), time)
        y = self.up(self.middle(self.down(x), time))
        return self.head(F.silu(self.norm(self.after(torch.cat([x, y], 1), time))))


class SqueezeExcitation(nn.Module):
    """Channels times what a small net makes of their means (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """1×1 to more channels, depthwise 3×3, squeeze and excitation, 1×1 to fewer; + x where it may (Howard et al., 2019)."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int = 3) -> None:
        super().__init__()
        wide = expansion * channels
        self.residual = stride == 1 and channels == out
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            SqueezeExcitation(wide, wide // 4),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    """Inverted residuals behind a strided convolution, initialized as Tan & Le's (2019): (N, 3, side, side) ↦ (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
        self.blocks = nn.Sequential(
            InvertedResidual(12, 12, 1), InvertedResidual(12, 20, 2), InvertedResidual(20, 20, 1), InvertedResidual(20, 32, 1)
        )
        self.last = nn.Sequential(nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.Hardswish())
        self.head = nn.Linear(96, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(images))).mean((2, 3)))


class WindowAttention(nn.Module):
    """Attention within windows of (n, n) tokens, with a bias for each relative place: (windows, n², width) ↦ the same."""

    places: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = at[:, None] - at + window - 1
        self.register_buffer("places", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.places].permute(2, 0, 1)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias.expand(len(x), -1, -1, -1)).transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Attention within windows, which may be shifted, and an MLP (Liu et al., 2021): (N, side, side, width) ↦ the same."""

    mask: Tensor | None

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        region = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift).long()
        regions = self._windows((3 * region[:, None] + region).view(1, side, side, 1))[..., 0]
        apart = torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)
        self.register_buffer("mask", apart if shift else None)

    def _windows(self, x: Tensor) -> Tensor:
        """(N, side, side, width) ↦ (N · windows, window², width)."""
        n, side, _, width = x.shape
        x = x.view(n, side // self.window, self.window, side // self.window, self.window, width)
        return x.transpose(2, 3).reshape(-1, self.window**2, width)

    def forward(self, x: Tensor) -> Tensor:
        n, side, _, width = x.shape
        windows = self._windows(self.norm1(x).roll((-self.shift, -self.shift), (1, 2)))
        seen = self.attention(windows, self.mask).view(n, side // self.window, -1, self.window, self.window, width)
        x = x + seen.transpose(2, 3).reshape(x.shape).roll((self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two stages of two blocks, of 8 x 8 patches and of 4 x 4 merged ones: (N, 3, 16, 16) ↦ (N, classes)."""

    def __init__(self, classes: int, width: int, heads: int) -> None:
        super().__init__()
        self.patches, self.norm0 = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.stage1 = nn.Sequential(SwinBlock(width, heads, 8, 4, 0), SwinBlock(width, heads, 8, 4, 2))
        self.merge_norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)
        self.stage2 = nn.Sequential(*(SwinBlock(2 * width, 2 * heads, 4, 4, 0) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage1(self.norm0(self.patches(images).permute(0, 2, 3, 1)))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], 3)
        return self.head(self.norm(self.stage2(self.merge(self.merge_norm(x)))).mean((1, 2)))
