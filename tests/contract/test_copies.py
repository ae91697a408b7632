"""Copies and saved files: each is an optimizer of its own that goes on as the one it comes from."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import precond
from contract.table import EVERY, TWINS, Twin, batches, closure, flat, net, train
from precond import L2, RMS, AdaGrad, GradientNorm, LossClosure, PreconditionedGD, Route, is_decayed, is_matrix

each = pytest.mark.parametrize("name", EVERY)


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": through_a_file}


@each
def test_copies_go_on_by_themselves(name):
    model = net()
    optimizer = EVERY[name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, batches(3), lambda t: scheduler.step())
    before, ends, rates = flat(model), {}, set()
    for how, copied in HOW.items():
        model2, optimizer2, scheduler2 = copied((model, optimizer, scheduler))
        if optimizer2.observes:
            closure(model2, optimizer2, batches(1)[0])()
            with pytest.raises(RuntimeError, match="call watch"):
                optimizer2.step() if not optimizer2._probing else optimizer2.probe()
            model2.load_state_dict(model.state_dict())
        if optimizer2.observes or optimizer2._probing:
            optimizer2.watch(model2)
        train(model2, optimizer2, batches(3, seed=2), lambda t, scheduler=scheduler2: scheduler.step())
        assert torch.equal(flat(model), before), how
        ends[how] = flat(model2)
        rates.add(optimizer2.param_groups[0]["lr"])
    train(model, optimizer, batches(3, seed=2), lambda t: scheduler.step())
    assert not torch.equal(flat(model), before)
    assert {how: torch.equal(flat(model), end) for how, end in ends.items()} == dict.fromkeys(HOW, True)
    assert rates == {optimizer.param_groups[0]["lr"]}


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(4, 3), nn.Linear(3, 2)


@pytest.mark.parametrize("how", HOW)
def test_a_copy_knows_the_kinds_of_its_parameters(how):
    model = Table()
    P = Route([(is_matrix, AdaGrad())], otherwise=RMS())
    optimizer = PreconditionedGD(model, preconditioner=P, regularizers=[L2(0.1, where=is_decayed)])
    model2, optimizer2 = HOW[how]((model, optimizer))
    assert str(optimizer2.explain()) == str(optimizer.explain())
    _, optimizer3 = HOW[how]((model2, optimizer2))
    assert str(optimizer3.explain()) == str(optimizer.explain())


def test_watch_refuses_another_model():
    optimizer = copy.deepcopy(precond.adamw(net()))
    with pytest.raises(ValueError, match="copy model and optimizer together"):
        optimizer.watch(net())


@each
def test_groups_and_state_are_plain(name):
    """What torch.distributed.checkpoint and weights_only=True take (R19)."""
    model = net()
    optimizer = EVERY[name](model)
    assert set(optimizer.state) == set(model.parameters())  # made at once
    for entries in optimizer.state.values():
        assert "step" in entries and all(isinstance(v, torch.Tensor) for v in entries.values())
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            if key not in ("params", "param_names"):
                parts = value if isinstance(value, tuple) else (value,)
                assert all(x is None or isinstance(x, bool | int | float | str) for x in parts), key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer inputs were observed
        optimizer.step()  # as torch.distributed.checkpoint does, with no gradients
    assert all(e["step"] == 0 for e in optimizer.state.values())


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_distributed_checkpoint_of_torch_named_recipes(twin: Twin, flatten: bool, started: bool):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ends = []
    for saved in (False, True):
        model = net()
        optimizer = twin.ours(model.parameters())
        train(model, optimizer, batches(3 * started))
        if saved:
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            optimizer = twin.ours(model.parameters(), lr=99.0)
            set_optimizer_state_dict(model, optimizer, state, options=options)
        train(model, optimizer, batches(3, seed=2))
        ends.append(flat(model))
    assert torch.equal(*ends)


def snapshot_of(optimizer):
    return [t for entries in optimizer.state.values() for t in entries.values()]


def test_a_loaded_state_dict_is_not_shared():
    model = net()
    optimizer = precond.adam(model, lr=torch.tensor(0.01))
    train(model, optimizer, batches(1))
    other = precond.adam(model)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"].fill_(9.0)
    assert not {t.data_ptr() for t in snapshot_of(other)} & {t.data_ptr() for t in snapshot_of(optimizer)}
    train(model, other, batches(1))
    assert optimizer.param_groups[0]["lr"] == 0.01 and optimizer.state[model.head.bias]["step"] == 1


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_groups_of_a_dict_that_lacks_keys_or_holds_lists(twin: Twin):
    """As from JSON, or from an older torch: what is missing keeps the constructor's value."""
    ends = []
    for changed in (False, True):
        model = net()
        optimizer = twin.ours(model)
        train(model, optimizer, batches(2))
        state = copy.deepcopy(optimizer.state_dict())
        if changed:
            state["param_groups"] = [
                {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k in ("params", "lr", "betas")}
                for g in state["param_groups"]
            ]
            state["state"] = {k: {**e, "step": int(e["step"])} for k, e in state["state"].items()}
        fresh = twin.ours(model)
        fresh.load_state_dict(state)
        train(model, fresh, batches(3, seed=2))
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("recipe", "other"), [("adam", "AdamW"), ("adamw", "Adam"), ("sgd", "Adam"), ("rmsprop", "Adagrad")])
def test_another_recipe_s_state_is_refused(recipe, other):
    model = net()
    theirs = getattr(torch.optim, other)(model.parameters())
    train(model, theirs, batches(2))
    optimizer = precond.RECIPES[recipe](model)
    before, groups = {k: dict(v) for k, v in optimizer.state.items()}, copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="another recipe"):
        optimizer.load_state_dict(theirs.state_dict())
    assert all(optimizer.state[p][k] is t for p, e in before.items() for k, t in e.items())
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("policy", ["propagate", "raise"])
@pytest.mark.parametrize("space", ["z", "p"])
def test_double_backprop_resumes_as_if_never_stopped(space, policy):
    def make(model):
        return precond.adamw(model, regularizers=[GradientNorm(0.01, method="exact", space=space)], nonfinite=policy)

    def go_on(model, optimizer, data):
        for batch in data:
            torch.manual_seed(0)
            optimizer.step(LossClosure(lambda m=model, b=batch: nn.functional.cross_entropy(m(b[0]), b[1])))

    model = net()
    optimizer = make(model)
    go_on(model, optimizer, batches(3))
    other = net()
    other.load_state_dict(model.state_dict())
    successor = make(other)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go_on(model, optimizer, batches(3, seed=2))
    go_on(other, successor, batches(3, seed=2))
    assert torch.equal(flat(model), flat(other)) and optimizer.last.gradients == 1


def test_a_copy_that_takes_second_gradients_says_what_it_lacks():
    model = torch.nn.Linear(3, 2)
    model, optimizer = copy.deepcopy((model, precond.adamw(model, regularizers=[precond.SAM(0.1)])))
    model(torch.ones(4, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"copied or unpickled and sees no model.*call watch\(model\)"):
        assert optimizer.probe()
