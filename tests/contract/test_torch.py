"""Each recipe follows torch.optim's class of the same name, and their state dicts are one."""

from __future__ import annotations

import io
from functools import cache

import pytest
import torch

from contract.table import TWINS, Twin, batches, flat, net, train

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
by_name = pytest.mark.parametrize("twin", TWINS, ids=str)


def two_groups(model, **first):
    return [
        {"params": [model.conv.weight, model.head.weight], **first},
        {"params": [model.conv.bias, model.norm.weight], "lr": 1e-3},
    ]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@by_name
def test_steps_under_a_scheduler_with_groups(twin: Twin, dtype: torch.dtype):
    ends = []
    for make in (twin.theirs, lambda p: twin.ours(p, engine="auto"), lambda p: twin.ours(p, engine="loop")):
        model = net(dtype)
        optimizer = make(two_groups(model, weight_decay=0.05))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)

        def hook(t, optimizer=optimizer, model=model, scheduler=scheduler):
            scheduler.step()
            if t == 10:
                optimizer.add_param_group({"params": [model.head.bias, model.norm.bias], "lr": 2e-3})

        train(model, optimizer, batches(24, dtype), hook)
        ends.append(flat(model))
    theirs, auto, loop = ends
    assert relative(auto, theirs) <= TOLERANCE[dtype]
    assert relative(loop, theirs) <= TOLERANCE[dtype]


LENGTH = 14


@cache
def end_of_theirs(name: str) -> torch.Tensor:
    """Where torch's optimizer ends that is never interrupted."""
    model = net()
    train(model, next(twin for twin in TWINS if str(twin) == name).theirs(model.parameters()), batches(LENGTH))
    return flat(model)


@pytest.mark.parametrize("moment", [0, 7])
@pytest.mark.parametrize("back", [False, True], ids=["torch to ours", "ours to torch"])
@by_name
def test_state_dicts_load_into_each_other_without_a_jump(twin: Twin, back: bool, moment: int):
    first, second = (twin.ours, twin.theirs) if back else (twin.theirs, twin.ours)
    data = batches(LENGTH)
    model = net()
    optimizer = first(list(model.parameters()))
    train(model, optimizer, data[:moment])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    successor = second(list(model.parameters()), lr=123.0)
    successor.load_state_dict(state)
    for t, batch in enumerate(data[moment:], start=moment):
        torch.manual_seed(100 + t)
        successor.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        successor.step()
    assert relative(flat(model), end_of_theirs(str(twin))) <= 1e-12


@pytest.mark.parametrize("turns", [(0, 7), (3, 7)], ids=str)
@by_name
def test_a_state_dict_that_goes_to_torch_and_comes_back(twin: Twin, turns: tuple[int, int]):
    """Saved by ours, loaded by torch's, and after some of its steps, or none, by ours again."""
    data, model, optimizer = batches(LENGTH), net(), None
    for make, begin, end in zip((twin.ours, twin.theirs, twin.ours), (0, *turns), (*turns, LENGTH), strict=True):
        before, optimizer = optimizer, make(list(model.parameters()))
        if before is not None:
            optimizer.load_state_dict(before.state_dict())
        for t in range(begin, end):
            torch.manual_seed(100 + t)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data[t][0]), data[t][1]).backward()
            optimizer.step()
    assert relative(flat(model), end_of_theirs(str(twin))) <= 1e-12


@pytest.mark.parametrize("twin", [t for t in TWINS if "momentum" in t.options or "betas" in t.options], ids=str)
def test_one_cycle_moves_momentum(twin: Twin):
    ends = []
    for make in (twin.ours, twin.theirs):
        model = net()
        optimizer = make(model.parameters())
        try:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=30)
        except ValueError:  # Adam without momentum has nothing to cycle
            pytest.skip("no momentum")
        train(model, optimizer, batches(30), lambda t, s=scheduler: s.step() if t < 29 else None)
        ends.append(flat(model))
    assert relative(*ends) <= 1e-12


@by_name
def test_a_learning_rate_may_be_a_tensor(twin: Twin):
    ends = []
    for lr in (twin.options["lr"], torch.tensor(twin.options["lr"], dtype=torch.float64)):
        model = net()
        train(model, twin.ours(model.parameters(), lr=lr), batches(10))
        ends.append(flat(model))
    assert relative(*ends) <= 1e-12


@by_name
def test_what_is_left_out_raises_and_says_so(twin: Twin):
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        twin.ours(net().parameters(), differentiable=True)


@by_name
def test_capturable_changes_nothing_on_a_processor(twin: Twin):
    ends = []
    for capturable in (False, True):
        model = net()
        optimizer = twin.ours(model.parameters(), capturable=capturable)
        train(model, optimizer, batches(5))
        assert all(group["capturable"] is capturable for group in optimizer.param_groups)
        ends.append(flat(model))
    assert torch.equal(*ends)


@by_name
def test_a_parameter_without_gradient_is_left_alone(twin: Twin):
    ends = []
    for make in (twin.ours, twin.theirs):
        model = net()
        optimizer = make(model.parameters())
        for t, batch in enumerate(batches(6)):
            torch.manual_seed(t)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            if t % 2:
                model.head.weight.grad = None
            optimizer.step()
        ends.append(flat(model))
    assert relative(*ends) <= 1e-12


def test_adamw_state_is_eight_bytes_a_parameter():
    model = net(torch.float32)
    optimizer = TWINS[-3].ours(model.parameters())
    train(model, optimizer, batches(1, torch.float32))
    size = sum(t.numel() * t.element_size() for e in optimizer.state.values() for k, t in e.items() if k != "step")
    assert size == 8 * sum(p.numel() for p in model.parameters())
