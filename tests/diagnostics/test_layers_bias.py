"""A bias in front of a normalization that takes it out again is no remedy."""

import torch
from torch import nn

import precond


def advised(model: nn.Module, x: torch.Tensor) -> list[str]:
    found = precond.diagnose(precond.Objective(model, nn.functional.cross_entropy, [(x, torch.arange(len(x)) % 3)]))
    return [advice.why for advice in found.advice if "bias" in advice.what]


def test_a_bias_is_advised_unless_a_batch_normalization_follows():
    torch.manual_seed(0)
    x = torch.randn(64, 4, 6, 6) + 3

    def net(*between: nn.Module) -> nn.Module:
        layers = [nn.Conv2d(4, 8, 3, bias=False), *between, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)]
        return nn.Sequential(*layers)

    assert any("'0'" in why for why in advised(net(), x))
    assert any("'0'" in why for why in advised(net(nn.GroupNorm(1, 8)), x))  # which takes one mean of all channels
    for norm in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8)):
        assert not advised(net(norm), x)
    assert any("'0'" in why for why in advised(net(nn.ReLU(), nn.BatchNorm2d(8)), x))
