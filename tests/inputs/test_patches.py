"""Moments of patches that are not all made equal those of all patches, gathered one entry of the kernel at a time in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import precond
from precond.optim.inputs.patches import of_patches


def patches(x: Tensor, kernel, stride, dilation, groups: int) -> Tensor:
    """(groups, N, n) of padded images x (B, channels, H, W), by slices."""
    places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    entries = []
    for offsets in itertools.product(*map(range, kernel)):
        cut = [slice(o * d, o * d + s * (m - 1) + 1, s) for o, d, s, m in zip(offsets, dilation, stride, places, strict=True)]
        entries.append(x[(slice(None), slice(None), *cut)])
    met = torch.stack(entries, 2)  # (B, channels, entries, …)
    met = met.reshape(len(x), groups, -1, met[0, 0, 0].numel())
    return met.permute(1, 0, 3, 2).flatten(1, 2).double()


def agree(found, rows: Tensor, center: Tensor | None, examples: int) -> None:
    N = rows.shape[1]
    assert found.count.tolist() == [N] * len(rows) and found.examples.item() == examples
    mean = rows.mean(1)
    d = rows - mean[:, None]
    far = (rows if center is None else rows - center.double()[:, None]).abs().sum(1)
    # Sums of N terms in float32, each 6e-8 of the largest off; of blocks of them, so that errors do not add up.
    for mine, truth in ((found.mean, mean), (found.spread, d.mT @ d / N), (found.absolute, far)):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


SHAPES = [
    ((4, 3, 9, 8), (3, 3), (1, 1), (1, 1), 1),
    ((2, 4, 11, 12), (5, 4), (2, 3), (2, 1), 2),
    ((3, 4, 3, 7), (3, 3), (1, 1), (1, 1), 2),  # one line of places: none is shared
    ((3, 4, 8, 7), (5, 3), (4, 1), (1, 1), 1),  # steps longer than half the kernel
    ((2, 6, 8, 9), (2, 3), (3, 2), (1, 2), 6),  # lines that no row of the kernel meets
    ((5, 2, 10, 1), (4, 1), (1, 1), (2, 1), 1),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "dilation", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_patches(shape, kernel, stride, dilation, groups, centered):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).relu_() * 3 + 100.0  # a mean far from 0
    rows = patches(x, kernel, stride, dilation, groups)
    center = rows.mean(1).float() + torch.randn(rows.shape[::2], generator=generator) if centered else None
    agree(of_patches(x, kernel, stride, dilation, groups, center, len(x)), rows, center, len(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, (3, 5), padding=(2, 1), padding_mode="circular", groups=2, stride=(2, 1)),
        nn.Conv2d(8, 4, 4, padding="same", padding_mode="reflect"),
        nn.Conv1d(8, 4, 5, padding=3, dilation=2),
    ],
    ids=str,
)
def test_layers(layer):
    one = isinstance(layer, nn.Conv1d)
    x = torch.randn((16, 8, 400) if one else (16, 8, 20, 22), generator=torch.Generator().manual_seed(0))
    with precond.optim.inputs.observe(layer) as observation:
        layer(x).sum().backward()
        found = observation.collect()[layer.weight].moments
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    rows = patches(padded, layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    agree(found, rows, None, len(x))
