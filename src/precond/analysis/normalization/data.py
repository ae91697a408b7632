r"""Normalization of the data: x̃ = (x − offset)/width, every feature by its own (Ye, section on input normalization)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from precond.algebra.maps import Layout, Standardizing
from precond.analysis.normalization import folding
from precond.analysis.normalization.summary import Summary


class Normalization(nn.Module, ABC):
    r"""x̃ = (x − offset)/width, fitted to data.

    A module for the front of a model, a change of the first layer (:meth:`fold`), or a change of coordinates of its parameters (:meth:`map`):
    the same thing three times. A constant feature has width 1. Buffers ``offset`` and ``width`` are part of the state dict.

    Args:
        dim: the dimension of the data (samples are dimension 0) whose entries are the features, all others are pooled: 1 for the channels
            of images, −1 for the features of a sequence; None: every entry of a sample is a feature of its own.

    Raises:
        ValueError: for dimension 0, the samples.

    Example:
        >>> import torch
        >>> class Halved(Normalization):  # width 2, whatever the data
        ...     @staticmethod
        ...     def _of(found):
        ...         return torch.zeros_like(found.mean), torch.full_like(found.mean, 2.0)
        >>> Halved().fit(torch.tensor([[1.0], [5.0]])).transform(torch.tensor([[3.0]]))
        tensor([[1.5000]])
    """

    offset: Tensor
    width: Tensor

    def __init__(self, dim: int | None = None):
        super().__init__()
        if dim == 0:
            raise ValueError(
                f"{type(self).__name__}: dim must not be 0, the samples; use 1 for channels or None for single entries"
            )
        self.dim = dim
        self.register_buffer("offset", torch.empty(0))
        self.register_buffer("width", torch.empty(0))

    @staticmethod
    @abstractmethod
    def _of(found: Summary) -> tuple[Tensor, Tensor]:
        """(offset, width)."""

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        """Take offset and width from data.

        Args:
            data: samples, (N, …), or an iterable of batches: tensors, or (inputs, targets). It is read once; sums are taken in float64.

        Returns:
            Itself.

        Raises:
            ValueError: for data without samples, of varying shape, or with entries that are not finite.
        """
        name = type(self).__name__
        total: Summary | None = None
        dtype, device = torch.get_default_dtype(), torch.device("cpu")
        for index, batch in enumerate([data] if isinstance(data, Tensor) else data):
            x = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(x, Tensor) or x.is_complex() or x.ndim < 1:
                found = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name}.fit: batch {index} must hold a real tensor (N, …), got {found}")
            if len(x) == 0:
                continue
            if x.is_floating_point():
                dtype = x.dtype
            rows = self._rows(x.detach()).to(torch.float64) if x.device.type != "mps" else self._rows(x.detach().cpu()).double()
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(f"{name}.fit: batch {index} has entries that are not finite; remove or impute them first")
            part = Summary.of(rows)
            if total is not None and part.mean.shape != total.mean.shape:
                raise ValueError(
                    f"{name}.fit: batch {index} has features of shape {tuple(part.mean.shape)}, earlier ones {tuple(total.mean.shape)}"
                )
            total, device = part if total is None else total.joined(part), x.device
        if total is None:
            raise ValueError(f"{name}.fit: data holds no samples; an iterator that was used up yields nothing, give a list")
        offset, width = self._of(total)
        width = torch.where(total.high > total.low, width, torch.ones_like(width))
        self.offset, self.width = offset.to(device, dtype), width.to(device, dtype)
        return self

    def transform(self, x: Tensor) -> Tensor:
        """x̃ = (x − offset)/width, in the dtype of x (integers: of the buffers)."""
        offset, width = self._placed(x)
        return (x - offset) / width

    def inverse(self, x: Tensor) -> Tensor:
        """x = x̃·width + offset."""
        offset, width = self._placed(x)
        return x * width + offset

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)

    def fold(self, layer: nn.Module) -> nn.Module:
        r"""The layer that does on raw data what ``layer`` does on normalized data: W̃ = W diag(1/width), b̃ = b − W̃ offset.

        Args:
            layer: the first layer of a model, ``nn.Linear`` (also behind a flattening) or a convolution.

        Returns:
            A new layer, exact to rounding, the old one being left alone; for a zero-padded convolution one that pads each channel with its
            offset, which is what 0 was in normalized data.

        Raises:
            ValueError: where the layer cannot do it exactly.

        Example:
            >>> scaling = Standardize().fit(torch.tensor([[1.0], [3.0]]))
            >>> layer = scaling.fold(torch.nn.Linear(1, 1))
            >>> layer.weight.shape
            torch.Size([1, 1])
        """
        if (reason := folding.obstacle(layer)) is not None:
            raise ValueError(f"{type(self).__name__}.fold: {reason}")
        assert isinstance(layer, nn.Linear | _ConvNd)
        offset, width = self._of_layer(layer)
        return folding.after(layer, 1 / width, -offset / width)

    def map(self, layer: nn.Module | None = None) -> Standardizing:
        r"""P with p = P z: what z is on normalized data, p is on raw data; w = z_w/width, b = z_b − offsetᵀw.

        Gradient descent on normalized data from z₀ and preconditioned gradient descent with P on raw data from P z₀ are the same
        iteration (Ye, eqs. 4–5).

        Args:
            layer: whose (weight, bias) the map acts on, unless it is a plain linear layer with bias.

        Raises:
            ValueError: where the layer has no bias to take up the offset, or is padded with zeros, which are no zeros of normalized data.
        """
        name = type(self).__name__
        if layer is None:
            offset, width = self._features()
            return Standardizing(offset.flatten(), width.flatten())
        if (reason := folding.obstacle(layer)) is not None:
            raise ValueError(f"{name}.map: {reason}")
        assert isinstance(layer, nn.Linear | _ConvNd)
        offset, width = self._of_layer(layer)
        like = (layer.weight.detach(),) if layer.bias is None else (layer.weight.detach(), layer.bias.detach())
        layout, kernel = Layout(), 1
        if isinstance(layer, _ConvNd):
            layout, kernel = Layout(layer.groups, layer.transposed), layer.weight.shape[2:].numel()
            if bool(offset.any()) and (folding.zero_padded(layer) or isinstance(layer, _ConvTransposeNd)):
                raise ValueError(
                    f"{name}.map: the convolution pads with zeros, which are no zeros of normalized data, so no map of its parameters does the "
                    "same; fold() gives one that pads with the offsets"
                )
        if layer.bias is None and bool(offset.any()):
            raise ValueError(f"{name}.map: the layer has no bias to take up the offset; use a layer with bias")
        spread = lambda x: x.reshape(layout.groups, -1).repeat_interleave(kernel, -1)  # noqa: E731
        return Standardizing(spread(offset), spread(width), like, layout=layout)

    def extra_repr(self) -> str:
        features = "not fitted" if not self.width.numel() else f"features={tuple(self.width.shape)}"
        return features if self.dim is None else f"{features}, dim={self.dim}"

    def _rows(self, x: Tensor) -> Tensor:
        """(samples, *features)."""
        if self.dim is None:
            return x
        self._check_dim(x)
        return x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim])

    def _check_dim(self, x: Tensor) -> None:
        assert self.dim is not None
        if not -x.ndim < self.dim < x.ndim:
            raise ValueError(f"{type(self).__name__}: dim={self.dim} does not exist in data of shape {tuple(x.shape)}")

    def _features(self) -> tuple[Tensor, Tensor]:
        if not self.width.numel():
            raise RuntimeError(f"{type(self).__name__}: call fit(data) first, or load a state dict")
        return self.offset, self.width

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset, width = self._features()
        shape: tuple[int, ...] = tuple(width.shape)
        if self.dim is None:
            fits = tuple(x.shape[x.ndim - width.ndim :]) == shape
        else:
            self._check_dim(x)
            fits = x.shape[self.dim] == len(width)
            shape = tuple(len(width) if i == self.dim % x.ndim else 1 for i in range(x.ndim))
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: got data of shape {tuple(x.shape)}, fitted to features of shape {tuple(width.shape)}"
                + ("" if self.dim is None else f" in dimension {self.dim}")
            )
        dtype = x.dtype if x.is_floating_point() else width.dtype
        return offset.to(dtype).reshape(shape), width.to(dtype).reshape(shape)

    def _of_layer(self, layer: nn.Linear | _ConvNd) -> tuple[Tensor, Tensor]:
        """(offset, width) of each input feature or channel of a layer, in float64."""
        offset, width = (t.double().to(layer.weight.device) for t in self._features())
        if isinstance(layer, nn.Linear):
            n = layer.in_features
            per = n // width.numel() if self.dim == 1 and n % width.numel() == 0 else 1  # flattened behind the channels
            offset, width = (t.flatten().repeat_interleave(per) for t in (offset, width))
        else:
            n = layer.in_channels
            if width.ndim > 1:
                raise ValueError(
                    f"{type(self).__name__}: a convolution has one weight for all positions and cannot take up features of shape "
                    f"{tuple(width.shape)}; fit with dim=1, one feature per channel"
                )
        if len(width) != n:
            raise ValueError(
                f"{type(self).__name__}: the layer has {n} inputs, fitted to {width.numel()} features of shape {tuple(self.width.shape)}"
            )
        return offset, width

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ("offset", "width"):
            if prefix + name in state_dict and not getattr(self, name).numel():
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Standardize(Normalization):
    r"""x̃ = (x − μ)/σ, σ² the biased variance: all rows of the extended data matrix have norm √N (Ye, Theorem 4 and after).

    Args:
        dim: the dimension whose entries are the features; None: every entry of a sample.

    Example:
        >>> Standardize().fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).transform(torch.tensor([[3.0, 6.0]]))
        tensor([[1., 1.]])
    """

    @staticmethod
    def _of(found: Summary) -> tuple[Tensor, Tensor]:
        return found.mean, (found.square / found.count).sqrt()


class MinMax(Normalization):
    r"""x̃ = (x − min)/(max − min): every entry of the data it was fitted to lies in [0, 1].

    Args:
        dim: the dimension whose entries are the features; None: every entry of a sample.

    Example:
        >>> MinMax().fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).transform(torch.tensor([[3.0, 5.0]]))
        tensor([[1., 0.]])
    """

    @staticmethod
    def _of(found: Summary) -> tuple[Tensor, Tensor]:
        return found.low, found.high - found.low
