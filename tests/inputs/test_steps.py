"""Statistics and steps: folded once, never with a skipped step; resumed, composed, and refused where they do not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.layers import data
from precond import (
    BNP,
    L1,
    L2,
    RMS,
    SAM,
    AdaGrad,
    GradientNorm,
    LossClosure,
    Momentum,
    PreconditionedGD,
    Preconditioner,
    Whitening,
)
from precond.algebra.schedules import TimesLr
from precond.optim.preconditioners.compose import Composition

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.attention = nn.Conv1d(3, 4, 2), nn.LayerNorm(4), nn.MultiheadAttention(4, 2, kdim=4, vdim=4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).movedim(2, 0))
        return self.head(self.attention(h, h, h)[0])


def make(preconditioner: Preconditioner, dtype: torch.dtype = torch.float64, **options) -> tuple[Net, PreconditionedGD]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, PreconditionedGD(model, **{"lr": 0.05, **options}, preconditioner=preconditioner)


def batch(k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return data(6, 3, 5, seed=k).to(dtype)


def step(model: nn.Module, optimizer: PreconditionedGD, k: int) -> None:
    x = batch(k, next(model.parameters()).dtype)
    optimizer.step(LossClosure(lambda: model(x).square().mean()))


def snapshot(model: nn.Module, optimizer: PreconditionedGD) -> list[Tensor]:
    return [t.clone() for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]


def check_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


CHOICES: dict[str, Callable[[], Preconditioner]] = {
    "BNP": lambda: BNP(),
    "BNP @ RMS": lambda: BNP() @ RMS(),
    "BNP @ AdaGrad": lambda: BNP(conv="patch") @ AdaGrad(),
}
PENALTIES = {
    "plain": [],
    "L2": [L2(0.01)],
    "L1": [L1(0.01)],
    "L1 proximal": [L1(0.01, proximal=True)],
    "SAM": [SAM(0.05)],
    "adaptive SAM": [SAM(0.05, adaptive=True)],
    "gradient norm": [L2(0.01), GradientNorm(TimesLr(0.5))],
    "exact": [GradientNorm(0.01, method="exact", q=1, power=1)],
}


# --- skipped steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("penalties", [[], [SAM(0.05)], [GradientNorm(0.01)]], ids=["plain", "SAM", "gradient norm"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_bad_inputs_skip_the_step_and_fold_nothing(choice, penalties, nonfinite, bad):
    model, optimizer = make(choice(), nonfinite=nonfinite, regularizers=penalties)
    step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    x = batch(1)
    x[2, 1, 3] = bad
    attempt = lambda: optimizer.step(LossClosure(lambda: model(x).square().mean()))  # noqa: E731
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="inf or NaN"):
            attempt()
    else:
        attempt()
        assert optimizer.last.skipped
    check_same(snapshot(model, optimizer), before)
    step(model, optimizer, 2)
    other = make(choice(), nonfinite=nonfinite, regularizers=penalties)
    step(*other, 0)
    step(*other, 2)
    check_same(snapshot(model, optimizer), snapshot(*other))


def test_bad_inputs_of_a_layer_whose_output_hides_them():
    """The gradient is finite and the inputs are not: nothing is folded in."""
    layer = nn.Linear(3, 2).double()
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP(), nonfinite="raise")
    x = batch(0)[:, :, 0].clone()
    x[0, 0] = torch.inf
    layer(x)[1:].sum().backward()
    layer.weight.grad.nan_to_num_(0.0)
    with pytest.raises(FloatingPointError, match="what a layer receives"):
        optimizer.step()
    assert optimizer.state[layer.weight]["count"].item() == 0
    optimizer.zero_grad()
    layer(batch(0)[:, :, 0]).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["count"].item() == 6


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("scale", [1e4, torch.nan], ids=str)
@pytest.mark.parametrize("clears", ["model", "optimizer"])
def test_a_batch_that_the_loop_passes_over_leaves_nothing_behind(choice, scale, clears):
    """The usual guard, `if loss is bad: continue`: no backward, no step, and the next healthy step is as if it had not been."""

    def train(batches):
        model, optimizer = make(choice())
        for x in batches:
            (optimizer if clears == "optimizer" else model).zero_grad()
            loss = model(x).square().mean()
            if x is not bad:
                loss.backward()
                optimizer.step()
        return snapshot(model, optimizer)

    bad = batch(1) * scale
    if clears == "model" and scale == 1e4:
        pytest.skip("the optimizer is not told of it, and cannot see that the gradient belongs to other inputs")
    if clears == "model":
        with pytest.warns(UserWarning, match="held inf or NaN"):  # of this no more than the step itself can be saved
            found = train([batch(0), bad, batch(2)])
        before = train([batch(0)])
        n = sum(1 for _ in Net().parameters())
        assert len(found) > n
        assert all(t.isfinite().all() for t in found)
        assert not torch.equal(found[0], before[0])
    else:
        check_same(train([batch(0), bad, batch(2), batch(3)]), train([batch(0), batch(2), batch(3)]))


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_inputs_that_are_not_finite_and_a_gradient_that_is(policy):
    """Forward, forward, zero_grad, backward: which of the forwards was meant is not known, but the step can be taken."""
    model, optimizer = make(BNP(), nonfinite=policy)
    step(model, optimizer, 0)
    before = snapshot(model, optimizer)
    model(batch(1) * torch.inf)
    loss = model(batch(2)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="what a layer receives"):
            optimizer.step()
        check_same(snapshot(model, optimizer), before)
        return
    with pytest.warns(UserWarning, match="'conv.weight' and others held inf or NaN, and the gradient does not"):
        optimizer.step()
    assert not optimizer.last.skipped
    counts = [optimizer.state[p]["count"].item() for p in (model.conv.weight, model.head.weight)]
    assert counts == [30.0, 24.0], "statistics of before"
    assert not torch.equal(model.head.weight, before[-1])
    step(model, optimizer, 3)
    assert [optimizer.state[p]["count"].item() for p in (model.conv.weight, model.head.weight)] == [60.0, 48.0]


@pytest.mark.parametrize("choice", [*CHOICES.values(), Whitening], ids=[*CHOICES, "whitening"])
def test_a_model_that_is_frozen_for_the_loss_of_another_and_thawed_for_its_own(choice):
    """As the critic of a GAN: forwards while it is frozen do not count, and the next of its own do."""

    def train(freezes):
        model, optimizer = make(choice())
        for k in range(4):
            model.requires_grad_(True)
            optimizer.zero_grad()
            model(batch(k)).square().mean().backward()
            optimizer.step()
            if freezes:
                model.requires_grad_(False)
                model(batch(9).requires_grad_()).mean().backward()
        return snapshot(model, optimizer)

    check_same(train(True), train(False))


@pytest.mark.parametrize("clears", ["optimizer", "model", "none"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_gradients_of_the_loss_of_another_that_are_thrown_away(choice, clears):
    """A critic's own step after that of another through it, as DCGAN has it: whoever clears the gradients."""

    def train(others):
        model, optimizer = make(choice())
        for k in range(4):
            {"optimizer": optimizer, "model": model}.get(clears, optimizer).zero_grad()
            if clears == "none":
                for p in model.parameters():
                    p.grad = None
            model(batch(k)).square().mean().backward()
            model(batch(k + 4)).square().mean().backward()
            optimizer.step()
            if others:
                model(9 * batch(9)).mean().backward()
        return snapshot(model, optimizer)

    check_same(train(True), train(False))


@pytest.mark.parametrize("choice", [*CHOICES.values(), Whitening], ids=[*CHOICES, "whitening"])
def test_a_look_in_another_precision_between_two_steps(choice):
    def train(looks):
        model, optimizer = make(choice(), torch.float32)
        for k in range(4):
            optimizer.zero_grad()
            model(batch(k, torch.float32)).square().mean().backward()
            optimizer.step()
            if looks and k < 3:
                model.double()
                model(batch(k)).square().mean().backward()
                model.zero_grad()
                model.float()
        return snapshot(model, optimizer)

    check_same(train(True), train(False))


def after_two_steps(layer, optimizer):
    for k in range(2):
        optimizer.zero_grad()
        layer(batch(k)[:, :, 0]).square().mean().backward()
        optimizer.step()
    return snapshot(layer, optimizer)


def test_a_forward_that_is_interrupted_in_a_hook_of_others_leaves_nothing():
    def interrupt(module, args):
        raise KeyboardInterrupt

    def train(interrupted):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
        if interrupted:
            hook = layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                layer(batch(9)[:, :, 0])
            hook.remove()
        return after_two_steps(layer, optimizer)

    check_same(train(True), train(False))


def test_inputs_as_hooks_of_others_leave_them_whenever_these_were_put_on():
    """A hook that changes what a layer receives (quantization, noise) counts, before or after the optimizer's, from its first forward on."""

    class Times10(nn.Module):
        def forward(self, x):
            return 10 * x

    def hook(module, args):
        return (10 * args[0],)

    def train(when):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        model = nn.Sequential(Times10() if when == "inside" else nn.Identity(), layer)
        if when == "before":
            layer.register_forward_pre_hook(hook)
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=Whitening())
        second = PreconditionedGD(model, lr=0.0, preconditioner=BNP())  # which watches too
        for k in range(4):
            if when == "after" and k == 0:
                layer.register_forward_pre_hook(hook)
            optimizer.zero_grad()
            second.zero_grad()
            model(batch(k)[:, :, 0]).square().mean().backward()
            optimizer.step()
            second.step()
        return [*snapshot(model, optimizer), *snapshot(model, second)]

    check_same(train("after"), train("inside"))
    check_same(train("before"), train("inside"))


def test_a_forward_that_raises_before_the_inputs_are_read_leaves_nothing():
    def train(fails):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
        layer.register_forward_pre_hook(lambda module, args: None)
        if fails:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(torch.ones(4, 7, dtype=torch.float64))
        found = after_two_steps(layer, optimizer)
        assert not layer._forward_hooks
        return found

    check_same(train(True), train(False))


@pytest.mark.parametrize(
    "duplicate",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["alone", "deepcopy", "pickle"],
)
def test_what_a_hook_of_others_raises_is_raised_whatever_hooks_there_are(duplicate):
    """In the forward in which inputs are first read after the hooks of others; what is left in a copy is inert, and can be removed."""

    def train(fails):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
        layer.register_forward_pre_hook(_raises_on_seven)
        layer.register_forward_hook(_does_nothing)
        if fails:
            with pytest.raises(ValueError, match="seven inputs"):
                layer(torch.ones(4, 7, dtype=torch.float64))
            twin = duplicate(layer)
            if twin is not layer:
                twin(torch.full((4, 3), 9.0, dtype=torch.float64)).sum().backward()
                precond.unhook(twin)
                assert list(twin._forward_hooks.values()) == [_does_nothing]
        found = after_two_steps(layer, optimizer)
        assert list(layer._forward_hooks.values()) == [_does_nothing]
        return found

    check_same(train(True), train(False))


def test_what_a_forward_that_raised_has_left_goes_with_the_hooks():
    layer = nn.Linear(3, 2).double()
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
    layer.register_forward_pre_hook(_raises_on_seven)
    with pytest.raises(ValueError, match="seven inputs"):
        layer(torch.ones(4, 7, dtype=torch.float64))
    optimizer.close()
    assert not layer._forward_hooks and list(layer._forward_pre_hooks.values()) == [_raises_on_seven]


def _raises_on_seven(module, args):
    if args[0].shape[-1] == 7:
        raise ValueError("seven inputs")


def _does_nothing(module, args, output):
    pass


@pytest.mark.parametrize("recipe", ["auto", "bnp", "whitening"])
def test_a_run_resumed_after_any_step_is_bit_for_bit_the_one_that_went_on(recipe):
    """Layers of different widths, whose statistics are folded at once: what is made of them does not depend on who was beside."""

    def make():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 1, bias=False))
        return model, precond.RECIPES[recipe](model)

    g = torch.Generator().manual_seed(3)
    batches = [(torch.randn(16, 5, generator=g) + 1, torch.randn(16, 1, generator=g)) for _ in range(14)]

    def train(stop):
        model, optimizer = make()
        for k, (x, y) in enumerate(batches):
            if k == stop:
                kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, optimizer = make()
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    whole = train(None)
    for stop in range(1, 14):
        check_same(train(stop), whole)


@pytest.mark.parametrize("probing", [False, True], ids=["plain", "SAM"])
def test_an_overflow_found_by_the_scaler_folds_nothing(probing):
    model, optimizer = make(BNP() @ RMS(), torch.float32, regularizers=[SAM(0.05)] if probing else [])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    for k, overflow in enumerate([False, True, False]):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        loss = lambda k=k: model(batch(k, torch.float32)).square().mean()  # noqa: E731
        (scaler.scale(loss()) * (1e38 if overflow else 1.0)).backward()
        while optimizer.probe(grad_scale=scaler.get_scale()):
            scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            check_same(snapshot(model, optimizer), before)
        seen.append(optimizer.state[model.conv.weight]["outer.count"].item())
    assert seen == [30, 30, 60]
    assert scaler.get_scale() == 2.0**9


def test_statistics_are_folded_once_per_step():
    model, optimizer = make(BNP())
    for k in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            model(batch(k)).sum().backward()
        optimizer.step()
    assert optimizer.state[model.conv.weight]["count"].item() == 3 * 2 * 30
    assert optimizer.state[model.conv.weight]["step"].item() == 3


# --- resuming ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_resuming_is_never_having_stopped(choice, penalties, dtype):
    options = {"regularizers": penalties, "momentum": Momentum(0.9)}
    pair = make(choice(), dtype, **options)
    for k in range(3):
        step(*pair, k)
    buffer = io.BytesIO()
    torch.save({"model": pair[0].state_dict(), "optimizer": pair[1].state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(9)
    resumed = make(choice(), dtype, **options)
    step(*resumed, 7)
    resumed[0].load_state_dict(saved["model"])
    resumed[1].load_state_dict(saved["optimizer"])
    check_same(snapshot(*pair), snapshot(*resumed))
    for k in range(3, 6):
        step(*pair, k)
        step(*resumed, k)
    check_same(snapshot(*pair), snapshot(*resumed))


@pytest.mark.parametrize("stop", [18, 21, 22, 24, 25])
def test_resuming_keeps_the_rhythm_of_observation(stop):
    """After 20 steps each fourth one is observed: which one belongs to the state."""

    def step(model: nn.Module, optimizer: PreconditionedGD, k: int) -> None:
        optimizer.zero_grad()
        model(batch(k)).square().mean().backward()
        optimizer.step()

    pair = make(BNP(decay=0.9) @ RMS())
    for k in range(stop):
        step(*pair, k)
    resumed = make(BNP(decay=0.9) @ RMS())
    step(*resumed, 99)
    resumed[0](batch(98))  # seen before, and of no step
    resumed[0].load_state_dict(pair[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(pair[1].state_dict()))
    for k in range(stop, stop + 5):
        step(*pair, k)
        step(*resumed, k)
    check_same(snapshot(*pair), snapshot(*resumed))


def test_bfloat16_parameters_resume_with_float32_statistics():
    pair = make(BNP() @ RMS(), torch.bfloat16)
    for k in range(2):
        step(*pair, k)
    resumed = make(BNP() @ RMS(), torch.bfloat16)
    resumed[0].load_state_dict(pair[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(pair[1].state_dict()))
    assert resumed[1].state[resumed[0].conv.weight]["outer.variance"].dtype == torch.float32
    step(*pair, 2)
    step(*resumed, 2)
    check_same(snapshot(*pair), snapshot(*resumed))


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (lambda: nn.Linear(3, 2), lambda: nn.Linear(4, 2), "'mean' of 'layer.weight' has shape"),
        (lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 3, groups=2), "of 'layer.weight' has shape"),
        (lambda: nn.LayerNorm(3), lambda: nn.Linear(3, 3), "the state of 'layer.weight' has 'activity', 'count'"),
    ],
    ids=["width", "groups", "no layer"],
)
def test_a_state_dict_from_a_model_with_other_layers_is_refused(mine, theirs, message):
    """All or nothing, and the message names the parameter."""
    optimizer, other = (PreconditionedGD(nn.ModuleDict({"layer": m()}), preconditioner=BNP()) for m in (mine, theirs))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())


def test_other_layer_names_are_matched_by_name_and_told():
    a, b = nn.ModuleDict({"one": nn.Linear(3, 2)}), nn.ModuleDict({"two": nn.Linear(3, 2)})
    optimizer = PreconditionedGD(b, preconditioner=BNP())
    with pytest.warns(UserWarning, match=r"start fresh: two.bias, two.weight; ignored: one.bias, one.weight"):
        optimizer.load_state_dict(PreconditionedGD(a, preconditioner=BNP()).state_dict())


# --- composition ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["RMS", "AdaGrad"])
def test_composition_is_the_inner_method_in_the_outer_coordinates(inner):
    """step = P₁·Adam(P₁ᵀg): P₁ D⁻¹ m̂, D = √r̂ + ε, m of P₁ᵀg and r of its square, each with the P₁ of its step (eq. 25)."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    choice = RMS(decay=0.9) if inner == "RMS" else AdaGrad()
    optimizer = PreconditionedGD(layer, lr=0.05, preconditioner=BNP(decay=0.5, damping=0.0) @ choice, momentum=Momentum(0.8))
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    mean, variance, r, m = torch.zeros(3), torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 4)
    for t in range(1, 6):
        x = batch(t)[:, :, 0]
        rho = min(0.5, 1 - 1 / t)
        variance = rho * variance + (1 - rho) * (x.var(0, correction=0) + rho * (x.mean(0) - mean) ** 2)
        mean = rho * mean + (1 - rho) * x.mean(0)
        P = torch.eye(4, dtype=torch.float64)  # on rows [b, w]
        P[0, 1:], P[1:, 1:] = -mean / variance.sqrt(), torch.diag(1 / variance.sqrt())
        error = 2 * (x @ W.T + b) / (len(x) * 2)
        g = torch.cat([error.sum(0)[:, None], error.T @ x], 1)
        y = g @ P
        r = 0.9 * r + 0.1 * y**2 if inner == "RMS" else r + y**2
        m = 0.8 * m + 0.2 * y
        D = (r / (1 - 0.9**t)).sqrt() + 1e-8 if inner == "RMS" else r.sqrt() + 1e-10
        new = torch.cat([b[:, None], W], 1) - 0.05 * (m / (1 - 0.8**t) / D) @ P.T
        b, W = new[:, 0], new[:, 1:]
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.bias.detach(), b, rtol=1e-9, atol=1e-11)


def weights_of_averages(t: int, beta: float, rho: float) -> tuple[Tensor, Tensor]:
    """The weights of y₁ … y_t in m̂, and of their squares in r̂."""
    age = torch.arange(t - 1, -1, -1, dtype=torch.float64)
    return (1 - beta) * beta**age / (1 - beta**t), (1 - rho) * rho**age / (1 - rho**t)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("outer", [BNP(), BNP(decay=0.0, damping=0.0), Whitening(every=3, observe_steps=2)], ids=str)
def test_adams_steps_in_the_outer_coordinates_are_bounded_while_these_move(outer, size, monkeypatch):
    """u = P₁⁻¹(step) obeys |uᵢ| = |m̂ᵢ|/√r̂ᵢ ≤ (Σwₛ²/vₛ)^½ (Cauchy–Schwarz), as where P₁ stands still.

    The units of a layer are often silent and its inputs often zero, so that many entries of r are zero until P₁ has moved; a
    momentum mapped by a newer P₁ than r takes steps of 1e5 and more here.
    """
    coordinates = []
    factors = Composition.factors

    def spied(self, state):
        F, N = factors(self, state)
        coordinates.append(copy.deepcopy(F))  # a refresh after the step writes into it
        return F, N

    monkeypatch.setattr(Composition, "factors", spied)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    lr, steps = 0.01, 25
    optimizer = PreconditionedGD(model, lr, preconditioner=outer @ RMS(0.99), momentum=Momentum(0.9), engine="loop")
    largest = 0.0
    for t in range(1, steps + 1):
        before = [p.detach().clone() for p in model.parameters()]
        coordinates.clear()
        optimizer.zero_grad()
        x = (torch.randn(size, 20, dtype=torch.float64) - 1).relu()
        nn.functional.cross_entropy(model(x), torch.randint(3, (size,))).backward()
        optimizer.step()
        w, v = weights_of_averages(t, 0.9, 0.99)
        bound = float((w.square() / v).sum().sqrt())
        moved = [(p.detach() - q) / lr for p, q in zip(model.parameters(), before, strict=True)]
        for F, step in zip(coordinates, zip(moved[::2], moved[1::2], strict=True), strict=True):
            u = max(float(x.abs().max()) for x in F.solve(tuple(t[None] for t in step)))  # a stack of one layer
            assert u <= bound * (1 + 1e-6)
            largest = max(largest, u / bound)
    assert largest > 0.9  # the bound is one that steps reach


def test_what_the_outer_map_does_not_handle_the_inner_one_takes_over():
    pair, plain = make(BNP() @ RMS()), make(RMS())
    for k, (model, optimizer) in enumerate((pair, plain)):
        optimizer.zero_grad()
        torch.manual_seed(k)
        model(batch(0)).square().mean().backward()
        optimizer.step()
    assert torch.equal(pair[0].norm.weight, plain[0].norm.weight)
    assert not torch.equal(pair[0].head.weight, plain[0].head.weight)
