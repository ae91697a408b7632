"""Transformers see what they may see, and an autoencoder goes through its code."""

import pytest
import torch
from torch import nn

from precond.lab.workloads.networks import Attention, CharacterTransformer, VisionTransformer, autoencoder


def test_characters_are_predicted_from_those_before_alone() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer(characters=11, context=9, width=8, layers=2, heads=2).double()
    text = torch.randint(11, (3, 9))
    logits = model(text)
    assert logits.shape == (3, 11, 9)
    for place in range(9):
        other = text.clone()
        other[:, place] = (other[:, place] + 1) % 11
        changed = (model(other) - logits).abs().amax((0, 1)) > 1e-9
        assert changed.tolist() == [i >= place for i in range(9)]


def test_attention_against_a_dense_computation() -> None:
    torch.manual_seed(0)
    layer = Attention(width=6, heads=2, causal=True).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    q, k, v = (f(x)[0] for f in (layer.query, layer.key, layer.value))
    rows = []
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[:, head] @ k[:, head].T / 3**0.5
        scores[torch.ones(4, 4).triu(1).bool()] = -torch.inf
        rows.append(scores.softmax(-1) @ v[:, head])
    assert torch.allclose(layer(x)[0], layer.out(torch.cat(rows, -1)), atol=1e-12)


def test_patches_are_squares_of_the_image() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(classes=3, side=6, patch=2, width=8, layers=1, heads=2)
    seen: list[torch.Tensor] = []
    model.patches.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert model(image).shape == (1, 3)
    assert seen[0].shape == (1, 9, 4)
    assert seen[0][0, 0].tolist() == [0, 1, 6, 7]
    assert seen[0][0, 4].tolist() == [14, 15, 20, 21]


def test_autoencoder() -> None:
    model = autoencoder((6, 5, 2, 4, 6))
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]
    assert model(torch.rand(3, 6)).shape == (3, 6)
    assert sum(p.numel() for p in autoencoder().parameters()) == sum(
        a * b + b for a, b in ((784, 500), (500, 250), (250, 30), (30, 250), (250, 500), (500, 784))
    )


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 6 and 4"):
        Attention(6, 4, causal=False)
    with pytest.raises(ValueError, match="side must be a multiple of patch, got 28 and 5"):
        VisionTransformer(10, patch=5)
