"""Which forwards count: accumulation, checkpointing, evaluation, second passes."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from inputs.layers import data
from precond import BNP, SAM, GradientNorm, LossClosure, PreconditionedGD, Whitening
from precond.optim.inputs.watching import unwatched

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


def check_same(a, b, exact: bool = True, rtol: float = 1e-12) -> None:
    """All parameters and all state."""
    (model, optimizer), (model_, optimizer_) = a, b
    within = {"rtol": 0, "atol": 0} if exact else {"rtol": rtol, "atol": 0.1 * rtol}
    for p, q in zip(model.parameters(), model_.parameters(), strict=True):
        torch.testing.assert_close(p, q, **within)
        for key, value in optimizer.state[p].items():
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
    whole, parts = make(wrap), make(wrap)
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


LENT = {
    "a teacher's": (lambda p: p.detach().clone(), False),
    "a teacher's parameters": (lambda p: nn.Parameter(p.detach().clone(), requires_grad=False), False),
    "an inner loop's": (lambda p: p.detach().clone().requires_grad_(), False),
    "its own": (lambda p: p, True),
    "computed of its own": (lambda p: 0.5 * p, True),
}


@pytest.mark.parametrize("clears", ["before", "between", "after"])
@pytest.mark.parametrize("weights, counts", LENT.values(), ids=LENT)
def test_a_forward_with_weights_that_are_not_the_optimizers_does_not_count(weights, counts, clears):
    """A mean teacher by functional_call, with gradients on; where zero_grad() stands decides nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP())
    for _ in range(3):
        lent = {name: weights(p) for name, p in model.named_parameters()}
        if clears == "before":
            optimizer.zero_grad()
        of_others = torch.func.functional_call(model, lent, (10 * X,))
        if clears == "between" and not counts:
            optimizer.zero_grad()
        loss = (model(X) - (of_others if counts else of_others.detach())).square().mean()
        if clears == "after":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clears == "between" and counts:
            optimizer.zero_grad()
    state = optimizer.state[model[0].weight]
    assert state["count"].item() == 3 * len(X) * (2 if counts else 1)
    if not counts:
        torch.testing.assert_close(state["mean"][0], X.mean(0), rtol=1e-12, atol=1e-13)


class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(4, 4) for _ in range(4)))
        self[3].weight = self[1].weight


FAST = {"of its own": lambda p: p - 0.1 * p.detach(), "a teacher's": lambda p: nn.Parameter(2.0 * p.detach())}


@pytest.mark.parametrize("clears", ["before", "after"])
@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
@pytest.mark.parametrize("change", ["freeze", "thaw", "double"])
@pytest.mark.parametrize("preconditioner", [BNP(), Whitening()], ids=["BNP", "Whitening"])
def test_a_change_before_a_forward_with_other_weights_is_followed(preconditioner, change, fast, clears):
    """As if the optimizer had been asked for its state dict before that forward; its parameters stay the model's."""
    ends = []
    for asked in (False, True):
        torch.manual_seed(0)
        model = Tied()
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=preconditioner)
        changing = [*model[0].parameters(), model[2].bias]
        if change == "thaw":
            [p.requires_grad_(False) for p in changing]
        for t in range(5):
            if t == 2:
                model.double() if change == "double" else [p.requires_grad_(change == "thaw") for p in changing]
                if asked:
                    optimizer.state_dict()
            if clears == "before":
                optimizer.zero_grad()
            x = X.to(model[0].weight.dtype) + t
            lent = {n: fast(p) for n, p in model.named_parameters()} if t >= 2 else dict(model.named_parameters())
            loss = torch.func.functional_call(model, lent, (x,)).square().mean() + model(x).square().mean()
            assert all(map(operator.is_, optimizer.param_groups[0]["params"], model.parameters()))
            if clears == "after":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append((model, optimizer))
    check_same(*ends)


def test_parameters_that_take_the_place_of_others_between_two_steps_are_seen():
    model, optimizer = make()
    for _ in range(2):
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        step(model, optimizer)
    assert [optimizer.state[layer.weight]["count"].item() for layer in (model.stem, model.head)] == [24, 24]


def test_forwards_in_several_threads_all_count():
    def train(threads):
        model, optimizer = make()
        model.body[3].p = 0.0  # masks would be drawn in another order
        for _ in range(2):
            optimizer.zero_grad()
            parts = [data(3, 4, seed=k) for k in range(60)]
            with ThreadPoolExecutor(threads) if threads else contextlib.nullcontext() as pool:
                ys = list((pool.map if threads else map)(model, parts))
            sum(y.square().mean() for y in ys).backward()
            optimizer.step()
        return model, optimizer

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns often
    try:
        found = train(8)
    finally:
        sys.setswitchinterval(interval)
    assert found[1].state[found[0].stem.weight]["count"].item() == 2 * 60 * 3
    # Sixty parts come in any order, whose roundings a division by small deviations makes larger; one that is lost is 1e-2.
    check_same(found, train(None), exact=False, rtol=1e-9)


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
