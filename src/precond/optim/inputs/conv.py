"""Inputs of convolutions and transposed convolutions of one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.algebra.maps import Layout
from precond.optim.inputs.moments import Moments, Request, of_columns, widened
from precond.optim.inputs.patches import of_patches
from precond.optim.inputs.reading import argument, called_with, is_called_as, plain
from precond.optim.inputs.taps import Tap, Weight

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHUNK = 2**24  # entries of patches that are unfolded at once
_FEW = 2**17  # entries of patches up to which making them all costs less


@dataclass(frozen=True, eq=False)
class Images:
    """What a convolution was called with.

    Attributes:
        x: a batch, (B, channels, …).
        wanted: the size of the output that a transposed convolution was asked for, or None.
    """

    x: Tensor
    wanted: Any = None


class ConvTap(Tap):
    """Any ``nn.Conv…`` and ``nn.ConvTranspose…``: groups, stride, dilation, every padding mode."""

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight, self.module.bias)]

    def layout(self, weight: Weight, request: Request) -> Layout:
        per_channel = request.kind == "moments" and request.conv == "channel"
        return Layout(self.module.groups, self.module.transposed, weight.param.shape[2:].numel() if per_channel else 1)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Images | None:
        m = self.module
        dims = m.weight.ndim
        channels = m.weight.shape[0] if m.transposed else m.weight.shape[1] * m.groups
        fits = lambda t: t.ndim in (dims, dims - 1) and t.shape[1 - dims] == channels  # noqa: E731
        if any(is_called_as(m, base) for base in _CLASSES):
            x = plain(args[0] if args else kwargs.get("input"))
        else:
            x = plain(argument(m, args, kwargs, fits))
        if x is None or not fits(x):  # a call of another shape raises by itself
            return None
        wanted = called_with(m, args, kwargs).get("output_size") if m.transposed else None
        return Images(x if x.ndim == dims else x[None], wanted)

    def origin(self, seen: Images, weight: Weight) -> Tensor:
        return seen.x

    def examples(self, seen: Images) -> int:
        return len(seen.x)

    def pieces(self, seen: Images, weight: Weight) -> Iterator[Tensor]:
        entries = weight.param[0].numel() * seen.x[0, 0].numel()
        for piece in seen.x.split(max(1, _CHUNK // max(entries, 1))):
            yield self.rows(replace(seen, x=piece), weight)

    def moments(self, seen: Images, weight: Weight, request: Request, center: Tensor | None) -> Moments | None:
        if request.kind == "covariance" or request.conv == "patch":
            by_rows = self._by_rows(seen, center) if request.kind == "covariance" else None
            return super().moments(seen, weight, request, center) if by_rows is None else by_rows
        x, groups = seen.x.detach(), self.module.groups
        return of_columns(x.transpose(0, 1).reshape(groups, x.shape[1] // groups, -1), center, len(x))

    def _by_rows(self, seen: Images, center: Tensor | None) -> Moments | None:
        """Moments of patches on a processor, of which not all are made; None where these are few, or not of images or series."""
        m, x = self.module, seen.x
        if not isinstance(m, nn.Conv1d | nn.Conv2d) or x.device.type != "cpu" or m.kernel_size[0] == 1:
            return None
        x, places, n = self._padded(widened(x.detach())), len(x), m.weight[0].numel()
        for size, k, step, apart in zip(x.shape[2:], m.kernel_size, m.stride, m.dilation, strict=True):
            places *= (size - apart * (k - 1) - 1) // step + 1
        if places < n or places * n * m.groups < _FEW:
            return None
        flat = isinstance(m, nn.Conv1d)  # a series is an image of one column
        two = lambda each: (each[0], 1 if flat else each[1])  # noqa: E731
        x = x[..., None] if flat else x
        return of_patches(x, two(m.kernel_size), two(m.stride), two(m.dilation), m.groups, center, len(x))

    def _padded(self, x: Tensor) -> Tensor:
        m = self.module
        around = m._reversed_padding_repeated_twice
        return F.pad(x, around, mode="constant" if m.padding_mode == "zeros" else m.padding_mode) if any(around) else x

    def rows(self, seen: Images, weight: Weight) -> Tensor:
        return self.patches(seen, weight).flatten(1, 2)

    def patches(self, seen: Images, weight: Weight) -> Tensor:
        """The rows as a view, (groups, images, places in each, n)."""
        m = self.module
        x = widened(seen.x.detach())
        channels = x.shape[1] // m.groups
        n = channels * m.weight[0, 0].numel()
        if isinstance(m, nn.Conv2d):
            y = F.unfold(self._padded(x), m.kernel_size, m.dilation, 0, m.stride)
            return y.view(y.shape[0], m.groups, n, -1).permute(1, 0, 3, 2)
        # Elsewhere a convolution with one unit kernel per patch entry lists the patches, whatever the stride, dilation and padding.
        units = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, channels, *m.weight.shape[2:])
        if m.transposed:
            kernel = units.transpose(0, 1).repeat(m.groups, *[1] * (x.ndim - 1))
            extra = m._output_padding(x, seen.wanted, m.stride, m.padding, m.kernel_size, x.ndim - 2, m.dilation)
            y = _TRANSPOSED[x.ndim](x, kernel, None, m.stride, m.padding, extra, m.groups, m.dilation)
        else:
            kernel = units.repeat(m.groups, *[1] * (x.ndim - 1))
            padding = m.padding
            if m.padding_mode != "zeros":
                x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
            y = _CONV[x.ndim](x, kernel, None, m.stride, padding, m.dilation, m.groups)
        return y.flatten(2).reshape(y.shape[0], m.groups, n, -1).permute(1, 0, 3, 2)
