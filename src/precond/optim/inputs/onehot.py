"""Embeddings as layers of one-hot inputs, whose E[hhᵀ] is diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Layout
from precond.optim.inputs.moments import Moments, Request
from precond.optim.inputs.reading import Unreadable, called_with
from precond.optim.inputs.taps import Tap, Weight


class OneHot(Tap):
    r"""``nn.Embedding``: row i of the table is the weight of input i, which is 1 where token i stands and 0 elsewhere.

    E[hhᵀ] = diag(p), p the tokens' frequencies, so that BNP's M = 1/(p + damping) is all of a whitening: a step of a row is the mean
    gradient over its own occurrences, not their sum over all tokens. Frequencies far below the mean are damped (see
    :meth:`precond.BNP.damping_of`). It has no covariance to whiten by; a token ``padding_idx`` is no input.

    No optimizer does this unless it is told to, ``precond.register_layer(torch.nn.Embedding, tap=precond.optim.inputs.OneHot)``: RMS, which
    has embeddings otherwise, divides by frequencies too, by those of gradients.

    Args:
        module: an ``nn.Embedding``.

    Example:
        >>> import torch, precond
        >>> handle = precond.register_layer(torch.nn.Embedding, tap=precond.optim.inputs.OneHot)
        >>> model = torch.nn.Embedding(3, 2)
        >>> with precond.optim.inputs.observe(model, "moments") as observation:
        ...     _ = model(torch.tensor([0, 0, 0, 2]))
        ...     print(observation.collect()[model.weight].mean)  # frequencies of the tokens
        tensor([[0.7500, 0.0000, 0.2500]])
        >>> handle.remove()
    """

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight)]

    def answers(self, request: Request) -> bool:
        return request.kind == "moments"

    def layout(self, weight: Weight, request: Request) -> Layout:
        return Layout(transposed=True)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        index = next((x for x in called_with(self.module, args, kwargs).values() if isinstance(x, Tensor)), None)
        if index is None or index.is_floating_point() or index.layout != torch.strided or index.is_nested:
            raise Unreadable("was given no tensor of tokens")
        return index.reshape(-1) if index.numel() and index.device.type != "meta" else None

    def origin(self, seen: Tensor, weight: Weight) -> str:
        return "tokens"

    def rows(self, seen: Tensor, weight: Weight) -> Tensor:
        h = torch.nn.functional.one_hot(seen, len(weight.param)).to(weight.param.dtype)
        padding = self.module.padding_idx
        if padding is not None:
            h[:, padding] = 0
        return h[None]

    def moments(self, seen: Tensor, weight: Weight, request: Request, center: Tensor | None) -> Moments:
        wide = torch.float64 if weight.param.dtype == torch.float64 else torch.float32
        p = torch.zeros(len(weight.param), dtype=wide, device=seen.device)
        p.index_add_(0, seen, torch.ones_like(seen, dtype=wide))
        if self.module.padding_idx is not None:
            p[self.module.padding_idx] = 0
        p = (p / len(seen))[None]
        c = torch.zeros_like(p) if center is None else center
        count = torch.full((1,), float(len(seen)), dtype=p.dtype)
        deviation = p * (1 - c).abs() + (1 - p) * c.abs()
        return Moments(count, p, p * (1 - p), len(seen) * deviation, count[0])
