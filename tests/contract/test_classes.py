"""The recipes as classes, and wrappers that imitate an optimizer's class."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import precond
from contract.table import batches, flat, net, train
from precond import SAM, optim

CLASSES = {name.lower(): getattr(optim, name) for name in optim.__all__ if name != "Recipe"}
each = pytest.mark.parametrize("name", precond.RECIPES)


def test_every_recipe_has_a_class_and_no_name_is_taken_twice():
    assert CLASSES.keys() == precond.RECIPES.keys()
    for cls in CLASSES.values():
        top = getattr(precond, cls.__name__, cls)
        assert top is cls or issubclass(top, precond.Preconditioner)


@each
def test_a_class_is_its_recipe(name):
    """The same steps, options, state and signature."""
    cls, recipe = CLASSES[name], precond.RECIPES[name]
    assert issubclass(cls, precond.PreconditionedGD) and issubclass(cls, torch.optim.Optimizer)
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (cls, recipe))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]
    ends = []
    for make in (cls, recipe):
        model = net()
        optimizer = make(model, 0.01, regularizers=[SAM(0.02)])
        train(model, optimizer, batches(4))
        ends.append((flat(model), optimizer.state_dict()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1]["param_groups"] == ends[1][1]["param_groups"]
    loaded = cls(net(), 0.5, regularizers=[SAM(0.02)])
    loaded.load_state_dict(ends[1][1])
    assert loaded.param_groups[0]["lr"] == 0.01


@each
def test_classes_and_their_optimizers_are_pickled_and_copied(name):
    cls = CLASSES[name]
    assert pickle.loads(pickle.dumps(cls)) is cls
    model = net()
    optimizer = cls(model, lr=0.01)
    train(model, optimizer, batches(2))
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(twin) is cls and twin.param_groups[0]["lr"] == 0.01


def test_classes_are_inherited_from():
    class Mine(optim.AdamW):
        def __init__(self, params):
            super().__init__(params, lr=0.5, betas=(0.5, 0.5))

    class Other(optim.Recipe, recipe=precond.adamw):
        pass

    class Mixin:
        pass

    class Mixed(Mixin, optim.AdamW):
        pass

    assert Mixed(net()).probes is False
    assert Mine(net()).param_groups[0]["betas"] == (0.5, 0.5) and type(Other(net())) is Other
    with pytest.raises(TypeError, match="recipe=precond"):
        optim.Recipe(net())


def test_bad_arguments_are_those_of_the_recipe():
    with pytest.raises(ValueError, match=r"adamw: .*betas"):
        precond.AdamW(net(), betas=(2.0, 0.9))
    with pytest.raises(TypeError, match="made_up"):
        precond.AdamW(net(), made_up=1)
    for params in (net().parameters(), list(net().named_parameters()), [{"params": list(net().parameters())}]):
        with pytest.raises(TypeError) as caught:
            optim.Auto(params)
        assert "pass the model itself" in str(caught.value)[:80]


class Wrapper:
    """As Lightning's and Fabric's: reads attributes through to the optimizer, and takes on a class made of both."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("make", [precond.adamw, precond.AdamW])
def test_an_imitation_acts_on_the_optimizer_inside(make):
    ends = []
    for wrap in (lambda o: o, Wrapper):
        model = net()
        optimizer = wrap(make(model, lr=0.01, regularizers=[SAM(0.02)]))
        assert isinstance(optimizer, precond.PreconditionedGD)
        for t, (x, y) in enumerate(batches(3)):
            torch.manual_seed(t)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            while optimizer.probe():
                assert optimizer.probing
                torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.map()
        optimizer.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(2)))]})
        assert len(optimizer.explain().rows) == len(list(model.parameters())) + 1
        ends.append(flat(model))
        if wrap is Wrapper:
            assert optimizer.__dict__.keys() == {"_optimizer"}
        optimizer.close()
    assert torch.equal(*ends)
