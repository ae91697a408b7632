"""skorch: nets with an optimizer class, closures, callbacks, checkpoints, scikit-learn around them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import precond
from integrations.table import RECIPES, batches, check_same, check_state, loop, net

skorch = pytest.importorskip("skorch", reason="skorch is not installed: make integrations")

from precond.integrations.skorch import WithModel  # noqa: E402

each = pytest.mark.parametrize("recipe", RECIPES)
OPTIONS = {
    "adamw": {"optimizer": precond.AdamW},
    "auto": {"optimizer": precond.optim.Auto},
    "muon": {"optimizer": precond.optim.Muon},
    "soap": {"optimizer": precond.optim.SOAP},
    "whitening": {"optimizer": precond.optim.Whitening},
    "adam(inputs=BNP())": {"optimizer": precond.Adam, "optimizer__inputs": precond.BNP()},
    "SAM in z": {"optimizer": precond.AdamW, "optimizer__regularizers": [precond.SAM(0.05)]},
}


class Classifier(WithModel, skorch.NeuralNetClassifier):
    pass


class Net(nn.Sequential):
    """The net of the table, for a scikit-learn estimator to make."""

    def __init__(self):
        super().__init__(*net(torch.float32))


def arrays():
    data = batches(8, torch.float32)
    return np.concatenate([x.numpy() for x, _ in data]), np.concatenate([y.numpy() for _, y in data])


def estimator(recipe, cls=Classifier, **more):
    options = {"criterion": nn.CrossEntropyLoss, "max_epochs": 1, "batch_size": 8, "train_split": None, "verbose": 0}
    return cls(Net, lr=0.01, **{**options, **OPTIONS[recipe], **more})


def plain(recipe, epochs=1, **options):
    model = net(torch.float32)
    optimizer = RECIPES[recipe](model)
    for _ in range(epochs):
        loop(model, optimizer, batches(8, torch.float32), **options)
    return model, optimizer


@each
def test_a_classifier(recipe):
    """skorch steps by closures: second gradients need nothing more."""
    found = estimator(recipe).fit(*arrays())
    model, optimizer = plain(recipe)
    check_same(found.module_, model)
    check_state(found.optimizer_, optimizer)
    assert type(found.optimizer_) is OPTIONS[recipe]["optimizer"]


@each
def test_parameters_alone(recipe):
    """skorch's own net passes parameters: enough for all that observe no layer."""
    own = estimator(recipe, skorch.NeuralNetClassifier)
    if RECIPES[recipe](Net()).observes:
        with pytest.raises(TypeError) as caught:
            own.fit(*arrays())
        assert "pass the model itself" in str(caught.value)[:80]
    elif recipe != "SAM in z":  # whose running statistics move twice then, which a warning says
        check_same(own.fit(*arrays()).module_, plain(recipe)[0])


@each
def test_schedules_and_clipping(recipe):
    """Clipping acts within the closure: with SAM on both gradients, of which only the length of the second one matters to the step."""
    clip = skorch.callbacks.GradientNormClipping(0.3)
    schedule = skorch.callbacks.LRScheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5, step_every="batch")
    found = estimator(recipe, callbacks=[clip, schedule]).fit(*arrays())
    model = net(torch.float32)
    optimizer = RECIPES[recipe](model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    loop(model, optimizer, batches(8, torch.float32), clip=0.3, scheduler=scheduler)
    assert found.optimizer_.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.01 / 2**8
    if recipe == "SAM in z":
        assert all(p.isfinite().all() for p in found.module_.parameters())
    else:
        check_same(found.module_, model)


@each
def test_resuming(recipe, tmp_path):
    whole = estimator(recipe, max_epochs=2).fit(*arrays())
    first = estimator(recipe).fit(*arrays())
    names = {"f_params": tmp_path / "p.pt", "f_optimizer": tmp_path / "o.pt", "f_history": tmp_path / "h.json"}
    first.save_params(**names)
    second = estimator(recipe).initialize()
    second.load_params(**names)
    second.partial_fit(*arrays())
    check_same(second.module_, whole.module_)
    check_state(second.optimizer_, whole.optimizer_)


@each
def test_scikit_learn_around_it(recipe):
    """Clones, pickles, and a grid over the optimizer's own options."""
    sklearn = pytest.importorskip("sklearn.model_selection")
    search = sklearn.GridSearchCV(estimator(recipe), {"lr": [0.01, 0.03], "optimizer__weight_decay": [0.0]}, cv=2, refit=True)
    search.fit(*arrays())
    assert search.best_estimator_.optimizer_.param_groups[0]["weight_decay"] == 0.0
    fitted = estimator(recipe).fit(*arrays())
    copied = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(copied.predict(arrays()[0]), fitted.predict(arrays()[0]))
    fitted.set_params(lr=0.5)
    assert fitted.optimizer_.param_groups[0]["lr"] == 0.5


def test_groups_by_pattern_keep_the_model():
    groups = [("0.*", {"lr": 0.5})]
    found = estimator("auto", optimizer__param_groups=groups).initialize()
    assert [g["lr"] for g in found.optimizer_.param_groups] == [0.5, 0.01] and found.optimizer_.observes
