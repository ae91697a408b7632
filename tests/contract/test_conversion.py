"""A model that is converted, moved or rewritten after its optimizer was made: state follows, or one error says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import precond
from contract.table import flat
from precond import SAM, GradientNorm

MAKERS = {
    **precond.RECIPES,
    "adam in BNP's coordinates": lambda m: precond.adam(m, inputs=precond.BNP()),
    "SAM": lambda m: precond.adamw(m, regularizers=[SAM(0.01)]),
    "gradient norm": lambda m: precond.soap(m, regularizers=[GradientNorm(0.01, method="central")]),
    "kahan": lambda m: precond.adamw(m, rounding="kahan"),
}
PROBING = {"SAM", "gradient norm"}
X = torch.randn(5, 16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def step(model, optimizer, t):
    def run():
        optimizer.zero_grad()
        loss = model(X[t].to(model[3].weight.dtype)).square().mean()
        loss.backward()
        return loss

    return optimizer.step(run)


def to_empty(model):
    values = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(values)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Same(nn.Module):
    def forward(self, x):
        return x * 1.0

    def right_inverse(self, x):
        return x


CHANGES = {
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double, tensors swapped": swapped,
    "meta, to_empty": to_empty,
    "assigned": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Same()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKERS)
def test_state_follows(name, change):
    for before in (0, 2):
        model = net()
        optimizer = MAKERS[name](model)
        for t in range(before):
            step(model, optimizer, t)
        CHANGES[change](model)
        if name in PROBING and change in ("bfloat16", "half"):
            for _ in range(2):  # not only the first time
                with pytest.raises(ValueError, match="rounding='kahan'"):
                    step(model, optimizer, before)
            continue
        start = flat(model)
        for t in (before, before + 1):
            step(model, optimizer, t)
        assert not torch.equal(flat(model), start) and flat(model).isfinite().all()
        params = set(model.parameters())
        assert set(optimizer.state) <= params and {p for g in optimizer.param_groups for p in g["params"]} == params
        # Under auto a bias whose weight is computed now is scaled by another statistic, and begins anew.
        anew = {2} if (name, change) == ("auto", "parametrized") else set()
        assert {int(e["step"]) for e in optimizer.state.values()} == {before + 2} | anew
        wide = {torch.float32 if p.dtype.itemsize == 2 else p.dtype for p in params}
        kept = {t.dtype for e in optimizer.state.values() for k, t in e.items() if k not in ("step", "residual")}
        assert kept <= wide
        optimizer.load_state_dict(optimizer.state_dict())


def layer_replaced(model):
    values = {k: v.clone() for k, v in model.state_dict().items()}
    model[0] = nn.Linear(6, 8)
    model.load_state_dict(values)


REPLACED = {"assigned": CHANGES["assigned"], "meta, to_empty": to_empty, "another layer": layer_replaced}


def watched_again(model, optimizer):
    optimizer.close()
    optimizer.watch(model)


def looked_at(model, optimizer):
    precond.preconditioner_of(optimizer, model.parameters())


def copied(model, optimizer):
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.watch(model)
    return model, optimizer


LOOKS = {
    "load_state_dict": lambda m, o: o.load_state_dict(o.state_dict()),
    "add_param_group": lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
    "watch": lambda m, o: o.watch(m),
    "close, watch": watched_again,
    "preconditioner_of": looked_at,
    "copy": copied,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_asked_after_parameters_were_replaced_is_of_the_model_as_it_is(name, change, look):
    """Bit for bit as without the replacement, whatever is called before the next step."""
    ends = []
    for replace in (lambda m: None, REPLACED[change]):
        model = net()
        optimizer = MAKERS[name](model)
        for t in range(2):
            step(model, optimizer, t)
        replace(model)
        model, optimizer = LOOKS[look](model, optimizer) or (model, optimizer)
        for t in (2, 3):
            step(model, optimizer, t)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_a_group_of_what_was_put_in_the_place_of_a_layer_has_its_own_numbers():
    model = net()
    optimizer = precond.adamw(model)
    step(model, optimizer, 0)
    model[3] = nn.Linear(8, 3)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"'3.weight', '3.bias' of the model are no longer"):
        optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.0})
    step(model, optimizer, 1)
    assert torch.equal(model[3].weight, before[3].weight) and not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("name", MAKERS)
def test_after_steps_it_goes_on_from_its_statistics(name):
    """In float64 from the state that float32 left: near the steps that float32 would have made."""
    ends = []
    for convert in (False, True):
        model = net()
        optimizer = MAKERS[name](model)
        for t in range(5):
            if convert and t == 3:
                model.double()
            step(model, optimizer, t)
        ends.append(flat(model).double())
    # Adam divides gradients of rounding's size (a bias before LayerNorm) by their own size: such entries move by 2α in either case.
    moved = (ends[0] - ends[1]).abs()
    assert moved.median() <= 1e-4 and moved.max() <= 0.1


@pytest.mark.parametrize("rewrite", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_a_weight_that_is_no_parameter_any_more(name, rewrite):
    model = net()
    optimizer = MAKERS[name](model)
    step(model, optimizer, 0)
    rewrite(model[0])
    with pytest.raises(RuntimeError, match=r"'0.weight' is no parameter of the model any more.*after such changes"):
        step(model, optimizer, 1)


def test_parameters_left_on_meta():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = precond.adamw(model.parameters())
    model.to_empty(device="cpu")
    model(torch.ones(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        optimizer.step()


@pytest.mark.parametrize("fill", ["to_empty", "assigned"])
@pytest.mark.parametrize("name", MAKERS)
def test_made_of_a_model_on_meta(name, fill):
    """What is trained is what an optimizer made after trains, bit for bit."""
    values = net().state_dict()
    with torch.device("meta"):
        model = net()
    optimizer = MAKERS[name](model)
    if fill == "to_empty":
        model.to_empty(device="cpu").load_state_dict(values)
    else:
        model.load_state_dict(values, assign=True)
    other = net()
    after = MAKERS[name](other)
    for t in range(3):
        step(model, optimizer, t)
        step(other, after, t)
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_is_stepped_by_other_statistics_begins_anew(engine):
    """Under auto a bias whose weight is frozen goes from its layer's steps to RMS's, whose first step is one rate long at most."""
    model, lr = net(), 1e-3
    optimizer = precond.auto(model, lr=lr, weight_decay=0.0, engine=engine)
    for t in range(3):
        step(model, optimizer, t)
    for frozen in (True, False, True):
        model[0].weight.requires_grad_(not frozen)
        before = model[0].bias.detach().clone()
        step(model, optimizer, 3)
        if frozen:
            assert (model[0].bias - before).abs().max() <= 1.01 * lr
    assert optimizer.state[model[0].bias]["step"] == 1 and optimizer.state[model[0].weight]["step"] == 4
