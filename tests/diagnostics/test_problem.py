"""Models as they come: the same gradient and the same layers as of the objective that is written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.analysis.diagnostics.problem import as_objective
from precond.analysis.diagnostics.short import short_training


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


class LossInside(Plain):
    """The calling convention of Hugging Face: keywords in, an object with a loss out."""

    def forward(self, features, labels=None):
        logits = super().forward(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Dictionary(LossInside):
    def forward(self, features, labels=None):
        return vars(super().forward(features, labels))


class Stepping(Plain):
    """As a LightningModule."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": nn.functional.cross_entropy(self(x), y)}


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [(torch.randn(20, 4) * 3 + 1, torch.randint(0, 3, (20,))) for _ in range(3)]


def weights_of(model):
    torch.manual_seed(0)
    plain = Plain()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("kind", [LossInside, Dictionary, Stepping, Plain])
def test_the_loss_and_the_layers_are_those_of_the_objective(kind, data):
    expected = Objective(weights_of(Plain()), nn.functional.cross_entropy, data)
    model = weights_of(kind())
    named = [{"features": x, "labels": y} for x, y in data]
    given = data if kind in (Stepping, Plain) else named
    loss_fn = nn.functional.cross_entropy if kind is Plain else None
    found = as_objective(model, given, loss_fn)
    assert found.value() == pytest.approx(expected.value())
    for g, h in zip(found.gradient(), expected.gradient(), strict=True):
        torch.testing.assert_close(g, h)
    layers = diagnose(model, data=given, loss_fn=loss_fn).layers
    assert [(x.name, x.spectra.kappa("raw")) for x in layers] == [
        (x.name, x.spectra.kappa("raw")) for x in diagnose(expected).layers
    ]
    curves = [short_training(o, lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr), 0.1, 6) for o in (found, expected)]
    torch.testing.assert_close(curves[0].losses, curves[1].losses)


def test_a_loss_of_outputs_and_a_dict(data):
    class Named(Plain):
        def forward(self, x, y):
            return super().forward(x)

    model = weights_of(Named())
    batches = [{"x": x, "y": y} for x, y in data]
    found = as_objective(model, batches, lambda out, batch: nn.functional.cross_entropy(out, batch["y"]))
    assert found.value() == pytest.approx(Objective(model.body, nn.functional.cross_entropy, data).value())


def test_so_many_examples_are_taken(data):
    assert len(as_objective(Plain(), data, nn.functional.cross_entropy, examples=21).batches) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda d: (Plain(), None), TypeError, "a model needs data="),
        (lambda d: ("model", d), TypeError, r"needs an Objective or an nn\.Module with data=, got str"),
        (lambda d: (Objective(Plain(), nn.functional.cross_entropy, d), d), TypeError, "leave data= and loss_fn= out"),
        (lambda d: (Plain(), []), ValueError, "yields no batches"),
        (lambda d: (Plain(), 3), TypeError, "data must be a loader or a list of batches, got 3"),
        (lambda d: (Plain(), "rows.csv"), TypeError, r"data must be a loader or a list of batches, got 'rows\.csv'"),
        (lambda d: (Plain(), d, "mse"), TypeError, r"loss_fn must be a function of \(outputs, targets\), got 'mse'"),
        (lambda d: (Plain(), d), TypeError, "Plain does not take a batch of data, 2 parts, to return its loss .*give loss_fn="),
        (lambda d: (Plain(), [{"x": d[0][0], "mask": 1}]), TypeError, "does not take a batch of data, a dict of 'x', 'mask'"),
    ],
)
def test_what_is_missing_is_named(arguments, error, message, data):
    with pytest.raises(error, match=message):
        as_objective(*arguments(data))


def test_a_loss_that_is_no_number_is_named(data):
    class Each(Plain):
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    with pytest.raises(ValueError, match="the model's loss must be one number, got"):
        diagnose(Each(), data=data)


def test_what_is_no_optimizer_is_named(data):
    objective = Objective(Plain(), nn.functional.cross_entropy, data)
    with pytest.raises(TypeError, match=r"optimizer must be an optimizer of the model, or None, got 0\.1"):
        diagnose(objective, 0.1)


def test_a_loss_that_is_not_found_is_named(data):
    with pytest.raises(ValueError, match="put labels into the batches"):
        diagnose(LossInside(), data=[{"features": x} for x, _ in data])
