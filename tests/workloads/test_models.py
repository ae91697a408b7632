"""Models from one definition."""

import pytest
import torch
from torch import nn

from precond.lab.workloads import Architecture, BuiltIn, count_parameters, load_data

SHAPES = {"mlp": (13,), "linear": (13,), "logistic": (13,), "convnet": (1, 8, 8)}


@pytest.mark.parametrize("normalization", ["none", "batch", "layer", "group"])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_every_kind_with_every_normalization_trains(kind: str, normalization: str) -> None:
    model = Architecture(kind, (8, 8), normalization, dropout=0.1).build(SHAPES[kind], 3)  # type: ignore[arg-type]
    out = model(100 * torch.rand(6, *SHAPES[kind]))
    assert out.shape == (6, 3)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # A group of one feature would give the same output for every input.
    assert out.std(0).min() > 0


def test_batch_normalization_is_of_the_inputs_of_each_layer() -> None:
    model = Architecture("mlp", (5,), "batch").build((3,), 2)
    x = torch.rand(7, 3)
    first, last = model[1], model[2]
    norm = (x - x.mean(0)) / (x.var(0, correction=0) + first.normalization.eps).sqrt()
    h = torch.relu(norm @ first.linear.weight.T + first.linear.bias)
    norm = (h - h.mean(0)) / (h.var(0, correction=0) + last.normalization.eps).sqrt()
    torch.testing.assert_close(model(x), norm @ last.linear.weight.T + last.linear.bias)
    assert not any(isinstance(m, nn.ReLU) for m in last)


def test_sizes() -> None:
    assert count_parameters(Architecture("mlp", (64, 64)).build((1, 8, 8), 10)) == 64 * 64 + 64 + 64 * 64 + 64 + 640 + 10
    assert count_parameters(Architecture("linear").build((30,), 2)) == 62


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Architecture("mpl"), "did you mean 'mlp'"),  # type: ignore[arg-type]
        (lambda: Architecture(normalization="bach"), "did you mean 'batch'"),  # type: ignore[arg-type]
        (lambda: Architecture(dropout=1.0), "dropout must lie in"),
        (lambda: Architecture(widths=(0,)), "widths must be positive"),
        (lambda: Architecture("convnet").build((13,), 3), "needs images"),
        (lambda: Architecture("convnet", (4,) * 4).build((1, 8, 8), 3), "halves the image 4 times"),
        (lambda: BuiltIn(load_data("diabetes"), Architecture("logistic"), 32), "use model 'linear'"),
        (lambda: BuiltIn(load_data("wine"), Architecture(normalization="batch"), 1), "at least 2 examples"),
        (lambda: BuiltIn(load_data("wine"), Architecture(), 0), "batch size must be at least 1"),
    ],
)
def test_what_does_not_fit(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make()
