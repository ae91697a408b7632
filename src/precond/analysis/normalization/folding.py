r"""An affine change of every feature, h̃ = a∘h + c, folded into the linear layer that follows or precedes it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from precond.algebra.maps import Layout


class ChannelPad(nn.Module):
    """Pads with a constant per channel, where a folded convolution was padded with zeros.

    Args:
        value: of each channel, shape (C,).
        pad: widths as in ``torch.nn.functional.pad``, from the last dimension on.

    Example:
        >>> ChannelPad(torch.tensor([5.0]), (1, 1))(torch.zeros(1, 1, 2))
        tensor([[[5., 0., 0., 5.]]])
    """

    value: Tensor

    def __init__(self, value: Tensor, pad: tuple[int, ...]):
        super().__init__()
        self.register_buffer("value", value)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        positions = len(self.pad) // 2
        value = self.value.to(x.dtype).reshape(-1, *[1] * positions)
        outside = F.pad(x.new_zeros(1, *x.shape[-positions:]), self.pad, value=1.0)
        return F.pad(x, self.pad) + value * outside

    def extra_repr(self) -> str:
        return f"channels={len(self.value)}, pad={self.pad}"


class CannotFold(ValueError):
    """A layer cannot take up a change of its features exactly."""


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be folded into at all; None: it can."""
    if not isinstance(layer, nn.Linear | _ConvNd):
        return f"a {type(layer).__name__} is neither nn.Linear nor a convolution"
    if parametrize.is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed from other parameters; remove the parametrization first"
    return None


def zero_padded(layer: _ConvNd) -> bool:
    """Whether a convolution pads with zeros."""
    widths: Any = layer._reversed_padding_repeated_twice
    return layer.padding_mode == "zeros" and any(widths)


def after(layer: nn.Linear | _ConvNd, scale: Tensor, shift: Tensor) -> nn.Module:
    r"""A layer f̃ with f̃(h) = f(a∘h + c): W̃ = W diag(a), b̃ = b + Wc (Ye, eqs. 22–23).

    Args:
        layer: f.
        scale: a, one per input feature or channel.
        shift: c, the same.

    Returns:
        A copy of the layer, with a bias if it needs one; for a zero-padded convolution with c ≠ 0, ``ChannelPad`` with −c/a and the layer
        without padding.

    Raises:
        CannotFold: for a transposed convolution with c ≠ 0, and for a zero-padded one with a = 0, c ≠ 0 in a channel.
    """
    new: Any = copy.deepcopy(layer)
    scale, shift = scale.detach().double().to(layer.weight.device), shift.detach().double().to(layer.weight.device)
    shifted = bool(shift.any())
    conv = isinstance(layer, _ConvNd)
    if shifted and isinstance(layer, _ConvTransposeNd):
        raise CannotFold(
            "a transposed convolution applies another part of its kernel at every position, so a shift of its inputs is no constant of its "
            "outputs; keep the normalization, or use one without shift"
        )
    layout = Layout(layer.groups, layer.transposed) if isinstance(layer, _ConvNd) else Layout()
    kernel = layer.weight.shape[2:].numel() if conv else 1
    W = layer.weight.detach().double()
    view = layout.view(W)  # (groups, rows, n)
    spread = lambda x: x.reshape(layout.groups, 1, -1).repeat_interleave(kernel, -1)  # noqa: E731
    _write(new.weight, layout.back(view * spread(scale), W))
    if not shifted:
        return new
    b = (view * spread(shift)).sum(-1).flatten()
    _write_bias(new, b if layer.bias is None else layer.bias.detach().double() + b)
    if isinstance(layer, _ConvNd) and zero_padded(layer):
        if bool(((scale == 0) & (shift != 0)).any()):
            raise CannotFold(
                "a channel is constant (scale 0) and not zero, so zero padding is no value of it; keep the normalization, or leave the channel "
                "out"
            )
        value = torch.where(shift == 0, 0, -shift / torch.where(scale == 0, 1, scale)).to(layer.weight.dtype)
        pad = tuple(new._reversed_padding_repeated_twice)
        new.padding = "valid" if isinstance(new.padding, str) else (0,) * len(new.padding)
        new._reversed_padding_repeated_twice = [0] * len(pad)
        return nn.Sequential(OrderedDict(pad=ChannelPad(value, pad), conv=new))
    return new


def before(layer: nn.Linear | _ConvNd, scale: Tensor, shift: Tensor) -> nn.Module:
    r"""A copy of the layer with f̃(h) = a∘f(h) + c: W̃ = diag(a)W, b̃ = a∘b + c."""
    new: Any = copy.deepcopy(layer)
    scale, shift = scale.detach().double().to(layer.weight.device), shift.detach().double().to(layer.weight.device)
    layout = Layout(layer.groups, layer.transposed) if isinstance(layer, _ConvNd) else Layout()
    W = layer.weight.detach().double()
    _write(new.weight, layout.back(layout.view(W) * scale.reshape(layout.groups, -1, 1), W))
    _write_bias(new, shift if layer.bias is None else scale * layer.bias.detach().double() + shift)
    return new


def _write(param: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


def _write_bias(layer: Any, value: Tensor) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.empty_like(value, dtype=layer.weight.dtype), layer.weight.requires_grad)
    _write(layer.bias, value)
