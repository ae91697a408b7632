"""Which forwards count: accumulation, checkpointing, autocast, compilation, evaluation, second passes; and their precision."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from inputs.layers import data
from precond import BNP, SAM, GradientNorm, LossClosure, PreconditionedGD
from precond.observing import unwatched

torch.set_num_threads(1)
X = data(12, 4)


class Net(nn.Module):
    """A stem, a body that may be checkpointed, and a head."""

    def __init__(self, wrap: Callable[[nn.Module, Tensor], Tensor] = lambda body, x: body(x)):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Dropout(0.3))
        self.head = nn.Linear(5, 2)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wrap(self.body, self.stem(x).tanh()).tanh())


def make(wrap=None, **options) -> tuple[Net, PreconditionedGD]:
    torch.manual_seed(0)
    model = (Net() if wrap is None else Net(wrap)).double()
    return model, PreconditionedGD(model, lr=0.1, preconditioner=BNP(**options))


def step(model: Net, optimizer: PreconditionedGD, x: Tensor = X) -> None:
    torch.manual_seed(1)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def check_same(a, b, exact: bool = True) -> None:
    """All parameters and all state; ``activity`` is measured against what a single forward shows, and need not add up."""
    (model, optimizer), (model_, optimizer_) = a, b
    within = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-13}
    for p, q in zip(model.parameters(), model_.parameters(), strict=True):
        torch.testing.assert_close(p, q, **within)
        for key, value in optimizer.state[p].items():
            if exact or key != "activity":
                torch.testing.assert_close(value, optimizer_.state[q][key], **within)


def plain(steps: int = 2) -> tuple[Net, PreconditionedGD]:
    model, optimizer = make()
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


# --- forwards that run twice, or not at all -------------------------------------------------------------------------------


def rerun(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda body, x: checkpoint(body, x, use_reentrant=reentrant)


def nested(outer: bool, inner: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda body, x: checkpoint(lambda h: body[2:](checkpoint(body[:2], h, use_reentrant=inner)), x, use_reentrant=outer)


def saved(body: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(body, x, use_reentrant=False)


ONCE = {
    "non-re-entrant": rerun(False),
    "sequential": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=False),
    "under saved tensor hooks": saved,
}
OTHERS = {
    "non-re-entrant, nested": nested(False, False),
    "re-entrant": rerun(True),
    "re-entrant, nested": nested(True, True),
    "re-entrant around non-re-entrant": nested(True, False),
    "non-re-entrant around re-entrant": nested(False, True),
    "sequential, re-entrant": lambda body, x: checkpoint_sequential(body, 2, x, use_reentrant=True),
}


@pytest.mark.parametrize("wrap", [*ONCE.values(), *OTHERS.values()], ids=[*ONCE, *OTHERS])
def test_checkpointing_counts_each_forward_once(wrap):
    model, optimizer = make(wrap)
    for _ in range(2):
        step(model, optimizer)
    check_same((model, optimizer), plain())
    assert optimizer.state[model.body[0].weight]["count"].item() == 24


@pytest.mark.parametrize("wrap", ONCE.values(), ids=ONCE)
def test_a_look_without_gradients_is_not_taken_for_a_first_pass(wrap):
    """What re-entrant checkpointing does first looks just like it, and is counted when it is repeated."""
    model, optimizer = make(wrap)
    for _ in range(2):
        with torch.no_grad():
            model(100 * X)
        step(model, optimizer)
    check_same((model, optimizer), plain())


@pytest.mark.parametrize("wrap", [None, rerun(True), rerun(False)], ids=["plain", "re-entrant", "non-re-entrant"])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (1, 5, 6)], ids=str)
def test_accumulated_batches_are_one_batch(sizes, wrap):
    """Gradients add up; so do counts, sums and sums of squares, and M is applied once."""
    whole, parts = make(wrap, damping=0.0), make(wrap, damping=0.0)
    for model, _ in (whole, parts):
        model.body[3].p = 0.0
    for _ in range(2):
        step(*whole)
        model, optimizer = parts
        optimizer.zero_grad()
        for x in X.split(list(sizes)):
            (model(x).square().mean() * len(x) / len(X)).backward()
        optimizer.step()
    check_same(whole, parts, exact=False)


@contextlib.contextmanager
def _eval(model: nn.Module):
    model.eval()
    yield
    model.train()


UNSEEN = {
    "eval": _eval,
    "no_grad": lambda model: torch.no_grad(),
    "inference": lambda model: torch.inference_mode(),
    "unwatched": lambda model: unwatched(),
}


@pytest.mark.parametrize("context", UNSEEN.values(), ids=UNSEEN)
def test_forwards_that_do_not_train_are_not_seen(context):
    reference = plain()
    model, optimizer = make()
    for _ in range(2):
        with context(model):
            model(100 * X)
        step(model, optimizer)
        with context(model):
            model(100 * X)
    check_same((model, optimizer), reference)


def test_frozen_part_in_eval_mode_is_not_seen_and_the_rest_is():
    model, optimizer = make()
    model.body.eval()
    step(model, optimizer)
    counts = [optimizer.state[layer.weight]["count"].item() for layer in (model.stem, model.body[0], model.head)]
    assert counts == [12, 0, 12]


def test_transforms_of_torch_func_are_not_seen():
    """Their tensors must not leave them: the next step would raise."""
    reference = plain()
    model, optimizer = make()
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        params = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda params, x, model=model: torch.func.functional_call(model, params, (x,)).sum()  # noqa: E731
        torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(params, X)
        torch.func.jacrev(loss)(params, X)
        step(model, optimizer)
    check_same((model, optimizer), reference)


def test_an_empty_batch_shows_nothing():
    model, optimizer = make()
    for _ in range(2):
        torch.manual_seed(1)
        optimizer.zero_grad()
        (model(X).square().mean() + model(X[:0]).sum()).backward()
        optimizer.step()
    check_same((model, optimizer), plain())


def test_shallow_copies_of_a_module_are_not_seen():
    """nn.DataParallel's replicas share the hooks of what they replicate."""
    model = nn.Linear(4, 2).double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP())
    replica = model._replicate_for_data_parallel()
    replica.weight, replica.bias = model.weight, model.bias
    (replica(X).sum() + model(X).sum()).backward()
    optimizer.step()
    assert optimizer.state[model.weight]["count"].item() == 12


# --- compilation ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["model", "compiled"])
def test_compiled_models_are_seen(given, backend, fresh_compiler):
    torch.manual_seed(0)
    model = Net().double()
    model.body[3].p = 0.0
    compiled = torch.compile(model, backend=backend)
    optimizer = PreconditionedGD(model if given == "model" else compiled, lr=0.1, preconditioner=BNP())
    other = make()
    other[0].body[3].p = 0.0
    for _ in range(3):
        step(compiled, optimizer)
        step(*other)
    check_same((model, optimizer), other, exact=False)
    assert optimizer.state[model.body[0].weight]["count"].item() == 36
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == [n for n, _ in model.named_parameters()]


def test_a_model_compiled_and_called_before_is_warned_of(fresh_compiler):
    torch.manual_seed(0)
    model = Net().double()
    compiled = torch.compile(model, backend="eager")
    compiled(X).sum().backward()
    optimizer = PreconditionedGD(compiled, lr=0.1, preconditioner=BNP())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(compiled, optimizer)
    seen = optimizer.state[model.stem.weight]["count"].item() == 12
    assert seen or any("compiled and called before" in str(w.message) for w in caught)
    assert not seen or not caught


# --- precision --------------------------------------------------------------------------------------------------------------


def moments_of(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    optimizer = PreconditionedGD(layer, lr=0.0, preconditioner=BNP())
    layer(x).float().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["mean"].dtype == torch.float32
    return state["mean"][0], state["variance"][0]


LAYERS = {"linear": (lambda: nn.Linear(3, 2), 1), "channel": (lambda: nn.Conv1d(3, 2, 1), 5)}


@pytest.mark.parametrize(("layer", "positions"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("dtype", "mean", "std", "tolerance"),
    [
        (torch.float32, 1e4, 1.0, 1e-3),  # one pass about zero gives 120 in place of 1
        (torch.float16, 300.0, 20.0, 1e-2),  # 300² overflows
        (torch.bfloat16, 300.0, 20.0, 1e-2),
    ],
    ids=str,
)
def test_moments_of_narrow_and_far_inputs(layer, positions, dtype, mean, std, tolerance):
    x = torch.randn(4000 // positions, 3, positions, generator=torch.Generator().manual_seed(0)) * std + mean
    x = x.to(dtype)
    exact = x.double().transpose(0, 1).flatten(1)
    module = layer().to(dtype)
    mu, variance = moments_of(x[..., 0] if positions == 1 else x, module)
    torch.testing.assert_close(mu.double(), exact.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(1, correction=0), rtol=tolerance, atol=0)


def test_accumulated_moments_of_far_inputs():
    """Pooling batches whose mean is 1e4 times their deviation must not cancel."""
    layer = nn.Linear(2, 1)
    optimizer = PreconditionedGD(layer, lr=0.0, preconditioner=BNP())
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    for part in x.split(100):
        layer(part).sum().backward()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[layer.weight]["variance"][0].double(), x.double().var(0, correction=0), rtol=1e-3, atol=0
    )


class Mixed(nn.Module):
    """Inputs that arrive in half precision under autocast, also at the attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.conv = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(4, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.stem(x)
        h, _ = self.attention(h, h, h, attn_mask=mask, need_weights=False)
        return self.conv(h.movedim(0, 2))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("conv", ["channel", "patch"])
def test_autocast_inputs_are_reduced_in_float32(conv, mask):
    x = data(6, 2, 4).float()
    if mask is not None:
        causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
        mask = causal if mask == "bool" else torch.zeros(6, 6).masked_fill(causal, -torch.inf)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(conv=conv))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(x, mask).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append({name: optimizer.state[p] for name, p in model.named_parameters() if "mean" in optimizer.state[p]})
    assert set(found[0]) == {"stem.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"}
    for name, wide in found[0].items():
        narrow = found[1][name]
        assert narrow["mean"].dtype == torch.float32
        assert torch.equal(narrow["count"], wide["count"])
        scale = wide["variance"].max().sqrt().item()
        torch.testing.assert_close(narrow["mean"], wide["mean"], rtol=2e-2, atol=2e-2 * scale)
        torch.testing.assert_close(narrow["variance"], wide["variance"], rtol=4e-2, atol=4e-2 * scale**2)
    # The stem sees float32 inputs in both runs.
    assert torch.equal(found[0]["stem.weight"]["variance"], found[1]["stem.weight"]["variance"])


# --- second passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closure", "loss closure", "probe"])
@pytest.mark.parametrize(
    "regularizer",
    [SAM(0.5), SAM(0.5, space="p"), GradientNorm(0.1), GradientNorm(0.1, method="central", space="p")],
    ids=["SAM in z", "SAM in p", "gradient norm in z", "central, in p"],
)
def test_second_passes_are_not_seen(regularizer, how):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(), regularizers=[regularizer])
    passes = []
    model.head.register_forward_hook(lambda *_: passes.append(1))
    loss = lambda: model(X).square().mean()  # noqa: E731

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(2):
        with torch.no_grad():
            hidden = model.stem(X).tanh()
        if how == "probe":
            closure()
            while optimizer.probe():
                loss().backward()
            optimizer.step()
        else:
            optimizer.step(closure if how == "closure" else LossClosure(loss))
    assert len(passes) == 2 * (3 if "central" in repr(regularizer) else 2)
    assert optimizer.state[model.stem.weight]["count"].item() == 24
    # The statistics are those of the unperturbed points: the newest batch's hidden inputs have the weight 1/2.
    state = optimizer.state[model.body[0].weight]
    old = 2 * state["mean"][0] - hidden.mean(0)
    torch.manual_seed(0)
    torch.testing.assert_close(old, Net().double().stem(X).tanh().mean(0).detach(), rtol=1e-9, atol=1e-9)


def test_a_probe_that_was_given_up_leaves_the_next_forward_seen():
    torch.manual_seed(0)
    model = Net().double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(), regularizers=[GradientNorm(0.1)])
    model(X).sum().backward()
    assert optimizer.probe()
    optimizer.restore()
    model(X).sum().backward()
    while optimizer.probe():
        model(X).sum().backward()
    optimizer.step()
    assert optimizer.state[model.stem.weight]["count"].item() == 24


def test_a_closure_that_raised_and_is_called_again_counts_once():
    torch.manual_seed(0)
    model = Net().double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(), regularizers=[GradientNorm(0.1)])
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    with pytest.raises(InterruptedError):
        optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.state[model.stem.weight]["count"].item() == 12
