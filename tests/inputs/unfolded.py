"""What the rows of a layer's weight see, unfolded by loops, and the dense P of batch normalization preconditioning made of it.

No line of the library's own unfolding is used here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Rows:
    """Output rows that see the same inputs.

    Attributes:
        weight: the weight, and ``index`` (rows, n): which of its entries, flat, each row consists of.
        bias: the bias, and ``bias_index`` (rows,), or None.
        samples: the inputs h, one a line, (N, n): the layer's output is samples @ rowᵀ + bias.
        channels: the inputs per channel alone, (M, n/repeat), for statistics per channel; or None where it has no channels.
    """

    weight: Tensor
    index: Tensor
    bias: Tensor | None
    bias_index: Tensor | None
    samples: Tensor
    channels: Tensor | None = None

    def statistics(self, conv: str, centered: bool) -> tuple[Tensor, Tensor]:
        """μ and σ² of each entry of a row; 0 and E[h²] where there is nothing to center with, or one sample; 0 and 1 without any."""
        h = self.samples if conv == "patch" or self.channels is None else self.channels
        if not len(h):
            return h.new_zeros(h.shape[1]), h.new_ones(h.shape[1])
        mean, variance = h.double().mean(0), h.double().var(0, correction=0)
        if not centered or len(h) == 1:
            mean, variance = torch.zeros_like(mean), variance + mean**2
        repeat = self.index.shape[1] // h.shape[1]
        return mean.repeat_interleave(repeat), variance.repeat_interleave(repeat)


def dense(params: Sequence[Tensor], rows: Sequence[Rows], conv: str = "channel") -> Tensor:
    """P over all entries of ``params`` in order: U·diag(1, 1/σ) for each output row, the identity elsewhere."""
    place, n = {}, 0
    for p in params:
        place[p], n = n, n + p.numel()
    P = torch.eye(n, dtype=torch.float64)
    for part in rows:
        if not part.weight.requires_grad:
            continue
        centered = part.bias is not None and part.bias.requires_grad
        mean, variance = part.statistics(conv, centered)
        std = variance.sqrt()
        for r, entries in enumerate(part.index):
            w = place[part.weight] + entries
            P[w, w] = 1 / std
            if centered:
                P[place[part.bias] + part.bias_index[r], w] = -mean / std
    return P


def linear(m: nn.Linear, x: Tensor) -> list[Rows]:
    index = torch.arange(m.weight.numel()).reshape(m.weight.shape)
    return [Rows(m.weight, index, m.bias, torch.arange(m.out_features), x.reshape(-1, m.in_features))]


def convolution(m: nn.Module, x: Tensor, sizes: Sequence[int]) -> list[Rows]:
    """Of a convolution or transposed convolution with output positions ``sizes``, group by group."""
    x = x if x.ndim == m.weight.ndim else x[None]
    kernel, groups = m.weight.shape[2:], m.groups
    entries = torch.arange(m.weight.numel()).reshape(m.weight.shape)
    ins, outs = m.in_channels // groups, m.out_channels // groups
    out = []
    for g in range(groups):
        mine = x[:, g * ins : (g + 1) * ins]
        lines = []
        for position in itertools.product(*map(range, sizes)):
            taps = []
            for offset in itertools.product(*map(range, kernel)):
                at = [_source(m, d, t, k, x.shape[2 + d]) for d, (t, k) in enumerate(zip(position, offset, strict=True))]
                taps.append(
                    torch.zeros_like(mine[(..., *[0] * len(at))]) if None in at else mine[(slice(None), slice(None), *at)]
                )
            lines.append(torch.stack(taps, -1).flatten(1))
        if m.transposed:
            index = entries[g * ins : (g + 1) * ins].transpose(0, 1).reshape(outs, -1)
        else:
            index = entries[g * outs : (g + 1) * outs].reshape(outs, -1)
        channels = mine.transpose(0, 1).flatten(1).T
        out.append(Rows(m.weight, index, m.bias, torch.arange(g * outs, (g + 1) * outs), torch.cat(lines), channels))
    return out


def _source(m: nn.Module, d: int, t: int, k: int, size: int) -> int | None:
    """Which entry of the input, along dimension d, output position t sees through kernel position k; None: a zero."""
    stride, dilation = m.stride[d], m.dilation[d]
    if m.transposed:
        s, rest = divmod(t + m.padding[d] - k * dilation, stride)
        return s if rest == 0 and 0 <= s < size else None
    if isinstance(m.padding, str):
        before = dilation * (m.kernel_size[d] - 1) // 2 if m.padding == "same" else 0
    else:
        before = m.padding[d]
    s = t * stride + k * dilation - before
    if 0 <= s < size:
        return s
    match m.padding_mode:
        case "zeros":
            return None
        case "replicate":
            return min(max(s, 0), size - 1)
        case "circular":
            return s % size
        case "reflect":
            return -s if s < 0 else 2 * (size - 1) - s
    raise AssertionError(m.padding_mode)


def attention(m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> list[Rows]:
    """Of the three projections, and of ``out_proj``, which sees ``attended``."""
    size = m.embed_dim
    packed = m.in_proj_weight is not None
    weights = [m.in_proj_weight] * 3 if packed else [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
    out = []
    for i, (weight, x) in enumerate(zip(weights, (q, k, v), strict=True)):
        entries = torch.arange(weight.numel()).reshape(weight.shape)
        index = entries[i * size : (i + 1) * size] if packed else entries
        rows = torch.arange(i * size, (i + 1) * size)
        out.append(Rows(weight, index, m.in_proj_bias, rows, x.reshape(-1, x.shape[-1])))
    return [*out, *linear(m.out_proj, attended)]
