"""Polar and auto against dense computations in float64, their kernels against the reference engine, and what auto chooses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import precond
from precond import BNP, SAM, Auto, Momentum, Polar, PreconditionedGD, Preconditioner, Whitening


def matrix(layer: nn.Linear, of: str = "grad") -> torch.Tensor:
    W, b = (layer.weight, layer.bias) if of == "data" else (layer.weight.grad, layer.bias.grad)
    return torch.cat([W, b[:, None]], 1).detach().clone()


def root(L: torch.Tensor, damping: float) -> torch.Tensor:
    values, V = torch.linalg.eigh(L)
    return V @ torch.diag((values.clamp_min(0) + damping * values.max()) ** -0.5) @ V.T


@pytest.mark.parametrize("shape", [(6, 3), (4, 9), (5, 4)], ids=str)
def test_the_step_is_that_of_its_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*reversed(shape)).double()
    with torch.no_grad():
        layer.weight.mul_(30)
    optimizer = PreconditionedGD(
        layer, lr=0.1, preconditioner=Polar(every=5, decay=0.8, damping=0.01, gain=1.5), momentum=Momentum(0.7)
    )
    A, B = shape[0], shape[1] + 1
    W = matrix(layer, "data")
    scale = 1.5 * max(1.0, float(W.norm()) / A**0.5) * (A / B) ** 0.5
    assert float(W.norm()) > 2 * A**0.5
    m, L, Q = torch.zeros_like(W), None, None
    for t in range(1, 13):
        layer.weight.grad, layer.bias.grad = torch.randn_like(layer.weight), torch.randn_like(layer.bias)
        m = 0.7 * m + 0.3 * matrix(layer)
        current = m / (1 - 0.7**t)
        if t in (1, 2, 4, 5, 10):
            gram = (current @ current.T if A <= B else current.T @ current) / current.square().sum()
            L = gram if L is None else 0.8 * L + 0.2 * gram
            Q = root(L, 0.01)
            values = torch.linalg.eigvalsh(L)
            rank = float((values / (values + 0.01 * values[-1])).sum())
        step = Q @ current if A <= B else current @ Q
        W = W - 0.1 * scale * rank**0.5 * step / step.norm()
        optimizer.step()
        torch.testing.assert_close(matrix(layer, "data"), W, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize(("shape", "rank"), [((5, 7), 1), ((9, 8), 2), ((30, 6), 1)], ids=str)
def test_a_root_of_a_rank_has_the_leading_eigenvalues_and_the_mean_of_the_others(
    shape: tuple[int, int], rank: int, engine: str
) -> None:
    """Of a gradient that stays the same, so that orthogonal iteration comes to an end."""
    torch.manual_seed(1)
    layer = nn.Linear(*reversed(shape)).double()
    with torch.no_grad():
        layer.weight.mul_(0.1)
    optimizer = PreconditionedGD(
        layer, lr=0.1, preconditioner=Polar(every=1, decay=0.0, damping=0.01, rank=rank), engine=engine
    )
    A, B = shape[0], shape[1] + 1
    U, _, Vh = torch.linalg.svd(torch.randn(A, B).double(), full_matrices=False)
    m = U @ torch.diag(0.5 ** torch.arange(min(A, B)).double()) @ Vh
    for _ in range(40):
        before = matrix(layer, "data")
        layer.weight.grad, layer.bias.grad = m[:, :-1].clone(), m[:, -1].clone()
        optimizer.step()
    L = (m @ m.T if A <= B else m.T @ m) / m.square().sum()
    values, V = torch.linalg.eigh(L)
    values[:-rank] = values[:-rank].mean()
    directions = float((values / (values + 0.01 * values[-1])).sum())
    Q = V @ torch.diag((values + 0.01 * values.max()) ** -0.5) @ V.T
    step = Q @ m if A <= B else m @ Q
    wanted = 0.1 * (A / B * directions) ** 0.5 * step / step.norm()
    torch.testing.assert_close(before - matrix(layer, "data"), wanted, rtol=1e-8, atol=1e-10)
    P = optimizer.map()
    moved = torch.cat([t.reshape(A, -1) for t in P.gram((m[:, :-1], m[:, -1]))], 1)
    torch.testing.assert_close(0.1 * moved, wanted, rtol=1e-8, atol=1e-10)


def test_a_momentum_within_the_few_directions_is_not_lost_in_rounding() -> None:
    """What it has outside of them is a difference of equal numbers, which a small damping makes a thousand times as long."""
    torch.manual_seed(0)
    layer, exact = nn.Linear(7, 30), nn.Linear(7, 30).double()
    exact.load_state_dict(layer.state_dict())
    m = torch.randn(30, 1) @ torch.randn(1, 8)
    for model, engine in ((layer, "fused"), (exact, "loop")):
        optimizer = PreconditionedGD(
            model, lr=0.1, preconditioner=Polar(damping=1e-6, rank=1), momentum=Momentum(0.9, "heavy_ball"), engine=engine
        )
        for _ in range(2):
            model.weight.grad, model.bias.grad = m[:, :-1].to(model.weight), m[:, -1].to(model.weight)
            optimizer.step()
    torch.testing.assert_close(matrix(layer, "data").double(), matrix(exact, "data"), rtol=1e-4, atol=1e-4)


def test_a_training_with_roots_of_a_rank_goes_on_from_its_state() -> None:
    def make() -> tuple[nn.Module, PreconditionedGD]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 30), nn.Tanh(), nn.Linear(30, 6))
        return model, precond.auto(model, choice=Auto(polar=Polar(every=4, rank=1), whitening=Whitening(rank=1)))

    def steps(model: nn.Module, optimizer: PreconditionedGD, first: int, last: int) -> None:
        for t in range(first, last):
            optimizer.zero_grad()
            model(torch.randn(16, 7, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, 0, 11)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 11, 20)
    again, other = make()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(again, other, 11, 20)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)], ids=str)
@pytest.mark.parametrize("kind", ["zero", "one entry", "rank 1", "huge", "tiny", "inf once"])
def test_degenerate_momentum_with_a_root_of_a_rank(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*reversed(shape), bias=False)
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=Polar(every=2, rank=1), momentum=Momentum(0.9), nonfinite="skip")
    for t in range(6):
        G = torch.randn(shape)
        match kind:
            case "zero":
                G.zero_()
            case "one entry":
                G = torch.zeros(shape).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0))
            case "rank 1":
                G = torch.ones(shape)
            case "huge" | "tiny":
                G *= 1e25 if kind == "huge" else 1e-30
            case "inf once" if t == 2:
                G[0, 0] = torch.inf
        layer.weight.grad = G
        optimizer.step()
        assert layer.weight.isfinite().all()


def test_with_a_root_of_every_step_it_is_the_polar_factor() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 4, bias=False).double()
    before = layer.weight.detach().clone()
    optimizer = PreconditionedGD(layer, lr=1.0, preconditioner=Polar(every=1, decay=0.0, damping=0.0))
    layer.weight.grad = torch.randn_like(layer.weight)
    U, _, Vh = torch.linalg.svd(layer.weight.grad, full_matrices=False)
    optimizer.step()
    torch.testing.assert_close(before - layer.weight, (4 / 7) ** 0.5 * U @ Vh, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("samples", [64, 6400])
def test_a_layer_of_many_samples_takes_the_polar_factor_in_each_step(samples: int, engine: str) -> None:
    """4 rows, 6 columns with the bias: a root costs 3000·4² + 5·4³ operations, the layer 6·N·24."""
    torch.manual_seed(0)
    layer, momentum = nn.Linear(5, 4).double(), Momentum(0.7, "heavy_ball")
    P = BNP(decay=0.0, damping=0.0) @ Polar(every=5, damping=0.0)
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=P, momentum=momentum, engine=engine)
    m, same = torch.zeros(4, 6, dtype=torch.float64), []
    for _ in range(7):
        x, before = torch.randn(samples, 5, dtype=torch.float64) + 1, matrix(layer, "data")
        optimizer.zero_grad()
        (layer(x) ** 2 + layer(x) @ torch.randn(4, 4, dtype=torch.float64)).mean().backward()
        m = 0.7 * m + matrix(layer)
        optimizer.step()
        mean, std = x.mean(0), x.std(0, correction=0)
        P1 = torch.diag(torch.cat([1 / std, std.new_ones(1)]))  # rows (w, b) = z P₁ᵀ
        P1[5, :5] = -mean / std
        U, _, Vh = torch.linalg.svd(m @ P1, full_matrices=False)
        moved = (before - matrix(layer, "data")) / 0.1 @ torch.linalg.inv(P1).T
        same.append(bool((moved / moved.norm() - U @ Vh / 2).abs().max() < 1e-8))
    assert same == ([True] * 7 if samples == 6400 else [True, False, False, False, False, False, False])


@pytest.fixture(params=["small", "large"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kernels steps the layers."""
    monkeypatch.setattr("precond.optim.engine.kernels.polar._SMALL", 2**60 if request.param == "small" else 0)
    return request.param


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5, bias=bias),
        nn.LayerNorm(5), nn.Linear(5, 9, bias=bias), nn.Tanh(), nn.Linear(9, 3, bias=bias),
    )  # fmt: skip


CHOICES = {
    "auto": lambda m, **more: precond.auto(m, weight_decay=0.1, choice=Auto(20, Whitening(root="cholesky", every=8)), **more),
    "symmetric roots": lambda m, **more: precond.auto(m, choice=Auto(whitening=Whitening(every=8)), **more),
    "of rank 1": lambda m, **more: precond.auto(m, choice=Auto(whitening=Whitening(every=8, rank=1)), **more),
    "roots of rank 1": lambda m, **more: precond.auto(m, choice=Auto(polar=Polar(rank=1)), **more),
    "both of rank 1": lambda m, **more: precond.auto(m, choice=Auto(whitening=Whitening(rank=1), polar=Polar(rank=1)), **more),
    "of rank 1, alone": lambda m, **more: PreconditionedGD(
        m, preconditioner=Polar(3, rank=1), momentum=Momentum(0.9, "heavy_ball"), **more
    ),
    "standardized": lambda m, **more: precond.auto(m, choice=Auto(max_inputs=1), **more),
    "alone": lambda m, **more: PreconditionedGD(m, preconditioner=Polar(3), momentum=Momentum(0.9, "heavy_ball"), **more),
    "maximize": lambda m, **more: _maximizing(precond.auto(m, **more)),
}


def _maximizing(optimizer: PreconditionedGD) -> PreconditionedGD:
    for group in optimizer.param_groups:
        group["maximize"] = True
    return optimizer


def trained(name: str, dtype: torch.dtype, bias: bool, steps: int = 25, **more: object) -> list[torch.Tensor]:
    model = net(bias).to(dtype)
    optimizer = CHOICES[name](model, lr=0.02, **more)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 2, 4, 4, generator=generator).to(dtype) * 3 + 1
        y = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CHOICES)
def test_the_kernel_takes_the_steps_of_the_reference_engine(name: str, bias: bool) -> None:
    for ours, theirs in zip(trained(name, torch.float64, bias), trained(name, torch.float64, bias, engine="loop"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("samples", [4, 64], ids=["by schedule", "in each step"])
def test_the_kernel_steps_rows_that_see_different_inputs(samples: int) -> None:
    """Of attention's packed projections."""

    def trained(engine: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True).double()
        optimizer = precond.auto(model, lr=0.02, engine=engine, choice=Auto(whitening=Whitening(root="cholesky", every=4)))
        if engine == "auto":
            kernels = zip(optimizer._kernels() or (), optimizer.cells, strict=True)
            of = {leaf.name: type(kernel).__name__ for kernel, cell in kernels for leaf in cell.leaves}
            assert of["self_attn.in_proj_weight"] == of["self_attn.in_proj_bias"] == of["linear1.weight"] == "SmallStep"
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            x = torch.randn(samples, 3, 6, generator=generator, dtype=torch.float64) * 3 + 1
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(trained("auto"), trained("loop"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("small", [0, 10**9], ids=["large", "small"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("rows", [7, 8, 9, 10])
def test_kernels_step_layers_that_are_nearly_square(
    rows: int, rank: int | None, bias: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 inputs, with the bias 9: which side is the shorter one depends on it."""
    monkeypatch.setattr("precond.optim.engine.kernels.polar._SMALL", small)
    choice = Auto(polar=Polar(rank=rank, every=4))

    def trained(engine: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, rows, bias=bias), nn.Tanh(), nn.Linear(rows, 8, bias=bias)).double()
        optimizer = precond.auto(model, choice=choice, engine=engine)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(16, 8).double()).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(trained("auto"), trained("loop"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["auto", "of rank 1", "both of rank 1"])
def test_products_in_16_bits_are_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precond.optim.engine.kernels.polar._SMALL", 0)
    monkeypatch.setattr("precond.algebra.precision.WIDE", 0)
    monkeypatch.setattr("precond.algebra.precision.multiplies_bfloat16", lambda: True)
    narrow, exact = trained(name, torch.float32, True, 4), trained(name, torch.float32, True, 4, engine="loop")
    start = [p.detach() for p in net().parameters()]
    for ours, theirs, before in zip(narrow, exact, start, strict=True):
        assert (ours - theirs).norm() <= 0.1 * (theirs - before).norm() + 1e-7


def test_auto_chooses_by_what_a_layer_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
            self.narrow, self.wide = nn.Linear(8, 40), nn.Linear(40, 3)
            self.grouped, self.transposed = nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 4, 3)
            self.free = nn.Parameter(torch.randn(3))
            self.recurrent = nn.GRU(3, 4)

    table = {row.name: row for row in precond.auto(Model(), choice=Auto(max_inputs=20)).explain().rows}
    names = {
        name: row.preconditioner.replace("(", " ").split()[0] + " " + row.preconditioner.split(" ∘ ")[-1][:5]
        for name, row in table.items()
    }
    assert names["table.weight"] == "RMS RMS()" and names["norm.bias"] == "RMS RMS()" and names["free"] == "RMS RMS()"
    assert names["narrow.weight"] == names["narrow.bias"] == "Whitening Polar" and names["wide.weight"] == "BNP Polar"
    assert names["grouped.weight"] == "BNP RMS()" and names["transposed.weight"] == "BNP Muon("
    assert table["wide.weight"].why == "40 inputs are too many to whiten"
    assert all(row.why for row in table.values())


def test_auto_says_that_it_knows_no_layer() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="no layer that it knows"):
        optimizer = precond.auto(model, lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precond.auto(nn.Linear(3, 2))


def test_auto_trains_badly_scaled_inputs_with_a_learning_rate_that_is_not_tuned() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator) * torch.tensor([1e-3, 1.0, 1e3, 10.0, 0.1, 1.0]) + torch.tensor(
        [0.0, 5, 0, 100, 0, 0]
    )
    y = (x[:, 0] * 1e3 + x[:, 2] * 1e-3 > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = precond.auto(model, weight_decay=0.0)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    # The rate does not fall: single losses jump, up to 0.2, where and how high rounding decides.
    assert torch.stack(losses[-30:]).median() < 0.05


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("gradient", [0.0, 1e30, 1e-30, float("nan")], ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_extreme_gradients(gradient: float, shape: tuple[int, int], engine: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*reversed(shape))
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=Polar(), momentum=Momentum(0.9, "heavy_ball"), engine=engine)
    before = matrix(layer, "data")
    for _ in range(3):
        layer.weight.grad = torch.full(shape, gradient)
        layer.bias.grad = torch.zeros(shape[0])
        optimizer.step()
    moved = matrix(layer, "data") - before
    if gradient == 0:
        assert not moved.any()
    elif gradient == gradient:
        assert moved.isfinite().all() and moved.norm() > 0.1
    else:
        assert moved.isnan().any()


def test_an_eigendecomposition_that_fails_keeps_the_root_before(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 3)
    optimizer = PreconditionedGD(layer, lr=0.01, preconditioner=Polar(every=1), momentum=Momentum(0.9))

    def step() -> None:
        layer.weight.grad, layer.bias.grad = torch.randn(3, 4), torch.randn(3)
        optimizer.step()

    step()
    held = optimizer.state[layer.weight]["root"].clone()

    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.warns(UserWarning, match="no eigenvalues that converge"):
        step()
    assert torch.equal(held, optimizer.state[layer.weight]["root"])
    assert layer.weight.isfinite().all()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="every"):
        Polar(every=0)
    with pytest.raises(ValueError, match="rank"):
        Polar(rank=0)
    with pytest.raises(ValueError, match="arithmetic"):
        Polar(arithmetic="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_inputs"):
        Auto(max_inputs=0)
    with pytest.raises(TypeError, match="pass the model itself"):
        precond.auto([nn.Parameter(torch.randn(2, 2))])


def test_sam_behind_auto_descends() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(40, 5)
    y = x[:, :3].argmax(1)
    optimizer = precond.auto(model, lr=0.03, regularizers=[SAM(0.01, space="p")])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_bnp_before_polar_sees_standardized_momentum() -> None:
    """With one step and statistics of one batch, BNP@Polar is Polar on a layer with standardized inputs."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 4).double() * torch.tensor([1.0, 10, 100, 0.1]).double() + 3, torch.randn(64, 3).double()
    raw, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    with torch.no_grad():  # the same function on standardized inputs
        plain.weight.copy_(raw.weight * std)
        plain.bias.copy_(raw.bias + raw.weight @ mean)
    outer = BNP(decay=0.0, damping=0.0)
    a = PreconditionedGD(raw, lr=0.1, preconditioner=outer @ Polar(every=1), engine="loop")
    longer = (5 / 3) ** 0.25  # of 3 outputs and 5 inputs with the bias, which are known to be white in one case alone
    b = PreconditionedGD(plain, lr=0.1 * longer, preconditioner=Polar(every=1), engine="loop")
    for _ in range(4):
        for layer, inputs, optimizer in ((raw, x, a), (plain, (x - mean) / std, b)):
            optimizer.zero_grad()
            F.mse_loss(layer(inputs), y).backward()
            optimizer.step()
    torch.testing.assert_close(raw(x), plain((x - mean) / std), rtol=1e-9, atol=1e-9)


def test_an_input_that_has_died_is_not_taken_for_one_that_is_always_active() -> None:
    """Its variance falls to nothing while its deviations from the mean before are large; its weight must not grow without bound."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    optimizer = precond.auto(layer, choice=Auto(whitening=Whitening(root="cholesky", samples=1.0, every=1)))
    for t in range(2):
        x = torch.rand(200, 3) + 1
        if t:
            x[1:, 0] = 0
            x[0, 0] = 1e-3
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    activity = optimizer.state[layer.weight]["outer.activity"][0]
    assert activity[0] < 0.2 < 0.7 < activity[1:].min()  # E|h − μ|/σ: 0.14 of one sample in 200, 0.87 of a uniform distribution


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs_that_have_died_are_known_for_it_in_micro_batches_too(dtype: torch.dtype) -> None:
    """Their variance in a step is rounding, which decides nothing: their activities are those of all samples at once."""
    found = []
    for sizes in ([24], [9, 11, 4]):
        torch.manual_seed(0)
        layer = nn.Linear(400, 4, dtype=dtype)
        optimizer = precond.auto(layer, choice=Auto(whitening=Whitening(root="cholesky", samples=1.0, every=1)))
        for alive in (1.0, 0.0):
            x = alive * (torch.rand(24, 400, dtype=dtype) + 0.1)
            optimizer.zero_grad()
            for part in x.split(sizes):
                layer(part).square().sum().backward()
            optimizer.step()
        found.append(optimizer.state[layer.weight]["outer.activity"])
    torch.testing.assert_close(*found, rtol=100 * torch.finfo(dtype).eps, atol=0)  # sums of 24, in another order


@pytest.mark.parametrize("preconditioner", [Polar(damping=1e-6), precond.Muon(root="eigh", scale="spectral")], ids=repr)
@pytest.mark.parametrize("shape", [(6, 9), (48, 96), (96, 48), (5, 160)], ids=str)
def test_steps_of_a_few_directions_have_the_spectral_norm_of_the_layer(
    shape: tuple[int, int], preconditioner: precond.Preconditioner
) -> None:
    """√(A/B), of which a damping of 1e-6 of the largest eigenvalue takes 1e-6 · κ² of the gradient's singular values, κ² = 4."""
    torch.manual_seed(0)
    A, B = shape
    p = nn.Parameter(torch.zeros(A, B, dtype=torch.float64))
    optimizer = PreconditionedGD([p], lr=1.0, preconditioner=preconditioner)
    U, V = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in shape)
    p.grad = U @ torch.diag(torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)) @ V.T
    optimizer.step()
    values = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(values[:3], torch.full((3,), (A / B) ** 0.5, dtype=torch.float64), rtol=1e-5, atol=0)
    assert values[3:].amax() < 1e-6


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(("rows", "n"), [(1, 9), (3, 9), (9, 9), (20, 9), (1, 4), (3, 4), (4, 4)], ids=str)
def test_white_inputs_make_steps_of_few_outputs_longer(rows: int, n: int, engine: str) -> None:
    """The root mean square of changed outputs is c for inputs in the directions of a step where ‖D‖_F = c√(Aρ/B), and c√(ρ/B) for white ones.

    Of inputs that span n directions of B it is c where ‖D‖_F = c√(An/B); between the two is their geometric mean.
    """
    torch.manual_seed(0)
    layer = nn.Linear(9, rows, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(0.1)
    P = BNP(decay=0.0, damping=0.0) @ Polar(damping=0.0, gain=1.5)
    optimizer, before = PreconditionedGD(layer, lr=0.1, preconditioner=P, engine=engine), layer.weight.detach().clone()
    # White already, so that the step in z is that in p; four samples: the other inputs are 0.
    x = 2 * torch.eye(4, 9).double() if n == 4 else torch.linalg.qr(torch.randn(200, 9).double()).Q * 200**0.5
    assert "steps ×" not in optimizer.explain().rows[0].why
    (layer(x) * torch.randn(len(x), rows).double()).mean().backward()
    optimizer.step()
    D, directions = (before - layer.weight.detach()) / 0.1, min(rows, n)
    lengths = 1.5 * (rows * directions / 9) ** 0.5, 1.5 * (rows * n / 9) ** 0.5
    torch.testing.assert_close(float(D.norm()), (lengths[0] * lengths[1]) ** 0.5, rtol=1e-6, atol=0)
    told = f"{rows} output{'s' * (rows != 1)}: steps × {(n / directions) ** 0.25:.2g}" in optimizer.explain().rows[0].why
    assert told == (rows < n)


def _moved(outer: Preconditioner, small: float, engine: str, start: float = 0.01) -> torch.Tensor:
    """What the first step makes of W·s where inputs are s·h, and the parameters W/s: the same layer in z, whatever s is."""
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(start / small * torch.randn(4, 6, generator=generator, dtype=torch.float64))
    before = layer.weight.detach().clone()
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=outer @ Polar(), momentum=Momentum(0.9), engine=engine)
    (layer(small * h) * torch.randn(40, 4, generator=generator, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return small * (layer.weight.detach() - before)


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("outer", [BNP(), Whitening()], ids=["BNP", "Whitening"])
def test_steps_for_small_inputs_are_between_those_in_outputs_and_those_in_weights(outer: Preconditioner, engine: str) -> None:
    """ℓ = √σ for inputs of root mean square σ < 1, 1 for larger ones while outputs are below 1, and for parameters that are zero."""
    of_one = _moved(outer, 0.2, engine)
    torch.testing.assert_close(_moved(outer, 0.02, engine), 0.1**0.5 * of_one, rtol=1e-9, atol=0)
    large = _moved(outer, 2.0, engine)
    torch.testing.assert_close(_moved(outer, 20.0, engine), large, rtol=1e-9, atol=0)
    assert of_one.norm() < 0.5 * large.norm()  # √0.2, about
    for small in (0.02, 20.0):
        torch.testing.assert_close(_moved(outer, small, engine, start=0.0), large, rtol=1e-9, atol=0)
