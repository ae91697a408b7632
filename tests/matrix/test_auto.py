"""What ``auto`` measures in its first steps, what it decides by that, and that a decision stays."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import precond
from contract.table import flat
from precond import Auto, Whitening
from precond.optim.recipes.first_steps import FirstSteps

GENERATOR = torch.Generator().manual_seed(3)
MIX = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)


class Two(nn.Module):
    """A layer of white inputs and one of mixed ones."""

    def __init__(self):
        super().__init__()
        self.white, self.mixed, self.head = (nn.Linear(6, n, dtype=torch.float64) for n in (3, 4, 2))

    def forward(self, x):
        return self.head(torch.cat([torch.tanh(self.white(x)), torch.tanh(self.mixed(x @ MIX))], -1)[..., :6])


def net():
    torch.manual_seed(1)
    return Two()


def steps(model, optimizer, start, stop, size=200):
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(50 + t)
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


def acting(optimizer):
    return {row.name: row.preconditioner.split("(")[0] for row in optimizer.explain().rows if "weight" in row.name}


def test_white_inputs_are_standardized_and_others_whitened():
    model = net()
    optimizer = precond.auto(model)
    steps(model, optimizer, 0, 8)
    assert acting(optimizer) == {"white.weight": "BNP", "mixed.weight": "Whitening", "head.weight": "Whitening"}
    why = {row.name: row.why for row in optimizer.explain().rows}
    assert "of their directions independent: white but for scales" in why["white.weight"]
    share = optimizer.param_groups[0]["measured"]["mixed.weight"]
    assert f"{share:.2f} of their directions independent" in why["mixed.weight"]
    assert "outer.covariance" not in optimizer.state[model.white.weight]  # nothing is kept of it
    assert "outer.covariance" in optimizer.state[model.mixed.weight]
    steps(model, optimizer, 8, 12)


def test_the_number_is_that_of_the_correlations_without_what_few_samples_add():
    """tr(K²) of a known covariance, from 7 batches of 200: within a few percent where the raw number is off by 6/1400·6²."""
    model = net()
    optimizer = precond.auto(model, choice=Auto(whitening=Whitening(decay=0.99, observe_steps=8, damping=0.0)))
    steps(model, optimizer, 0, 8)
    measured = optimizer.param_groups[0]["measured"]
    C = MIX.T @ MIX
    K = C / C.diagonal().sqrt() / C.diagonal().sqrt()[:, None]
    assert measured["mixed.weight"] == pytest.approx(float(6 / K.square().sum()), rel=0.05)
    assert measured["white.weight"] == pytest.approx(1.0, abs=0.02)


def test_few_samples_do_not_look_like_few_directions():
    model = net()
    optimizer = precond.auto(model)
    steps(model, optimizer, 0, 8, size=4)
    assert (
        optimizer.param_groups[0]["measured"]["white.weight"] > 0.6
    )  # 6/(1 + 6/N) of 6 without the correction: 0.4 with N = 4


@pytest.mark.parametrize("at", [5, 8, 10])
def test_resumed_before_or_after_the_decision_it_is_as_if_never_stopped(at):
    whole = net()
    optimizer = precond.auto(whole)
    steps(whole, optimizer, 0, 20)
    model = net()
    first = precond.auto(model)
    steps(model, first, 0, at)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = net()
    model.load_state_dict(saved["model"])
    second = precond.auto(model)
    second.load_state_dict(saved["optimizer"])
    steps(model, second, at, 20)
    assert torch.equal(flat(model), flat(whole))
    assert acting(second) == acting(optimizer)


def test_it_is_decided_once_and_may_be_told():
    model = net()
    optimizer = precond.auto(model)
    steps(model, optimizer, 0, 8)
    found = dict(optimizer.param_groups[0]["measured"])
    steps(model, optimizer, 8, 30)
    assert optimizer.param_groups[0]["measured"] == found
    told = precond.auto(net(), choice=Auto(measured=(("white.weight", 1.0),)))
    assert acting(told)["white.weight"] == "BNP"
    never = precond.auto(model := net(), choice=Auto(white=2.0))
    steps(model, never, 0, 10)
    assert acting(never)["white.weight"] == "Whitening"


@pytest.mark.parametrize("layer", [nn.RNN(3, 4), nn.LSTM(3, 4, 2), nn.GRUCell(3, 4)], ids=lambda m: type(m).__name__)
def test_matrices_of_recurrences_are_orthogonalized_one_by_one(layer):
    optimizer = precond.auto(layer)
    for row in optimizer.explain().rows:
        assert row.why == "matrices of a recurrence"
        assert ("Muon" if "weight" in row.name else "RMS") in row.preconditioner
    x = torch.randn(2, 5, 3) if not isinstance(layer, nn.GRUCell) else torch.randn(5, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    out = layer(x)
    (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def test_tables_take_longer_steps_unless_a_layer_shares_them():
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            if tie:
                self.head.weight = self.table.weight

        def forward(self, i):
            return self.head(self.table(i))

    moves = {}
    for tie in (False, True):
        torch.manual_seed(0)
        model = Tied(tie)
        optimizer = precond.auto(model, lr=0.01, weight_decay=0.0)
        before = model.table.weight.detach().clone()
        nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7).flip(0)).backward()
        optimizer.step()
        moves[tie] = (model.table.weight.detach() - before).abs().max().item()
        why = optimizer.explain().rows[0].why
        assert why == ("rows of a table, shared with a layer" if tie else "rows of a table, steps × 5")
    assert moves[False] == pytest.approx(0.05, rel=1e-3) and moves[True] == pytest.approx(0.01, rel=1e-3)


class OneWeight(nn.Module):
    """Layers of one weight, the first two of one bias, each other one with its own."""

    def __init__(self, layers, one_bias=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, dtype=torch.float64) for _ in range(layers))
        for layer in self.layers[1:]:
            layer.weight = self.layers[0].weight
        if one_bias:
            self.layers[1].bias = self.layers[0].bias

    def forward(self, x):
        return torch.cat([layer(x[:, k]) for k, layer in enumerate(self.layers)])


@pytest.mark.parametrize(
    ("layers", "one_bias"), [(2, False), (3, True)], ids=["two biases", "one of two layers, one of a third"]
)
@pytest.mark.parametrize("make", [precond.auto, lambda model: precond.PreconditionedGD(model, preconditioner=precond.Polar())])
def test_biases_of_layers_that_share_a_weight_alone_are_stepped_alike(make, layers, one_bias):
    torch.manual_seed(0)
    model = OneWeight(layers, one_bias)
    own = dict.fromkeys(layer.bias for layer in model.layers)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.zero_()
    optimizer = make(model)
    rows = [row for row in optimizer.explain().rows if row.name.endswith("bias")]
    assert len(rows) == len(own) and {(row.preconditioner, row.why) for row in rows} == {("RMS()", rows[0].why)}
    x = torch.randn(9, 1, 5, dtype=torch.float64).expand(
        -1, layers, -1
    )  # all layers see the same, so that all biases move alike
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        if one_bias:
            model.layers[0].bias.grad /= 2
        optimizer.step()
    first, last = (model.layers[k].bias.detach() for k in (0, -1))
    torch.testing.assert_close(first, last, atol=1e-12, rtol=0)  # rounding of sums in another order
    assert (first != 0).all()


def test_a_weight_and_a_bias_that_the_same_layers_share_are_a_layer():
    model = OneWeight(2, one_bias=True)
    rows = precond.auto(model).explain().rows
    assert [row.block for row in rows] == [0, 0]


def test_layers_of_one_shape_decide_together():
    class Alike(Two):
        def __init__(self):
            super().__init__()
            self.mixed = nn.Linear(6, 3, dtype=torch.float64)

    torch.manual_seed(1)
    model = Alike()
    optimizer = precond.auto(model)
    steps(model, optimizer, 0, 8)
    measured = optimizer.param_groups[0]["measured"]
    assert measured["white.weight"] == measured["mixed.weight"] < 0.8
    assert acting(optimizer)["white.weight"] == "Whitening"


@pytest.mark.parametrize("every, decided, known", [(None, 7, False), (4, 14, False), (2, 13, True)])
def test_a_layer_without_gradients_keeps_no_other_waiting(every, decided, known):
    """An auxiliary head that the run does not use, or a layer that is called each so many steps."""

    class Beside(Two):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(6, 5, dtype=torch.float64)
            self.calls = 0

        def forward(self, x):
            if every is not None and self.calls % every == 0:
                return super().forward(x) + 0 * self.spare(x).sum()
            return super().forward(x)

    ends = []
    for make in (Two, Beside):
        torch.manual_seed(1)
        model = make()
        optimizer = precond.auto(model)
        for t in range(16):
            model.calls = t
            steps(model, optimizer, t, t + 1)
            made = optimizer.param_groups[0]["measured"]
            if make is Beside:
                assert (made is not None) == (t + 1 >= decided)
        ends.append([p.detach() for name, p in model.named_parameters() if not name.startswith("spare")])
    found = acting(optimizer)
    assert (found["white.weight"], found["mixed.weight"], found["head.weight"]) == ("BNP", "Whitening", "Whitening")
    assert ("spare.weight" in made) == known
    if decided == 7:
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_is_told_is_the_noise_of_the_first_gradients_and_the_samples_of_each_input():
    """Against dense gradients of the first steps, and an effective number of samples made from the weights of the average."""
    model = net()
    optimizer = precond.auto(model, choice=Auto(whitening=Whitening(decay=0.5, observe_steps=8)))
    gradients: dict[str, list] = {}
    for t in range(7):
        steps(model, optimizer, t, t + 1)
        for name, p in model.named_parameters():
            gradients.setdefault(name, []).append(p.grad.flatten().clone())
    seen = optimizer.param_groups[0]["seen"]
    assert set(seen) == set(optimizer.param_groups[0]["measured"]) == {"white.weight", "mixed.weight", "head.weight"}
    for name, (samples, noise) in seen.items():
        G = torch.stack(gradients[name])
        spread = G.var(0).sum()
        assert noise == pytest.approx(float(spread / (G.mean(0).square().sum() - spread / 7)), rel=0.06)  # two digits
        weights = torch.zeros(0)
        for t in range(1, 8):  # an average of all until it forgets
            gain = max(0.5, 1 / t)
            weights = torch.cat([weights * (1 - gain), torch.tensor([gain])])
        assert samples == pytest.approx(float(200 / weights.square().sum()) / 6, rel=0.006)  # three digits
        why = {row.name: row.why for row in optimizer.explain().rows}[name]
        assert f"(not decisive: {samples:g} samples per input, gradient noise {noise:g})" in why


def test_what_is_told_changes_no_step(monkeypatch):
    def trained():
        model = net()
        optimizer = precond.auto(model)
        steps(model, optimizer, 0, 20, size=32)
        return model, optimizer

    told, optimizer = trained()
    monkeypatch.setattr(FirstSteps, "_note", lambda self, leaf: None)
    monkeypatch.setattr(Whitening, "samples_per_input", lambda self, state: dict.fromkeys(self.independent(state), 1.0))
    untold, other = trained()
    assert optimizer.param_groups[0]["seen"] != other.param_groups[0]["seen"]
    assert torch.equal(flat(told), flat(untold)) and acting(optimizer) == acting(other)
    mine, theirs = (o.state_dict()["state"] for o in (optimizer, other))
    assert mine.keys() == theirs.keys()
    for p in mine:
        assert mine[p].keys() == theirs[p].keys() and all(torch.equal(mine[p][k], theirs[p][k]) for k in mine[p])


def test_nothing_is_told_that_was_not_seen():
    model = net()
    first = precond.auto(model)
    steps(model, first, 0, 5)
    second = precond.auto(model)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        del group["seen"]  # of an earlier version
    second.load_state_dict(saved)
    steps(model, second, 5, 8)
    assert all(noise is None and samples > 0 for samples, noise in second.param_groups[0]["seen"].values())
    assert "gradient noise" not in str(second.explain()) and "samples per input" in str(second.explain())
    with pytest.raises(TypeError, match="seen must be triples"):
        Auto(seen=(("white.weight", 1.0),))


def test_what_is_kept_of_gradients_is_bounded():
    """While a layer that has begun is waited for no more is kept than is needed, and nothing once it is not."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(300, 40), nn.Linear(300, 4)

        def forward(self, x, idle=False):
            return self.idle(x) if idle else self.used(x)

    torch.manual_seed(0)
    model = Wide()
    optimizer = precond.auto(model)
    looking = optimizer.naming.settle
    for t in range(14):
        if t == 13:
            assert optimizer.param_groups[0]["measured"] is None
            kept = [g["used.weight"] for g in looking._gradients if "used.weight" in g]
            assert len(kept) == 7 and all(g.numel() == 4000 for g in kept)  # each third of 12,000
            assert sum("idle.weight" in g for g in looking._gradients) == 1
        optimizer.zero_grad()
        x = torch.randn(8, 300)
        (model(x).square().mean() + (model(x, idle=True).square().mean() if t == 0 else 0)).backward()
        optimizer.step()
    assert set(optimizer.param_groups[0]["measured"]) == {"used.weight"} and not looking._gradients


def test_a_first_batch_of_one_sample_is_taken_alike_by_kernels_and_loop():
    """Its inputs have no covariance yet; the rows of the parameters as they are then say how long steps are, beyond 1."""
    found = []
    for engine in ("auto", "loop"):
        model = net()
        with torch.no_grad():
            model.mixed.weight.mul_(9)
        optimizer = precond.auto(model, engine=engine)
        steps(model, optimizer, 0, 1, size=1)
        steps(model, optimizer, 1, 10)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


class Language(nn.Module):
    """A table of words and one of places, hidden layers as wide as the latter is long, and scores for words."""

    def __init__(self, words=12, places=16, more=0):
        super().__init__()
        self.words, self.places, self.rnn = nn.Embedding(words, 16), nn.Embedding(places, 16), nn.LSTM(16, words // 4)
        self.hidden = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, words)
        self.more = nn.ModuleList(nn.Linear(16, words) for _ in range(more))


def scoring(optimizer):
    return {row.name: row.preconditioner for row in optimizer.explain().rows if "taken for their scores" in row.why}


def test_a_layer_that_scores_the_rows_of_a_table_is_stepped_entry_by_entry_behind_standardized_inputs():
    model = Language()
    found = scoring(precond.auto(model))
    assert found.keys() == {"head.weight", "head.bias"}
    assert all(what.startswith("BNP(") and what.endswith("∘ RMS()") for what in found.values())
    why = {row.name: row.why for row in precond.auto(model).explain().rows}
    assert why["head.weight"] == "12 outputs, as many as a table has rows: taken for their scores"
    assert why["hidden.0.weight"] == "16 inputs"


@pytest.mark.parametrize(
    "model",
    [Language(words=8), Language(more=1), Language(words=13)],
    ids=["as few rows as classes", "several such layers", "as many as no table has"],
)
def test_other_layers_are_not_taken_for_such(model):
    if model.head.out_features == 13:
        model.words = nn.Embedding(14, 16)
    assert not scoring(precond.auto(model))


def test_a_head_that_shares_the_table_is_the_table():
    model = Language()
    model.head.weight = model.words.weight
    assert not scoring(precond.auto(model))
    assert "shared with a layer" in {row.name: row.why for row in precond.auto(model).explain().rows}["words.weight"]


def test_scores_of_many_inputs_are_stepped_in_proportion():
    """The first step of RMS moves each entry of z by α, or with 256 inputs by α·64/256; bias and weight have one rate, as kernels ask."""
    for n, scale in ((64, 1.0), (256, 0.25)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, n), nn.Linear(n, 12)).double()
        weight, optimizer = model[1].weight, precond.auto(model, lr=0.01, weight_decay=0.0)
        before = weight.detach().clone()
        x, words = model[0].weight.detach().clone(), torch.arange(12)
        nn.functional.cross_entropy(model(words), words).backward()
        optimizer.step()
        std = x.var(0, unbiased=False).add(0.01 * x.square().mean(0)).sqrt()  # as BNP damps
        moved = (weight.detach() - before).mul(std).abs()
        torch.testing.assert_close(moved.median(), torch.tensor(0.01 * scale).double(), rtol=0.02, atol=0)
        why = {row.name: row.why for row in optimizer.explain().rows}["1.weight"]
        assert ("steps × 0.25" in why) == (n == 256)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_what_turns_to_standardized_inputs_knows_no_samples_but_its_own(engine):
    """Moments of all that a layer has received since, in float64: not a variance of 0 that counts for as many samples as whitening saw."""
    model = net()
    optimizer = precond.auto(model, engine=engine)
    lengths, seen = [], []
    for t in range(12):
        if t == 7:
            assert acting(optimizer)["white.weight"] == "BNP"
            model.white.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        before = flat(model).clone()
        steps(model, optimizer, t, t + 1)
        lengths.append((flat(model) - before).norm())
        if t >= 7:
            state, x = optimizer.state[model.white.weight], torch.cat(seen)
            assert state["outer.count"].item() == len(x)
            torch.testing.assert_close(state["outer.mean"][0], x.mean(0))
            torch.testing.assert_close(state["outer.variance"][0], x.var(0, correction=0))
            assert lengths[t] < 1.3 * lengths[6]


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 1, 32), (1, 32), (32, 1, 1), (4, 16, 32), (1, 4, 7, 7)])
def test_what_is_added_or_multiplied_entry_by_entry_takes_rms_and_moves(shape):
    """As a row of 512 entries a ViT's positions moved by 0.006 of the rate, and were never learned."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("positions", nn.Parameter(0.02 * torch.randn(shape)))
    with warnings.catch_warnings():
        if min(shape[0], math.prod(shape[1:])) == 1:
            warnings.simplefilter("error")  # nothing is to be observed
        optimizer = precond.auto(model, lr=1.0, weight_decay=0.0)
    (row,) = (r for r in optimizer.explain().rows if r.name == "positions")
    assert row.preconditioner == "RMS()" and row.why.startswith("no matrix")
    before = model.positions.detach().clone()
    ((model.positions * torch.randn(shape).sign()).sum() + model(torch.randn(8, 4)).sum()).backward()
    optimizer.step()
    torch.testing.assert_close((model.positions - before).abs(), torch.ones(shape))  # Adam's first step


def test_a_matrix_of_ones_own_is_orthogonalized():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("matrix", nn.Parameter(torch.randn(16, 32)))
    with pytest.warns(UserWarning, match="matrix"):
        rows = precond.auto(model).explain().rows
    assert next(r for r in rows if r.name == "matrix").preconditioner.startswith("Polar")


class Own(nn.Module):
    """Attention with matrices of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.gain = (nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 8), (8, 1)))


@pytest.mark.filterwarnings("ignore:no input statistics")
@pytest.mark.parametrize("make", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_directions_of_a_weight_norm_and_matrices_of_ones_own_are_orthogonalized_one_by_one(make):
    """They took RMS: on dilated convolutions with a weight norm auto missed what Muon reached in half of AdamW's steps."""
    model = nn.Sequential(make(nn.Conv1d(4, 8, 3, padding=1)), Own(), make(nn.Linear(8, 5)))
    optimizer = precond.auto(model, lr=1.0, weight_decay=0.0)
    acting = {row.name: row.preconditioner.split("(")[0] for row in optimizer.explain().rows}
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2 and min(len(p), p[0].numel()) > 1}
    assert len(matrices) == 4
    assert {name for name, what in acting.items() if what == "Muon"} == matrices
    assert set(acting.values()) == {"Muon", "RMS"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        n = min(len(p), p.numel() // len(p))
        U, V = (torch.linalg.qr(torch.randn(rows, n)).Q for rows in (len(p), p.numel() // len(p)))
        p.grad = (U @ torch.linspace(1, 3, n).diag() @ V.T).reshape(p.shape)
    optimizer.step()
    for name in matrices:
        moved = (dict(model.named_parameters())[name].detach() - before[name]).flatten(1)
        values = torch.linalg.svdvals(moved)
        assert 0.1 < values[0] < 2 * values[-1], name  # of Newton–Schulz, between 0.68 and 1.14 times a length


@pytest.mark.filterwarnings("ignore:no input statistics", "ignore:auto")
def test_why_is_true_of_each_parameter_and_not_of_its_layers_first_alone():
    """Matrices after a temperature were "no matrix", vectors beside a matrix "not observed", and extras of a layer had its inputs."""

    class Tempered(nn.Module):
        def __init__(self, first):
            super().__init__()
            for name in (first, "matrix", "second", "scale", "stack"):
                self.register_parameter(name, nn.Parameter(torch.randn(SHAPES[name])))

    class Adapted(nn.Linear):
        def __init__(self, frozen):
            super().__init__(10, 20)
            self.weight.requires_grad_(not frozen)
            self.A, self.B, self.m = (nn.Parameter(torch.randn(shape)) for shape in ((2, 10), (20, 2), 20))

    SHAPES = {"tau": (), "matrix": (6, 5), "second": (5, 4), "scale": (6,), "stack": (3, 4, 5)}
    models = {"late": Tempered("tau"), "early": Tempered("matrix"), "frozen": Adapted(True), "whole": Adapted(False)}
    rows = {r.name: r for r in precond.auto(nn.ModuleDict(models)).explain().rows}

    assert {rows[n].why for n in ("late.tau", "late.scale", "early.scale")} == {"no matrix"}
    unknown = "inputs are not observed: is in a Tempered"
    for order in ("early", "late"):
        assert all(rows[f"{order}.{n}"].why.startswith(unknown) for n in ("matrix", "second"))
        assert rows[f"{order}.stack"].why.startswith(f"no matrix, {unknown}")
    for extra in ("frozen.A", "frozen.B", "whole.A", "whole.B"):
        assert rows[extra].why.startswith("inputs are not observed: is in a Adapted")
    assert rows["frozen.bias"].preconditioner == "RMS()"
    assert {rows[n].why for n in ("frozen.m", "frozen.bias", "whole.m")} == {"no matrix"}
    assert {rows[n].why for n in ("whole.weight", "whole.bias")} == {"10 inputs"}


@pytest.mark.filterwarnings("ignore:no input statistics", "ignore:auto")
def test_neither_the_order_of_declaration_nor_what_else_trains_decides_about_a_matrix():
    """Matrices declared after a temperature were stepped by RMS, as factors in a subclass of Linear were where its bias trained."""

    class Attention(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                self.register_parameter(name, nn.Parameter(torch.randn(() if name == "tau" else (6, 6))))

    class Adapted(nn.Linear):
        def __init__(self, *trained):
            super().__init__(10, 20)
            self.A, self.B = nn.Parameter(torch.randn(2, 10)), nn.Parameter(torch.randn(20, 2))
            for name, p in self.named_parameters():
                p.requires_grad_(name in (*trained, "A", "B"))

    def kinds(model):
        return {row.name: row.preconditioner.split("(")[0] for row in precond.auto(model).explain().rows}

    for order in (("tau", "q", "k"), ("q", "tau", "k"), ("q", "k", "tau")):
        assert kinds(Attention(order)) == {"tau": "RMS", "q": "Muon", "k": "Muon"}, order
    for order in (("tau", "q"), ("q", "tau")):
        assert kinds(Attention(order)) == {"tau": "RMS", "q": "Polar"}, order
    shapes = {"none": (0, 3), "tau": (), "q": (4, 5), "places": (1, 3, 4), "hollow": (3, 0, 2)}
    for order in itertools.permutations(shapes):
        model = nn.Module()
        for name in order:
            model.register_parameter(name, nn.Parameter(torch.randn(shapes[name])))
        assert kinds(model) == {name: "Muon" if name == "q" else "RMS" for name in shapes}, order
    assert kinds(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=None)) == {
        "bias": "RMS", "parametrizations.weight.original0": "RMS", "parametrizations.weight.original1": "Polar"
    }  # fmt: skip
    of_layer = {
        (): ("none", "none"), ("bias",): ("none", "RMS"),
        ("weight",): ("Whitening", "none"), ("weight", "bias"): ("Whitening", "Whitening"),
    }  # fmt: skip
    for trained, (weight, bias) in of_layer.items():
        found = {name: kind.split()[0] for name, kind in kinds(Adapted(*trained)).items()}
        assert found == {"A": "Muon", "B": "Muon", "weight": weight, "bias": bias}, trained
    assert kinds(nn.LSTM(4, 5, proj_size=3))["weight_hh_l0"] == "BNP"  # a projection is no addition


def test_what_is_known_and_frozen_is_not_called_unknown():
    """A net of which biases alone are tuned has layers that are known."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for layer in model[::2]:
        layer.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="no layer that it knows trains a weight; RMS acts on all of it"):
        precond.auto(model)


@pytest.mark.filterwarnings("ignore:no input statistics", "ignore:auto")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(5, 4, num_layers=2, batch_first=True),
        lambda: nn.GRU(5, 4, batch_first=True),
        lambda: nn.ConvTranspose1d(4, 5, 3),
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)),
    ],
    ids=["LSTM", "GRU", "transposed", "stack"],
)
def test_decay_of_weights_alone_is_that_of_z_also_where_no_root_is_stated(make):
    """Decay groups: λ of the weights and none of the biases. The step of a recurrence raised, whose P = BNP ∘ Muon states no root.

    With P = BQ, and Q one block for each tensor, P(2Λ)P⁻¹p = B(2Λ)B⁻¹p, B that of BNP or of Whitening: what a decay changes in a step.
    """
    lr, decay = 0.01, 0.5
    moved = {}
    for λ in (0.0, decay):
        torch.manual_seed(0)
        model = make().double()
        optimizer = precond.auto(precond.decay_groups(model, weight_decay=λ), lr=lr)
        x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = model(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved[λ] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, p in before.items():
        if p.ndim > 1:  # B, and Q from the left, take none of the bias into the weight
            torch.testing.assert_close(moved[decay][name] - moved[0.0][name], -lr * decay * p, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:no input statistics", "ignore:auto")
@pytest.mark.parametrize("recipe", ["auto", "muon", "whitening", "bnp", "soap", "shampoo", "adamw", "sgd"])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (6, 4)])
def test_decay_of_weights_alone_where_there_is_no_gradient_yet(recipe, inputs, outputs):
    """Behind a layer that begins with zeros (adapters, LoRA's B, the last one of a flow) M is 0 at first; decay under auto was 0/0."""
    lr, decay = 0.01, 0.5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 3))
    nn.init.zeros_(model[2].weight)
    before = model[0].weight.detach().clone()
    optimizer = getattr(precond, recipe)(precond.decay_groups(model, weight_decay=decay), lr=lr)
    x = torch.randn(16, inputs, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if before is not None and recipe in ("auto", "muon", "adamw"):
            torch.testing.assert_close(model[0].weight.detach(), (1 - lr * decay) * before)
        before = None
        assert all(p.isfinite().all() for p in model.parameters())
