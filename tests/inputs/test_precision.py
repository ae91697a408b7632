"""In what precision inputs are reduced: half precision, autocast, and means far from zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inputs.layers import data
from precond import BNP, PreconditionedGD

torch.set_num_threads(1)


def moments_of(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    optimizer = PreconditionedGD(layer, lr=0.0, preconditioner=BNP())
    layer(x).float().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["mean"].dtype == torch.float32
    return state["mean"][0], state["variance"][0]


LAYERS = {"linear": (lambda: nn.Linear(3, 2), 1), "channel": (lambda: nn.Conv1d(3, 2, 1), 5)}


@pytest.mark.parametrize(("layer", "positions"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("dtype", "mean", "std", "tolerance"),
    [
        (torch.float32, 1e4, 1.0, 1e-3),  # one pass about zero gives 120 in place of 1
        (torch.float16, 300.0, 20.0, 1e-2),  # 300² overflows
        (torch.bfloat16, 300.0, 20.0, 1e-2),
    ],
    ids=str,
)
def test_moments_of_narrow_and_far_inputs(layer, positions, dtype, mean, std, tolerance):
    x = torch.randn(4000 // positions, 3, positions, generator=torch.Generator().manual_seed(0)) * std + mean
    x = x.to(dtype)
    exact = x.double().transpose(0, 1).flatten(1)
    module = layer().to(dtype)
    mu, variance = moments_of(x[..., 0] if positions == 1 else x, module)
    torch.testing.assert_close(mu.double(), exact.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(1, correction=0), rtol=tolerance, atol=0)


def test_accumulated_moments_of_far_inputs():
    """Pooling batches whose mean is 1e4 times their deviation must not cancel."""
    layer = nn.Linear(2, 1)
    optimizer = PreconditionedGD(layer, lr=0.0, preconditioner=BNP())
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    for part in x.split(100):
        layer(part).sum().backward()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[layer.weight]["variance"][0].double(), x.double().var(0, correction=0), rtol=1e-3, atol=0
    )


class Mixed(nn.Module):
    """Inputs that arrive in half precision under autocast, also at the attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.conv = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        h, _ = self.attention(h, h, h, attn_mask=mask, need_weights=False)
        return self.conv(h.movedim(0, 2))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("conv", ["channel", "patch"])
def test_autocast_inputs_are_reduced_in_float32(conv, mask):
    x = data(6, 2, 4).float()
    if mask is not None:
        causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
        mask = causal if mask == "bool" else torch.zeros(6, 6).masked_fill(causal, -torch.inf)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(conv=conv))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(x, mask).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append({name: optimizer.state[p] for name, p in model.named_parameters() if "mean" in optimizer.state[p]})
    assert set(found[0]) == {"stem.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}
    for name, wide in found[0].items():
        narrow = found[1][name]
        assert narrow["mean"].dtype == torch.float32
        assert torch.equal(narrow["count"], wide["count"])
        scale = wide["variance"].max().sqrt().item()
        torch.testing.assert_close(narrow["mean"], wide["mean"], rtol=2e-2, atol=2e-2 * scale)
        torch.testing.assert_close(narrow["variance"], wide["variance"], rtol=4e-2, atol=4e-2 * scale**2)
    # The stem sees float32 inputs in both runs.
    assert torch.equal(found[0]["stem.weight"]["variance"], found[1]["stem.weight"]["variance"])
