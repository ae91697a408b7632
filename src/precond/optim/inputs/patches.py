"""Moments of patches of images of which only those of one row of the kernel are made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from precond.optim.inputs.moments import Moments

Pair = tuple[int, int]


def of_patches(
    x: Tensor, kernel: Pair, stride: Pair, dilation: Pair, groups: int, center: Tensor | None, examples: int
) -> Moments:
    r"""Mean, full covariance and deviation of the patches of images, as of :func:`precond.optim.inputs.moments.covariance` of rows of them.

    An entry of a patch is one of a row a of the kernel. The products of the entries of two rows of the kernel, summed over all places, are
    Σ yₛyₛ₊ₖᵀ over lines s of the image, y being what a row of the kernel meets in a line. Two rows as far apart, k lines, have the same sum
    but for lines at the edges: for a kernel of h rows h products of matrices do in place of h², of h times fewer numbers than patches have.

    Args:
        x: (B, channels, H, W), padded.
        kernel, stride, dilation: along H and W.
        center: c (groups, n) of Σ|h − c|; None: 0.
        examples: how many the patches come from.
    """
    (rows, columns), (down, across), (high, wide) = kernel, stride, dilation
    images, channels, H, W = x.shape
    n, c = channels // groups * rows * columns, channels // groups
    tall, long = (H - high * (rows - 1) - 1) // down + 1, (W - wide * (columns - 1) - 1) // across + 1
    line = images * long
    N = tall * line
    # About the mean of each channel: products about zero cancel where |μ| ≫ σ.
    shift = x.mean((0, 2, 3))
    seen = (x - shift[:, None, None]).view(images, groups, c, H, W).unfold(4, wide * (columns - 1) + 1, across)[..., ::wide]
    seen = seen.permute(1, 2, 5, 3, 0, 4)  # (groups, channels, columns, H, images, places in a line)
    lines = [seen[:, :, :, k::down].reshape(groups, c * columns, -1, line) for k in range(min(down, H))]
    places = [(a * high % down, a * high // down) for a in range(rows)]

    def of_rows(per_line: Sequence[Tensor]) -> Tensor:
        """(groups, n): sums over the lines that each row of the kernel meets."""
        each = [per_line[k][:, :, s : s + tall].sum(2).view(groups, c, 1, columns) for k, s in places]
        return torch.cat(each, 2).view(groups, n)

    mean = of_rows([y.sum(3) for y in lines]).div_(N)
    whole = shift.view(groups, c, 1).expand(groups, c, rows * columns).reshape(groups, n)
    if center is None:
        about_zero = shift.view(groups, c, 1).expand(groups, c, columns).reshape(groups, -1, 1, 1)
        absolute = of_rows([(y + about_zero).abs_().sum(3) for y in lines])
    else:
        about = (center - whole).view(groups, c, rows, columns).unbind(2)
        met = [lines[k].flatten(2)[:, :, s * line : (s + tall) * line] for k, s in places]
        far = [(y - m.reshape(groups, -1, 1)).abs_().sum(2) for y, m in zip(met, about, strict=True)]
        absolute = torch.stack([d.view(groups, c, columns) for d in far], 2).view(groups, n)
    order = torch.arange(n, device=x.device).view(rows, c, columns).transpose(0, 1).reshape(-1)
    square = _products([y.flatten(2) for y in lines], places, tall, line).index_select(2, order).index_select(1, order)
    spread = square.baddbmm_(mean[:, :, None], mean[:, None, :], beta=1 / N, alpha=-1)
    counted = lambda *shape: torch.full(shape, float(N), dtype=x.dtype)  # noqa: E731
    return Moments(counted(groups), whole + mean, spread, absolute, counted().fill_(examples))


def _products(lines: Sequence[Tensor], places: Sequence[Pair], tall: int, line: int) -> Tensor:
    """(groups, n, n): Σ yyᵀ of what all rows of the kernel meet, one after the other, over all places."""
    groups, f, n = lines[0].shape[0], lines[0].shape[1], lines[0].shape[1] * len(places)
    out = lines[0].new_empty(groups, n, n)
    alike: dict[tuple[int, int, int], list[Pair]] = defaultdict(list)
    for a, (k, s) in enumerate(places):
        for b, (l, t) in enumerate(places[a:], a):
            alike[k, l, t - s].append((a, b))
    for (k, l, away), pairs in alike.items():
        starts = [places[a][1] for a, _ in pairs]
        last, end = starts[-1], starts[0] + tall

        def add(to: Tensor, start: int, stop: int, beta: int, k: int = k, l: int = l, away: int = away) -> Tensor:
            if start == stop and beta:
                return to
            X, Y = lines[k][:, :, start * line : stop * line], lines[l][:, :, (start + away) * line : (stop + away) * line]
            return to.baddbmm_(X, Y.mT, beta=beta)

        shared = len(pairs) > 1 and last < end
        common = add(lines[0].new_empty(groups, f, f), last, end, 0) if shared else None
        for (a, b), s in zip(pairs, starts, strict=True):
            to = out[:, a * f : (a + 1) * f, b * f : (b + 1) * f]
            if common is None:
                add(to, s, s + tall, 0)
            else:
                add(add(to.copy_(common), s, last, 1), end, s + tall, 1)
            if a != b:
                out[:, b * f : (b + 1) * f, a * f : (a + 1) * f].copy_(to.mT)
    return out
