"""Every engine takes the step of ``engine="loop"``, whatever the configuration, the gradients and the layout in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from contract.table import EVERY, OWN, TWINS, Twin, batches, closure, flat, net, rounding, train
from precond import RMS, SAM, GradientNorm, LossClosure, PreconditionedGD
from precond.optim.engine import loop

each = pytest.mark.parametrize("name", EVERY)
by_name = pytest.mark.parametrize("twin", TWINS, ids=str)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("gaps", [False, True], ids=["", "with gaps"])
@each
def test_auto_is_loop(name, gaps):
    ends = []
    for engine in ("auto", "loop"):
        model = net()
        optimizer = EVERY[name](model, engine=engine)
        for t, batch in enumerate(batches(8)):
            torch.manual_seed(t)
            run = closure(model, optimizer, batch)

            def gappy(run=run, model=model, t=t):
                loss = run()
                if gaps and t % 3:
                    model.conv.bias.grad = None
                if gaps and t % 2:
                    model.head.weight.grad = None
                return loss

            optimizer.step(gappy)
        ends.append(flat(model))
    assert relative(*ends) <= rounding(name)


LAYOUTS = {
    "channels last": (lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.contiguous()),
    "channels last gradients": (lambda t: t.contiguous(), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "transposed": (lambda t: t.contiguous().transpose(0, 1), lambda t: t.contiguous()),
    "with holes": (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t.contiguous()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@by_name
def test_layouts_in_memory(twin: Twin, layout: str):
    lay, lay_gradient = LAYOUTS[layout]
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 4, 3, 3), torch.randn(3, 4, 4, 3, 3)
    ends = []
    for make in (lambda p: twin.ours(p), lambda p: twin.theirs(p, foreach=False)):
        p = nn.Parameter(lay(start.clone()))
        optimizer = make([p])
        for g in gradients:
            p.grad = lay_gradient(g)
            optimizer.step()
        ends.append(p.detach().contiguous())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@by_name
def test_empty_one_element_and_0_dimensional_parameters(twin: Twin):
    ends = []
    for make in (lambda p: twin.ours(p), lambda p: twin.ours(p, engine="loop"), twin.theirs):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in [(0, 3), (), (1,), (1, 1), (2, 0)]]
        optimizer = make(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    for end in ends[:2]:
        torch.testing.assert_close(end, ends[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("regularizer", [SAM(0.1), GradientNorm(0.01), SAM(0.1, space="p")], ids=str)
def test_dtypes_may_be_mixed(regularizer):
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float64, torch.float32, torch.bfloat16)]
    options = {"max_norm": 1.0, "nonfinite": "raise", "rounding": "kahan"}
    optimizer = PreconditionedGD(params, lr=0.1, preconditioner=RMS(), regularizers=[regularizer], **options)
    with pytest.warns(UserWarning, match="given parameters"):
        optimizer.step(LossClosure(lambda: sum((p.double() ** 2).sum() for p in params)))
    assert [p.dtype for p in params] == [torch.float64, torch.float32, torch.bfloat16]
    assert all((p < 1).all() for p in params) and optimizer.last.grad_norm > 0
    assert torch.allclose(params[0].float(), params[1], rtol=1e-6)


@by_name
def test_gradients_are_left_alone(twin: Twin):
    model = net()
    optimizer = twin.ours(model)
    for batch in batches(2):
        closure(model, optimizer, batch)()
        kept = [p.grad for p in model.parameters()]
        clean = [g.clone() for g in kept]
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(model.parameters(), kept, clean, strict=True))


@pytest.mark.parametrize("space", ["z", "p"])
@pytest.mark.parametrize("recipe", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
def test_a_clipped_recipe_is_torch_after_clip_grad_norm(recipe, space):
    (twin, *_) = [t for t in TWINS if t.recipe == recipe]
    ends = []
    for ours in (True, False):
        model = net()
        optimizer = twin.ours(model, max_norm=0.3, norm_space=space) if ours else twin.theirs(model.parameters())
        for t, batch in enumerate(batches(8)):
            torch.manual_seed(t)
            closure(model, optimizer, batch)()
            if not ours:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                assert norm > 0.3  # or nothing is tested
            optimizer.step()
        ends.append(flat(model))
    same = relative(*ends) <= 1e-12
    assert same == (space == "p" or recipe == "sgd")


@pytest.mark.parametrize("name", OWN)
def test_params_may_be_given_in_any_form(name):
    forms = {
        "module": lambda m: m,
        "groups of modules": lambda m: [{"params": m.conv}, {"params": [*m.norm.named_parameters(prefix="norm")]}, {"params": m.head}],
        "named": lambda m: m.named_parameters(),
        "list": lambda m: list(m.parameters()),
    }  # fmt: skip
    # What routes by name, observes inputs or draws random numbers twice needs more than a list.
    needs_model = "bnp" in name.lower() or "whitening" in name or "auto" in name or "SAM" in name or "gradient norm" in name
    needs_names = "route" in name
    ends = {}
    for form, give in forms.items():
        if (form in ("named", "list") and needs_model) or (form == "list" and needs_names):
            continue
        model = net()
        train(model, OWN[name](give(model)), batches(4))
        ends[form] = flat(model)
    assert len(ends) >= 2 and all(relative(end, ends["module"]) <= rounding(name) for end in ends.values())


def test_a_kernel_that_does_not_fit_is_refused():
    assert precond.adamw(net(), engine="fused")._kernels() is not None
    with pytest.raises(ValueError, match="no kernel"):
        precond.adamw(net(), engine="fused", max_norm=1.0)


class Mixed(nn.Module):
    """Layers that kernels take, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 2, 3), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(torch.tanh(self.down(x)))).mean(-1))


@pytest.mark.parametrize("how", ["transposed layer", "a bias without gradient", "another decay", "one learning rate of two"])
@pytest.mark.parametrize("recipe", ["auto", "bnp", "whitening"])
def test_one_layer_without_a_kernel_leaves_the_others_theirs(recipe, how, monkeypatch):
    """Such a layer takes the reference engine's step, the others their kernels', to the numbers of the reference engine for all."""
    asked = []
    monkeypatch.setattr(
        loop,
        "step",
        lambda point, *rest, step=loop.step, **more: (asked.append(len(point.cells)), step(point, *rest, **more))[1],
    )
    ends, counts = [], []
    for engine in ("auto", "loop"):
        torch.manual_seed(0)
        model = Mixed().double()
        groups = [{"params": model.down, "weight_decay": 0.3}, {"params": model.up}, {"params": model.head}]
        if how == "one learning rate of two":
            weight, bias = model.down.named_parameters()
            groups = [{"params": [weight], "lr": 0.02}, {"params": [bias]}, *groups[1:]]
        optimizer = getattr(precond, recipe)(model if how == "transposed layer" else groups, lr=0.01, engine=engine)
        asked.clear()
        for t in range(5):
            optimizer.zero_grad()
            x = torch.randn(6, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
            if how == "a bias without gradient":
                model.down.bias.grad = None
            optimizer.step()
        ends.append(flat(model))
        counts.append(list(asked))
    assert relative(*ends) <= 1e-9
    assert max(counts[0], default=0) < min(counts[1])  # none, where Adam's kernel runs in the coordinates of any map
