"""Inputs of convolutions and transposed convolutions of one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precond.inputs.moments import Moments, Request, of_columns, widened
from precond.inputs.taps import Tap, Weight
from precond.maps import Layout

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class ConvTap(Tap):
    """Any ``nn.Conv…`` and ``nn.ConvTranspose…``: groups, stride, dilation, every padding mode."""

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight, self.module.bias)]

    def layout(self, weight: Weight, request: Request) -> Layout:
        per_channel = request.kind == "moments" and request.conv == "channel"
        return Layout(self.module.groups, self.module.transposed, weight.param.shape[2:].numel() if per_channel else 1)

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return x if x.ndim == self.module.weight.ndim else x[None]

    def examples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return len(self._batch(args, kwargs))

    def moments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight, request: Request, center: Tensor | None
    ) -> Moments:
        if request.kind == "covariance" or request.conv == "patch":
            return super().moments(args, kwargs, weight, request, center)
        x = self._batch(args, kwargs).detach()
        groups = self.module.groups
        return of_columns(x.transpose(0, 1).reshape(groups, x.shape[1] // groups, -1), center, len(x))

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> Tensor:
        m = self.module
        x = widened(self._batch(args, kwargs).detach())
        channels = x.shape[1] // m.groups
        n = channels * m.weight[0, 0].numel()
        # A convolution with one unit kernel per patch entry lists the patches, whatever the stride, dilation and padding.
        units = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, channels, *m.weight.shape[2:])
        if m.transposed:
            kernel = units.transpose(0, 1).repeat(m.groups, *[1] * (x.ndim - 1))
            wanted = args[1] if len(args) > 1 else kwargs.get("output_size")
            extra = m._output_padding(x, wanted, m.stride, m.padding, m.kernel_size, x.ndim - 2, m.dilation)
            y = _TRANSPOSED[x.ndim](x, kernel, None, m.stride, m.padding, extra, m.groups, m.dilation)
        else:
            kernel = units.repeat(m.groups, *[1] * (x.ndim - 1))
            padding = m.padding
            if m.padding_mode != "zeros":
                x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
            y = _CONV[x.ndim](x, kernel, None, m.stride, padding, m.dilation, m.groups)
        return y.flatten(2).reshape(y.shape[0], m.groups, n, -1).permute(1, 0, 3, 2).flatten(1, 2)
