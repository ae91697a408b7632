"""The hooks' life: they keep nothing alive, go with the optimizer, and stay behind inert in copies of the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.layers import data
from precond import BNP, RMS, PreconditionedGD

torch.set_num_threads(1)
X = data(8, 4)


def make(preconditioner=None) -> tuple[nn.Module, PreconditionedGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.MultiheadAttention(4, 1))
    model = Caller(*model).double()
    return model, PreconditionedGD(model, lr=0.1, preconditioner=preconditioner or BNP() @ RMS())


class Caller(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        h = self[2](self[1](self[0](x)))
        return self[3](h, h, h)[0]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) + len(m._forward_hooks) for m in model.modules()
    )


def check_same(a: tuple[nn.Module, PreconditionedGD], b: tuple[nn.Module, PreconditionedGD]) -> None:
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        assert all(torch.equal(a[1].state[p][k], b[1].state[q][k]) for k in a[1].state[p])


def test_only_pre_hooks_are_used():
    """Full backward hooks break on in-place activations, and replaced modules break loading."""
    model, _ = make()
    assert hooks(model) > 0
    for module in model.modules():
        assert not module._backward_hooks and not module._backward_pre_hooks and not module._forward_hooks
    inplace = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    step(inplace, PreconditionedGD(inplace, preconditioner=BNP()))


def test_close_removes_them():
    model, optimizer = make()
    optimizer.close()
    assert hooks(model) == 0
    optimizer.close()


@pytest.mark.parametrize("stepped", [False, True])
def test_they_go_with_the_optimizer(stepped):
    model, optimizer = make()
    if stepped:
        step(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None and hooks(model) == 0
    model(X).sum().backward()


def test_a_second_optimizer_sees_what_the_first_no_longer_does():
    model, first = make(BNP())
    first.close()
    second = PreconditionedGD(model, lr=0.1, preconditioner=BNP())
    step(model, second)
    assert second.state[model[0].weight]["count"].item() == len(X)
    assert first.state[model[0].weight]["count"].item() == 0


def test_the_model_is_not_kept_alive_by_hooks_alone():
    model, optimizer = make()
    gone = weakref.ref(model)
    optimizer.close()
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_nothing_of_the_activations_is_kept():
    """Neither tensors nor the storage that moments were computed from."""
    model, optimizer = make()
    x = torch.randn(8, 4, dtype=torch.float64)
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: seen.extend(weakref.ref(a.untyped_storage()) for a in args))
    tensor = weakref.ref(x)
    model(x).sum().backward()
    del x
    gc.collect()
    assert len(seen) > 4 and tensor() is None and all(ref() is None for ref in seen)
    optimizer.step()


def test_moments_hold_no_more_than_they_are():
    """A view into a big buffer would keep it."""
    model, optimizer = make(BNP())
    model(X).sum().backward()
    for moments in optimizer._model_hooks.observer.collect().values():
        for t in (moments.count, moments.mean, moments.spread, moments.deviation):
            assert not t.requires_grad and t.untyped_storage().nbytes() <= 3 * t.numel() * t.element_size()


# --- copies -----------------------------------------------------------------------------------------------------------------


def _pickled(x):
    return pickle.loads(pickle.dumps(x))


def _saved(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copied_model_carries_inert_hooks(duplicate):
    model, optimizer = make()
    step(model, optimizer)
    twin = duplicate(model)
    before = copy.deepcopy(optimizer.state_dict())
    twin(100 * X).sum().backward()
    reference = make()
    step(*reference)
    for pair in ((model, optimizer), reference):
        step(*pair)
    check_same((model, optimizer), reference)
    assert before["state"][0]["step"].item() == 1
    optimizer.close()
    twin(X).sum().backward()


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_hooks_of_copies_do_not_pile_up_and_can_be_removed(duplicate):
    """Rounds of training that go on from a copy of the best."""
    model, _ = make()
    count = lambda model: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    first = count(model)
    kept = []
    for _ in range(4):
        model = duplicate(model)
        kept.append(precond.auto(model, regularizers=[precond.SAM(0.05)]))
    own = count(precond.unhook(duplicate(model)))
    assert own == 0 and 0 < first <= count(model) < 3 * first + 9
    live = count(model)
    assert count(precond.unhook(model)) == live, "those of an optimizer that lives stay"
    twin = duplicate(model).eval()
    with pytest.raises(AttributeError, match=r"call precond\.unhook\(model\) first"):
        torch.jit.script(twin)
    torch.jit.script(precond.unhook(twin))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_model_and_optimizer_copied_together_go_on_after_watch(duplicate):
    pair = make()
    step(*pair)
    twin = duplicate(pair)
    with pytest.raises(RuntimeError, match="call watch"):
        step(*twin)
    twin = duplicate(pair)
    twin[1].watch(twin[0])
    for _ in range(2):
        step(*twin)
        step(*pair)
    check_same(twin, pair)


def test_watch_refuses_another_model():
    pair = make()
    with pytest.raises(ValueError, match="not a parameter of this model"):
        pair[1].watch(make()[0])


def test_watching_twice_sees_once():
    pair, reference = make(), make()
    pair[1].watch(pair[0])
    for _ in range(2):
        step(*pair)
        step(*reference)
    check_same(pair, reference)
