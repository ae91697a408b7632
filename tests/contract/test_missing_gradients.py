"""A parameter whose ``.grad`` is None is left as it is, and what is stepped jointly with it steps as if it were frozen for that step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from contract.table import EVERY, OWN, batches, closure, net, rounding
from precond import BNP, EMA, RMS, Auto, Fixed, Momentum, Polar, PreconditionedGD, Whitening
from precond.optim.engine import plan

NAMES = ["conv.weight", "conv.bias", "head.weight", "head.bias"]
OBSERVING = [n for n in OWN if any(word in n.lower() for word in ("bnp", "whitening", "auto"))]
"""Those that step a weight and its bias jointly, of which engines have something of their own."""
each = pytest.mark.parametrize(("name", "engine"), [*((n, "auto") for n in EVERY), *((n, "loop") for n in OBSERVING)])
engines = pytest.mark.parametrize("engine", ["auto", "loop"])


def known(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}


def same(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def driven(model: nn.Module, optimizer: PreconditionedGD, batch: Any, lacks: nn.Parameter | None) -> None:
    """A step with one gradient, or more, in each of which ``lacks`` has none."""

    def run():
        loss = closure(model, optimizer, batch)()
        if lacks is not None:
            lacks.grad = None
        return loss

    torch.manual_seed(7)
    optimizer.step(run)


@pytest.mark.parametrize("lacking", NAMES)
@each
def test_it_is_left_as_it_is_and_the_rest_steps_as_if_it_were_frozen(name: str, lacking: str, engine: str) -> None:
    """Values and state of both are compared after each step: with what was before, and with a twin that is frozen and thawed."""
    models = net(), net()
    ours, twin = (EVERY[name](model, engine=engine) for model in models)
    p, q = (model.get_parameter(lacking) for model in models)
    for t, batch in enumerate(batches(5)):
        gap, before = t > 2, (p.detach().clone(), known(ours, p))
        q.requires_grad_(not gap)
        driven(models[0], ours, batch, p if gap else None)
        driven(models[1], twin, batch, None)
        if gap:
            same((p.detach(), known(ours, p)), before)
        found = [[(x.detach(), known(o, x)) for x in model.parameters()] for model, o in zip(models, (ours, twin), strict=True)]
        same(*found, rtol=1e3 * rounding(name), atol=1e3 * rounding(name))


class Layers(nn.Module):
    """Layers of several matrices, of groups of inputs, of turned weights, and of one shape many times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.alike = nn.Sequential(*(nn.Linear(5, 5) for _ in range(9)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.tanh(self.conv(x))).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.alike(self.recurrent(h)[0])


SEEN = Whitening(root="cholesky", observe_steps=100)  # in each step, whatever the number of a layer's steps
# ε: the gradient of a bias is here and there rounding noise, as of attention's keys, by whose size Adam would divide it.
RECIPES: dict[str, Callable[..., PreconditionedGD]] = {
    "bnp": lambda m, **more: precond.bnp(m, 0.01, momentum=0.9, weight_decay=0.1, **more),
    "whitening": lambda m, **more: precond.whitening(m, 0.01, weight_decay=0.1, eps=1e-3, inputs=SEEN, **more),
    "kfac": lambda m, **more: PreconditionedGD(
        m, 0.01, preconditioner=SEEN @ precond.OutputFactor(), momentum=Momentum(0.9), **more
    ),
    "muon": lambda m, **more: precond.muon(m, 0.01, inputs=BNP(), **more),
    "auto": lambda m, **more: precond.auto(
        m, 0.01, choice=Auto(whitening=SEEN, rms=RMS(0.999, eps=1e-3), polar=Polar(3)), **more
    ),
}
PARAMETERS = [name for name, _ in Layers().named_parameters() if not name.startswith("alike") or name.startswith("alike.4")]


@engines
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lacking", PARAMETERS)
def test_layers_of_all_kinds(lacking: str, recipe: str, engine: str) -> None:
    def run(how: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = Layers().double()
        optimizer, p = RECIPES[recipe](model, engine=engine), model.get_parameter(lacking)
        for t in range(5):
            x = torch.randn(6, 4, 9, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            before = p.detach().clone(), known(optimizer, p)
            p.requires_grad_(how == "None" or t not in (1, 2))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if t in (1, 2):
                p.grad = None
            optimizer.step()
            if t in (1, 2):
                same((p.detach(), known(optimizer, p)), before)
        return [p.detach() for p in model.parameters()]

    same(run("None"), run("frozen"), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lacking", ["conv.bias", "head.bias", "head.weight"])
@pytest.mark.parametrize("name", OBSERVING)
def test_engines_agree_where_gradients_alternate(name: str, lacking: str) -> None:
    ends = []
    for engine in ("auto", "loop"):
        model = net()
        optimizer = OWN[name](model, engine=engine)
        for t, batch in enumerate(batches(14)):
            driven(model, optimizer, batch, model.get_parameter(lacking) if t % 2 else None)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= rounding(name) * ends[1].norm()


def _scaled(model: nn.Module, optimizer: PreconditionedGD, x: Tensor, p: nn.Parameter, gap: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    if gap:
        p.grad = None
    scaler.step(optimizer)
    scaler.update()


def _accumulated(model: nn.Module, optimizer: PreconditionedGD, x: Tensor, p: nn.Parameter, gap: bool) -> None:
    """Two micro-batches, of which the first gives ``p`` none; in a gap neither does."""
    optimizer.zero_grad()
    for k, part in enumerate(x.chunk(2)):
        model(part).square().mean().backward()
        if gap or not k:
            p.grad = None
        optimizer.explain()


def _then_step(model: nn.Module, optimizer: PreconditionedGD, x: Tensor, p: nn.Parameter, gap: bool) -> None:
    _accumulated(model, optimizer, x, p, gap)
    optimizer.step()


def _probed(model: nn.Module, optimizer: PreconditionedGD, x: Tensor, p: nn.Parameter, gap: bool) -> None:
    optimizer.zero_grad()
    while True:
        model(x).square().mean().backward()
        if gap:
            p.grad = None
        if not optimizer.probe():
            break
    optimizer.step()


DRIVEN: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "scaler": (_scaled, {}),
    "accumulation": (_then_step, {}),
    "probe of SAM": (_probed, {"regularizers": [precond.SAM(0.05)]}),
    "probe of a gradient norm": (_probed, {"regularizers": [precond.GradientNorm(1e-3, method="central")]}),
    "an average of the weights": (_then_step, {"average": EMA(0.5)}),
}


@pytest.mark.parametrize("lacking", ["0.weight", "0.bias"])
@pytest.mark.parametrize("recipe", ["bnp", "whitening", "auto"])
@pytest.mark.parametrize("how", DRIVEN)
def test_however_gradients_come(how: str, recipe: str, lacking: str) -> None:
    drive, options = DRIVEN[how]
    ends = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer, p = RECIPES[recipe](model, **options), model.get_parameter(lacking)
        for t in range(6):
            gap = t in (2, 3)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            before = p.detach().clone(), known(optimizer, p)
            p.requires_grad_(not (frozen and gap))
            drive(model, optimizer, x, p, gap)
            if gap:
                same((p.detach(), known(optimizer, p)), before)
        ends.append([q.detach().clone() for q in model.parameters()])
        if "average" in options and not frozen:
            with optimizer.averaged():
                assert not torch.equal(p.detach(), ends[0][[n for n, _ in model.named_parameters()].index(lacking)])
    same(*ends, rtol=1e-9, atol=1e-11)


def _copied(model: nn.Module, optimizer: PreconditionedGD, make: Callable[..., PreconditionedGD]) -> Any:
    model, optimizer = copy.deepcopy((model, optimizer))
    if optimizer.observes:
        optimizer.watch(model)
    return model, optimizer


def _pickled(model: nn.Module, optimizer: PreconditionedGD, make: Callable[..., PreconditionedGD]) -> Any:
    precond.unhook(model)
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    if optimizer.observes:
        optimizer.watch(model)
    return model, optimizer


def _after_a_norm() -> nn.Module:
    """What is no layer comes first among the parameters, and last in what preconditioners make of them."""
    return nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _saved(model: nn.Module, optimizer: PreconditionedGD, make: Callable[..., PreconditionedGD]) -> Any:
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    model = _after_a_norm()
    model.load_state_dict(of_model)
    optimizer = make(model)
    optimizer.load_state_dict(of_optimizer)
    return model, optimizer


@pytest.mark.parametrize("resumed", [_saved, _copied, _pickled])
@pytest.mark.parametrize("more", [{}, {"average": EMA(0.5)}, {"regularizers": [precond.SAM(0.05)]}], ids=["", "average", "SAM"])
@pytest.mark.parametrize("lacking", ["1.weight", "1.bias"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_in_between(recipe: str, lacking: str, more: dict[str, Any], resumed: Callable[..., Any]) -> None:
    """Bit for bit as if never stopped, right after a gap and within one; norms are of the parts in the same order."""

    def run(when: int | None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        make = lambda m: RECIPES[recipe](m, **more)  # noqa: E731
        model = _after_a_norm()
        optimizer = make(model)
        for t in range(8):
            if t == when:
                model, optimizer = resumed(model, optimizer, make)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            _probed(model, optimizer, x, model.get_parameter(lacking), t in (2, 3, 5))
        return [p.detach() for p in model.parameters()], optimizer.state_dict()["state"]

    never = run(None)
    for when in (3, 4, 6):
        same(run(when), never)


@pytest.mark.parametrize("how", ["frozen", "no gradient"])
@pytest.mark.parametrize(("gaps", "at"), [((0, 1), 3), ((2, 3, 4), 3)], ids=["after gaps", "within gaps"])
@pytest.mark.parametrize("lacking", ["2.weight", "2.bias"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_where_one_of_many_alike_has_made_fewer_steps(
    recipe: str, lacking: str, gaps: tuple[int, ...], at: int, how: str
) -> None:
    """Bit for bit: it is not put side by side with the others, whose statistics are divided by other weights, nor left in their memory."""

    def run(resumes: bool) -> list[Tensor]:
        fresh = lambda: nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(5, 5), nn.Tanh()))).double()  # noqa: E731
        torch.manual_seed(0)
        model = fresh()
        optimizer = RECIPES[recipe](model)
        for t in range(6):
            if resumes and t == at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = fresh()
                optimizer = RECIPES[recipe](model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            p, gap = model.get_parameter(lacking), t in gaps
            p.requires_grad_(not (gap and how == "frozen"))
            optimizer.zero_grad()
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            model(x).square().mean().backward()
            if gap:
                p.grad = None
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    same(run(True), run(False))


@pytest.mark.parametrize("how", ["frozen", "no gradient"])
@pytest.mark.parametrize("order", [("weight", "bias"), ("bias", "weight")], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_one_plan_kept_is_gone_when_another_takes_over(recipe: str, order: tuple[str, ...], how: str) -> None:
    """Of a weight and its bias first one is stepped alone, then the other, then both: what is saved is loaded, and is what both keep."""

    def fresh() -> tuple[nn.Module, PreconditionedGD]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3).double()
        return layer, RECIPES[recipe](layer)

    def step(layer: nn.Module, optimizer: PreconditionedGD, left_out: str | None) -> None:
        for name, p in layer.named_parameters():
            p.requires_grad_(how != "frozen" or name != left_out)
        optimizer.zero_grad()
        layer(torch.randn(8, 4).double()).square().mean().backward()
        if left_out is not None:
            layer.get_parameter(left_out).grad = None
        optimizer.step()

    layer, optimizer = fresh()
    for left_out in (*order, None):
        step(layer, optimizer, left_out)
    _, other = fresh()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    untroubled, always = fresh()
    step(untroubled, always, None)
    keys = [[set(entries) for entries in o.state_dict()["state"].values()] for o in (optimizer, other, always)]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_parameter_that_comes_late_is_probed_by_its_first_gradient_and_the_others_by_what_was_known(engine: str) -> None:
    """Whether they are stepped by one call or, as two groups, by two."""

    def run(groups: Callable[..., Any]) -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
        optimizer = precond.adamw(groups(a, b), lr=0.1, eps=1e-3, regularizers=[precond.SAM(0.5)], engine=engine)
        for t in range(4):
            optimizer.zero_grad()
            while True:
                (a.sin().sum() + (t != 0) * (a * b.cos()).sum()).backward()
                if t == 0:
                    b.grad = None
                if not optimizer.probe():
                    break
            optimizer.step()
        return len(optimizer.cells), [a.detach(), b.detach()]

    (one, joint), (two, apart) = run(lambda *p: p), run(lambda *p: [{"params": [q]} for q in p])
    assert (one, two) == (1, 2)
    same(joint, apart, atol=1e-14)


def _linear(**more: Any) -> tuple[nn.Linear, PreconditionedGD]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    return layer, precond.whitening(layer, 0.01, **more)


def _step(layer: nn.Module, optimizer: PreconditionedGD, *lacking: nn.Parameter) -> None:
    optimizer.zero_grad()
    layer(torch.randn(8, next(layer.parameters()).shape[1])).square().mean().backward()
    for p in lacking:
        p.grad = None
    optimizer.step()


def test_it_is_told() -> None:
    layer, optimizer = _linear()
    _step(layer, optimizer)
    _step(layer, optimizer, layer.bias)
    assert [row.preconditioner for row in optimizer.explain().rows][1] == "none (no gradient)"
    P = optimizer.map()
    same(P.mv((torch.zeros(2, 3), torch.ones(2)))[1], torch.ones(2))
    _step(layer, optimizer)
    assert "none" not in str(optimizer.explain())


def test_a_layer_without_any_gradient_waits_as_it_was() -> None:
    """Its last step was one without a bias; what its weight has learned since is still there, and nothing is made anew."""
    layer, optimizer = _linear()
    _step(layer, optimizer)
    _step(layer, optimizer, layer.bias)
    cells = list(optimizer.cells)
    _step(layer, optimizer, layer.weight, layer.bias)
    assert all(x is y for x, y in zip(cells, optimizer.cells, strict=True))
    assert [float(optimizer.state[p]["step"]) for p in layer.parameters()] == [2, 1]


def test_looking_between_two_backwards_changes_nothing() -> None:
    layer, optimizer = _linear()
    _step(layer, optimizer)
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), None
    before = [known(optimizer, p) for p in layer.parameters()]
    optimizer.explain(), optimizer.map(), optimizer.state_dict()
    assert "none" not in str(optimizer.explain())
    same([known(optimizer, p) for p in layer.parameters()], before)


def _averaged(model: nn.Module, optimizer: PreconditionedGD) -> None:
    with optimizer.averaged():
        pass


LOOKS: dict[str, Callable[[nn.Module, PreconditionedGD], Any]] = {
    "explain": lambda model, optimizer: optimizer.explain(),
    "map": lambda model, optimizer: optimizer.map(),
    "state_dict": lambda model, optimizer: optimizer.state_dict(),
    "a forward": lambda model, optimizer: model(torch.ones(2, 5).double()),
    "averaged": _averaged,
    "a copy": lambda model, optimizer: _copied(model, optimizer, precond.auto),
    "saved and loaded": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@engines
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("look", LOOKS)
def test_what_is_frozen_for_a_look_is_stepped_as_if_it_had_not_been(look: str, recipe: str, frozen: str, engine: str) -> None:
    """Bit for bit, and so is what is saved while it is frozen: the optimizer's state is that of the last step."""

    def run(look: Callable[..., Any] | None) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = RECIPES[recipe](model, average=EMA(0.5), engine=engine)
        for t in range(6):
            if t == 3 and look is not None:
                p, before = model.get_parameter(frozen), copy.deepcopy(optimizer.state_dict()["state"])
                p.requires_grad_(False)
                model, optimizer = look(model, optimizer) or (model, optimizer)
                same(optimizer.state_dict()["state"], before)
                model.get_parameter(frozen).requires_grad_(True)
            optimizer.zero_grad()
            model(torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).double()).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], optimizer.state_dict()["state"]

    def then_none(model: nn.Module, optimizer: PreconditionedGD) -> Any:
        found = LOOKS[look](model, optimizer)
        return found if isinstance(found, tuple) else None

    same(run(then_none), run(None))


@engines
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bias_goes_on_where_its_weight_is_frozen_and_then_thawed_without_a_gradient(recipe: str, engine: str) -> None:
    """As if it had stayed frozen, or had only lacked its gradient: bit for bit."""

    def run(how: str) -> Any:
        torch.manual_seed(0)
        layer = nn.Linear(5, 4).double()
        optimizer = RECIPES[recipe](layer, engine=engine)
        for t in range(7):
            layer.weight.requires_grad_(not (how == "frozen" and t in (2, 3, 4)) and not (how == "thawed" and t in (2, 3)))
            optimizer.zero_grad()
            layer(torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).double()).square().mean().backward()
            if t in (2, 3, 4):
                layer.weight.grad = None
            optimizer.step()
            if t == 4:
                assert optimizer.state[layer.bias]["step"] in (3, 5)  # of its own, where other statistics step it alone
        return [p.detach() for p in layer.parameters()], optimizer.state_dict()["state"]

    same(run("thawed"), run("frozen"))
    same(run("thawed"), run("no gradient"))


def test_what_is_written_into_the_state_after_a_look_counts() -> None:
    """Also where the look has put it side by side with others."""
    ends = []
    for look in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
        optimizer = precond.bnp(model, momentum=0.9)
        _step(model, optimizer)
        model[3].weight.requires_grad_(False)
        if look:
            optimizer.explain()
        for entries in optimizer.state.values():
            entries["momentum_buffer" if "momentum_buffer" in entries else "m"].fill_(1.0)
        model[3].weight.grad = None
        torch.manual_seed(1)
        _step(model, optimizer)
        ends.append([p.detach() for p in model.parameters()])
    same(*ends)


def test_no_more_is_planned_anew_than_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias whose gradient comes every other step; steps with the gradients of the step before plan nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    optimizer, planned = precond.auto(model), []
    build = plan.build

    def noted(leaves: Any, live: Any, *more: Any) -> Any:
        planned.append(list(live))
        return build(leaves, live, *more)

    monkeypatch.setattr(plan, "build", noted)
    counts = []
    for t in range(8):
        planned.clear()
        _step(model, optimizer, *([model[2].bias] if t in (1, 3, 4, 6) else []))
        counts.append(sum(map(len, planned)))
    assert counts == [0, 1, 2, 1, 0, 2, 1, 2]
    assert all(set(live) <= {4, 5} for live in planned)


def test_what_acts_on_all_parameters_at_once() -> None:
    """Whatever has no part of its own for fewer parameters says so as for a frozen one."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    optimizer = PreconditionedGD(params, 0.1, preconditioner=Fixed(precond.Dense(torch.ones(3, 3))))
    params[0].grad = torch.ones(2)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
