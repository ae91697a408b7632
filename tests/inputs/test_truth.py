"""What is not observed is said: in the warning, in explain(), in a diagnosis. And forwards that are another's are left out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import precond
from inputs.layers import data
from precond import BNP, SAM, Objective, PreconditionedGD, diagnose

torch.set_num_threads(1)
X = data(12, 4)


class Table(nn.Module):
    """One weight for each way not to be observed, and one that is."""

    def __init__(self):
        super().__init__()
        self.seen, self.by_forward, self.by_function, self.never = (nn.Linear(4, 4) for _ in range(4))
        self.in_eval, self.frozen, self.sparse = (nn.Linear(4, 4) for _ in range(3))
        self.parametrized = parametrizations.weight_norm(nn.Linear(4, 4))
        self.own = nn.Parameter(torch.randn(4, 4))
        self.position = nn.Parameter(torch.randn(1, 1, 4))  # a vector in three dimensions
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.in_eval.eval()
        h = self.frozen(self.in_eval(self.seen(x)))
        h = F.linear(self.by_forward.forward(h), self.by_function.weight, self.by_function.bias)
        h = self.parametrized(h) @ self.own + self.position[0]
        return self.sparse(torch.tanh(h).relu().to_sparse())


NOT_CALLED = "was not called as a layer that trains"
REASONS = {
    "by_forward.weight": NOT_CALLED,
    "by_function.weight": NOT_CALLED,
    "in_eval.weight": NOT_CALLED,
    "never.weight": "was not called",
    "sparse.weight": "was given a sparse tensor",
    "parametrized.parametrizations.weight.original1": "is parametrized",
    "own": "is a parameter that Table has beside its layers",
}
UNUSED = {"never.weight"}  # it has no gradient


def stepped(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[PreconditionedGD, list[str]]:
    """After three steps, with what was said."""
    torch.manual_seed(0)
    model = Table().double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    return optimizer, [str(w.message) for w in caught]


RECIPES = {name: precond.RECIPES[name] for name in ("bnp", "whitening", "auto")}
RECIPES["muon with BNP"] = lambda m: precond.muon(m, inputs=BNP())


@pytest.mark.parametrize("recipe", RECIPES)
def test_explain_says_of_every_weight_whether_it_is_observed(recipe):
    optimizer, said = stepped(RECIPES[recipe])
    rows = {row.name: row for row in optimizer.explain().rows}
    for name, why in REASONS.items():
        assert f"inputs are not observed: {why}" in rows[name].why, name
    for name in {n for n in rows if "parametrized" not in n} - set(REASONS):
        assert "not observed:" not in rows[name].why, name
    assert any(kind in rows["seen.weight"].preconditioner for kind in ("BNP", "Whitening"))
    assert rows["frozen.weight"].preconditioner == "none (frozen)"
    text = "\n".join(said)
    assert "are stepped without them" in text
    for name, why in REASONS.items():
        owner = name.split(".")[0] if "parametrized" in name else name
        assert text.count(f"'{owner}'") == (name not in UNUSED), (name, text)
        assert name in UNUSED or why in text
    for name in ("seen", "frozen", "position"):
        assert f"'{name}" not in text


def test_a_layer_that_is_observed_later_is_not_said_to_be_unobserved():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]).double()
    optimizer = precond.bnp(model)
    for called in ([0], [0, 1]):
        optimizer.zero_grad()
        sum(model[k](X).square().mean() for k in called).backward()
        optimizer.step()
        assert [row.why for row in optimizer.explain().rows[::2]] == [
            "",
            "" if 1 in called else "inputs are not observed: was not called",
        ]


# --- a diagnosis is no clean bill of what it did not see -----------------------------------------------------------------------------


def objective(model: nn.Module) -> Objective:
    return Objective(model.double(), F.mse_loss, [(X, torch.zeros(12, 4, dtype=torch.float64))])


def test_a_diagnosis_names_what_it_did_not_see():
    found = diagnose(objective(Table()))
    text = str(found)
    for name in ("by_forward.weight", "by_function.weight", "never.weight", "sparse.weight", "parametrized", "own"):
        assert any(note.startswith(name) for note in found.undiagnosed), name
        assert f"Note: {name}" in text
    assert {layer.name for layer in found.layers} == {"seen", "in_eval"}
    assert "frozen" not in text and found.as_dict()["undiagnosed"] == list(found.undiagnosed)


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W


@pytest.mark.parametrize(
    ("model", "note"),
    [(Alone(), "W is in a Alone"), (nn.LayerNorm(4), "the model has no layer of a kind whose inputs are diagnosed")],
)
def test_an_empty_diagnosis_says_that_it_is_one(model, note):
    found = diagnose(objective(model))
    assert found.layers == () and found.advice == ()
    assert "No layer was diagnosed: this says nothing" in str(found) and note in str(found)
    assert "Nothing stands out" not in str(found)


def test_nothing_stands_out_in_some_layers():
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    model = nn.Sequential(nn.Linear(4, 4), Alone()).double()
    found = diagnose(Objective(model, F.mse_loss, [(signs, signs)]))
    assert "Nothing stands out in these layers; 1 other weight was not diagnosed" in str(found)


# --- whose forward it is ---------------------------------------------------------------------------------------------------------------


def gan(share: Callable | None, steps: int = 4, **options):
    """A discriminator's optimizer after steps in which the generator's loss runs through it; None: it does not."""
    torch.manual_seed(0)
    G, D = nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 1)).double()
    of_D = PreconditionedGD(D, lr=0.01, preconditioner=BNP(), **options)
    for t in range(steps):
        z = torch.randn(6, 3, generator=torch.Generator().manual_seed(t)).double()
        if share is not None:
            torch.manual_seed(100 + t)
            share(of_D, lambda z=z: (-D(5 * G(z))).mean().backward())
        of_D.zero_grad()
        torch.manual_seed(t)
        (D(G(z).detach()) - D(X[:6])).mean().backward()
        while of_D.probe():
            (D(G(z).detach()) - D(X[:6])).mean().backward()
        of_D.step()
    return D, of_D


def left_out(optimizer: PreconditionedGD, loss: Callable[[], None]) -> None:
    with optimizer.unobserved():
        loss()


def left_out_twice(optimizer: PreconditionedGD, loss: Callable[[], None]) -> None:
    with optimizer.unobserved():
        with optimizer.unobserved():
            pass
        loss()


def in_the_way(optimizer: PreconditionedGD, loss: Callable[[], None]) -> None:
    loss()


OPTIONS = {"plain": {}, "SAM": {"regularizers": [SAM(0.05)]}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("share", [left_out, left_out_twice])
def test_another_loss_is_left_out(share, options):
    alone, mine = gan(None, **options), gan(share, **options)
    for p, q in zip(alone[0].parameters(), mine[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(alone[1].state[p][k], mine[1].state[q][k]) for k in alone[1].state[p])


def test_without_the_context_statistics_go_with_the_gradients_and_random_states_do_not():
    """The other loss's gradients are cleared, and what was seen with them; the first forward's masks are taken for the step's own."""
    for name, options in OPTIONS.items():
        alone, mine = gan(None, **options), gan(in_the_way, **options)
        assert torch.equal(alone[0][0].weight, mine[0][0].weight) == (name == "plain")


def test_the_context_ends_with_an_exception_and_copies_have_it_too():
    layer = nn.Linear(4, 2).double()
    optimizer = precond.bnp(layer)
    with pytest.raises(KeyError), optimizer.unobserved():
        raise KeyError
    with copy.deepcopy(optimizer).unobserved():
        layer(X).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["count"].item() == 12


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_repeated_later_is_not_counted_then(reentrant):
    layer = nn.Linear(4, 2).double()
    optimizer = precond.bnp(layer)
    x = X.clone().requires_grad_()
    with optimizer.unobserved():
        other = checkpoint(layer, 9 * x, use_reentrant=reentrant)
    (checkpoint(layer, x, use_reentrant=reentrant) + other).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["count"].item() == 12
    torch.testing.assert_close(optimizer.state[layer.weight]["mean"][0], X.mean(0))
