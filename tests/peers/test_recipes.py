"""What torch.optim's own tests ask of each of its optimizers, asked of every recipe."""

from __future__ import annotations

import copy
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import precond
from alike import alike
from peers.recipes import RECIPES, batch, closure, flat, loss_of, make, net, train
from peers.registry import INPUTS, SCHEDULERS

each = pytest.mark.parametrize("recipe", RECIPES)
TORCH_NAMED = ("sgd", "adagrad", "rmsprop", "adam", "adamw", "muon")
OBSERVING = ("bnp", "whitening", "auto", "adam in BNP's coordinates")


def strided(model: nn.Module) -> nn.Module:
    """The same weights, none of them contiguous."""
    for layer in model.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            wide = torch.stack([p.detach(), torch.zeros_like(p)], -1)
            setattr(layer, name, nn.Parameter(wide[..., 0]))
            assert p.numel() == 1 or not getattr(layer, name).is_contiguous()
    return model


# --- the right direction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "strided", "maximize", "two groups"])
@each
def test_a_loop_goes_in_the_right_direction(recipe, how):
    model = strided(net()) if how == "strided" else net()
    params = model
    if how == "two groups":
        params = [{"params": model[0]}, {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 0.003}]
    optimizer = make(recipe, params, **({"maximize": True} if how == "maximize" and recipe != "PreconditionedGD" else {}))
    if how == "maximize":
        optimizer.param_groups[0]["maximize"] = True
    first = loss_of(model).item()
    for _ in range(40):
        optimizer.step(closure(model, optimizer))
    last = loss_of(model).item()
    assert last > first if how == "maximize" else last < 0.97 * first


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each
def test_schedulers_move_every_learning_rate_as_sgd_s(recipe, scheduler):
    model, other = net(), net()
    optimizer = make(recipe, model)
    reference = torch.optim.SGD(other.parameters(), lr=RECIPES[recipe][1]["lr"], momentum=0.9)
    both = [SCHEDULERS[scheduler](o) for o in (optimizer, reference)] if cycles(recipe, scheduler) else []
    for t in range(12):
        optimizer.step(closure(model, optimizer, t))
        reference.step()
        for s in both:
            s.step(1.0) if scheduler == "plateau" else s.step()
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert flat(model).isfinite().all()


def cycles(recipe: str, scheduler: str) -> bool:
    """Whether a scheduler takes a recipe: torch's OneCycleLR cycles momentum or betas, and refuses where there are none."""
    if scheduler != "one cycle":
        return True
    optimizer = make(recipe, net())
    if {"momentum", "betas"} & optimizer.defaults.keys():
        return True
    with pytest.raises(ValueError, match="momentum"):
        SCHEDULERS[scheduler](optimizer)
    return False


# --- options --------------------------------------------------------------------------------------------------------------


@each
def test_a_learning_rate_that_is_a_tensor(recipe):
    """It gives the steps of the number, stays the user's tensor, and may be changed in place."""
    ends = []
    for tensor in (False, True):
        model = net(torch.float64)
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
        optimizer = make(recipe, model, lr=lr)
        train(model, optimizer, 4)
        if tensor:
            assert optimizer.param_groups[0]["lr"] is lr
            lr.fill_(0.003)
        else:
            optimizer.param_groups[0]["lr"] = 0.003
        train(model, optimizer, 4, start=4)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("option", ["foreach", "fused"])
@pytest.mark.parametrize("recipe", ["sgd", "adagrad", "rmsprop", "adam", "adamw", "whitening"])
def test_implementations_are_accepted_and_change_nothing(recipe, option):
    if recipe == "rmsprop" and option == "fused":  # torch's has no such option
        with pytest.raises(TypeError, match="fused"):
            make(recipe, net(), fused=True)
        return
    ends = []
    for value in (None, False, True):
        model = net()
        train(model, make(recipe, model, **{option: value}), 3)
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@each
def test_what_is_not_supported_names_the_option(recipe):
    with pytest.raises((TypeError, ValueError), match="differentiable"):
        make(recipe, net(), differentiable=True)


@each
def test_capturable_is_taken_or_refused_with_the_reason(recipe):
    if recipe in OBSERVING or "SAM" in recipe:
        with pytest.raises(ValueError, match=r"capturable=True: it (observes the inputs|asks for second gradients)"):
            make(recipe, net(), capturable=True)
        return
    ends = []
    for capturable in (False, True):
        model = net()
        train(model, make(recipe, model, capturable=capturable), 3)
        ends.append(flat(model))
    assert torch.equal(*ends)


@each
def test_numbers_of_numpy_and_lists_are_taken(recipe):
    numpy = pytest.importorskip("numpy")
    ends = []
    for number in (float, numpy.float64, numpy.float32):
        model = net()
        optimizer = make(recipe, model, lr=number(0.0078125))
        train(model, optimizer, 3)
        assert type(optimizer.param_groups[0]["lr"]) is float
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# --- gradients ------------------------------------------------------------------------------------------------------------


@each
def test_no_gradient_no_step(recipe):
    model = net()
    optimizer = make(recipe, model)
    before = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no layer inputs were observed
        optimizer.step()
        assert optimizer.step(lambda: None) is None if accepts_none() else True
    assert torch.equal(flat(model), before)


def accepts_none() -> bool:
    """Whether closures may return None (they may where no second gradient is wanted)."""
    p = nn.Parameter(torch.ones(1))
    try:
        precond.sgd([p]).step(lambda: None)
    except TypeError:
        return False
    return True


@each
def test_gradients_of_zero_move_nothing(recipe):
    model = net()
    options = {} if recipe == "PreconditionedGD" else {"weight_decay": 0.0}
    options |= {"regularizers": ()}
    optimizer = make(recipe, model, **options)
    before = flat(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0.0 * loss_of(model)).backward()
        optimizer.step()
    assert torch.equal(flat(model), before)


@each
def test_a_gradient_that_is_missing_now_and_then(recipe):
    model = net()
    optimizer = make(recipe, model)
    for t in range(8):
        closure(model, optimizer, t)()
        gone = [p for i, p in enumerate(model.parameters()) if (i + t) % 3 == 0]
        before = [p.detach().clone() for p in gone]
        for p in gone:
            p.grad = None
        optimizer.step()
        joint = recipe in OBSERVING or recipe == "auto"  # a weight and its bias are one matrix there
        assert joint or all(torch.equal(p, b) for p, b in zip(gone, before, strict=True))
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("to_none", [True, False])
@each
def test_zero_grad(recipe, to_none):
    model = net()
    optimizer = make(recipe, model)
    closure(model, optimizer)()
    optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else not p.grad.any() for p in model.parameters())


@each
def test_sparse_gradients_are_refused_before_anything_moves(recipe):
    model = nn.Sequential(nn.Embedding(6, 5, sparse=True), net())
    optimizer = make(recipe, model)
    before = flat(model)
    nn.functional.cross_entropy(model(torch.arange(6)), torch.arange(6) % 3).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse=False"):
        optimizer.step()
    assert torch.equal(flat(model), before)


@each
def test_empty_parameters(recipe):
    model = net()
    model.empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = make(recipe, model)
    for t in range(3):
        closure(model, optimizer, t)()
        model.empty.grad = torch.zeros(0, 3)
        optimizer.step()
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("name", [n for n in INPUTS if n != "Muon"])
def test_complex_parameters_are_refused_and_the_remedy_is_torch_s_step(name):
    recipe = precond.RECIPES[name.lower()]
    z = nn.Parameter(torch.view_as_complex(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 2, 2)))
    with pytest.raises(TypeError, match="view_as_complex"):
        recipe([z])
    real = nn.Parameter(torch.view_as_real(z.detach()).clone())
    mine, theirs = recipe([real], lr=0.01), getattr(torch.optim, name)([z], lr=0.01)
    for _ in range(5):
        for optimizer, value in ((mine, torch.view_as_complex(real)), (theirs, z)):
            optimizer.zero_grad()
            ((value - 1j).abs() ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(real, torch.view_as_real(z), rtol=1e-10, atol=1e-12)


@each
def test_dtypes_may_be_mixed_and_the_default_may_be_another(recipe):
    model = nn.Sequential(net(torch.float64), nn.Linear(3, 3, dtype=torch.float64))
    model[1].float()
    default = torch.get_default_dtype()
    ends = []
    try:
        for dtype in (torch.float32, torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            mixed = copy.deepcopy(model)
            optimizer = make(recipe, mixed)
            for t in range(4):
                optimizer.zero_grad()
                x, y = batch(t, torch.float64)
                nn.functional.cross_entropy(mixed[1](mixed[0](x).float()), y).backward()
                optimizer.step()
            ends.append(flat(mixed))
    finally:
        torch.set_default_dtype(default)
    assert ends[0].isfinite().all()
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# --- closures and hooks -----------------------------------------------------------------------------------------------------


@each
def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back(recipe):
    model = net()
    optimizer = make(recipe, model)
    seen = []

    def run():
        seen.append(torch.is_grad_enabled())
        return closure(model, optimizer)()

    with torch.no_grad():
        loss = optimizer.step(run)
    assert seen == [True] and loss.item() > 0


@each
def test_hooks_of_steps_run_in_order(recipe):
    model = net()
    optimizer = make(recipe, model)
    said: list[str] = []
    everyone = [
        register_optimizer_step_pre_hook(lambda o, a, k: said.append("all before")),
        register_optimizer_step_post_hook(lambda o, a, k: said.append("all after")),
    ]
    own = [
        optimizer.register_step_pre_hook(lambda o, a, k: said.append("before")),
        optimizer.register_step_post_hook(lambda o, a, k: said.append("after")),
    ]
    try:
        train(model, optimizer, 1)
        assert said == ["all before", "before", "after", "all after"]
    finally:
        for handle in (*everyone, *own):
            handle.remove()
    train(model, optimizer, 1)
    assert len(said) == 4


@each
def test_hooks_of_state_dicts(recipe):
    model = net()
    optimizer = make(recipe, model)
    train(model, optimizer, 2)
    said: list[str] = []

    def renamed(o, state):
        said.append("after saving")
        return {**state, "note": 1}

    optimizer.register_state_dict_pre_hook(lambda o: said.append("before saving"))
    optimizer.register_state_dict_post_hook(renamed)
    optimizer.register_load_state_dict_pre_hook(lambda o, s: said.append("second"))

    def other(o, state):
        said.append("first")
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.125
        return state

    optimizer.register_load_state_dict_pre_hook(other, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: said.append("after loading"))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert said == ["before saving", "after saving", "first", "second", "after loading"]
    assert optimizer.param_groups[0]["lr"] == 0.125 and state["param_groups"][0]["lr"] != 0.125


# --- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["both", "neither", "saved alone", "loaded alone"])
@each
def test_a_state_dict_goes_on_in_another_optimizer(recipe, names):
    """Bit for bit, whether parameters have names or not, through ``weights_only`` loading; the dict is left as it is."""
    model = net()
    bare = lambda m: list(m.parameters())  # noqa: E731
    observed = recipe in OBSERVING
    given = [lambda m: m, lambda m: m] if observed else {
        "both": [lambda m: m, lambda m: list(m.named_parameters())],
        "neither": [bare, bare],
        "saved alone": [lambda m: m, bare],
        "loaded alone": [bare, lambda m: list(m.named_parameters())],
    }[names]  # fmt: skip
    optimizer = make(recipe, given[0](model))
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    if names in ("saved alone", "loaded alone") and observed:
        state["param_groups"][0].pop("param_names")
    kept = copy.deepcopy(state)
    other = copy.deepcopy(model)
    successor = make(recipe, given[1](other), lr=123.0)
    successor.load_state_dict(state)
    assert alike(state, kept)
    for m, o in ((model, optimizer), (other, successor)):
        train(m, o, 5, start=5)
    assert torch.equal(flat(model), flat(other))
    mine, theirs = optimizer.state_dict(), successor.state_dict()
    assert alike(mine["state"], theirs["state"]) and all(e for e in mine["state"].values())


@each
def test_older_state_dicts_load(recipe):
    """Without the options that torch added later, and with steps that are numbers."""
    model = net()
    optimizer = make(recipe, model)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for option in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(option, None)
    for entry in state["state"].values():
        entry["step"] = float(entry["step"])
    other = copy.deepcopy(model)
    successor = make(recipe, other)
    successor.load_state_dict(state)
    for m, o in ((model, optimizer), (other, successor)):
        train(m, o, 3, start=3)
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}], ids=str)
@pytest.mark.parametrize("recipe", TORCH_NAMED)
def test_saved_flags_of_other_implementations_load(recipe, flags):
    model = net()
    optimizer = make(recipe, model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(flags)
    optimizer.load_state_dict(state)
    train(model, optimizer, 2)
    assert flat(model).isfinite().all()


@each
def test_a_state_of_another_dtype_loads(recipe):
    """As torch.optim's: a float64 run goes on in float32, and back; the state that is loaded takes the parameters' precision."""
    for first, second in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        model = net(first)
        optimizer = make(recipe, model)
        train(model, optimizer, 4)
        other = copy.deepcopy(model).to(second)
        successor = make(recipe, other)
        successor.load_state_dict(optimizer.state_dict())
        for m, o in ((model, optimizer), (other, successor)):
            train(m, o, 3, start=4)
        # Adam's first steps divide by what is as small as they are: rounding in float32 shows at that scale.
        torch.testing.assert_close(flat(model), flat(other), rtol=1e-3, atol=1e-3)


@each
def test_a_deep_copy_has_all_public_attributes(recipe):
    model = net()
    optimizer = make(recipe, model)
    train(model, optimizer, 2)
    public = lambda o: {k for k in vars(o) if not k.startswith("_")}  # noqa: E731
    assert public(copy.deepcopy(optimizer)) == public(optimizer)
    assert repr(optimizer).startswith("PreconditionedGD (\nParameter Group 0") and "lr: 0.0" in repr(optimizer)


@each
def test_every_parameter_that_stepped_has_a_state_of_tensors(recipe):
    model = net()
    optimizer = make(recipe, model)
    train(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    assert all(isinstance(t, torch.Tensor) and e for e in optimizer.state.values() for t in e.values())


@each
def test_a_group_added_later_is_trained_by_its_own_options(recipe):
    model = net()
    more = nn.Linear(3, 2)
    optimizer = make(recipe, model)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": more, "lr": 0.0})
    before = flat(more), flat(model)
    for _ in range(2):
        optimizer.zero_grad()
        more(model(batch()[0])).square().mean().backward()
        optimizer.step()
    assert torch.equal(flat(more), before[0]) and not torch.equal(flat(model), before[1])
    optimizer.param_groups[1]["lr"] = 0.01
    optimizer.zero_grad()
    more(model(batch()[0])).square().mean().backward()
    optimizer.step()
    assert not torch.equal(flat(more), before[0])


# --- memory -------------------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of new tensors that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (s := x.untyped_storage())._cdata not in given | self._known:
                self._known.add(s._cdata)
                self.alive += s.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(s, self._freed, s._cdata, s.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@pytest.mark.parametrize("name", [n for n in INPUTS if n != "Muon"])
def test_a_step_needs_no_more_memory_than_torch_s(name):
    """At the peak of a step, beyond parameters, gradients and state: what torch.optim's own default needs, and 1 kB."""
    peaks = []
    for recipe in (precond.RECIPES[name.lower()], getattr(torch.optim, name)):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
        optimizer = recipe(model.parameters(), lr=0.01)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            with Peak() as mode:
                optimizer.step()
        peaks.append(mode.peak)
    assert peaks[0] <= peaks[1] + 1024
