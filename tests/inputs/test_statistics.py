"""Running statistics of inputs: what weights the samples of all batches get, and what becomes of few or dead ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.layers import data
from precond import BNP, RMS, Polar, PreconditionedGD, Whitening
from precond.optim.inputs.moments import Moments, covariance

torch.set_num_threads(1)


STD = torch.tensor([0.1, 1, 30], dtype=torch.float64)


def train(sizes: list[int], decay: float, drift: float = 1.0, every: int = 1) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The state of a layer's weight after batches of some sizes, whose means drift, and the batches."""
    make = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=make, dtype=torch.float64)  # noqa: E731
    batches = [random(n, 3) * STD + 2 + drift * random(3) for n in sizes]
    model = nn.Linear(3, 2).double()
    optimizer = PreconditionedGD(model, lr=1e-3, preconditioner=BNP(decay=decay, every=every))
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer.state[model.weight], batches


def weights(sizes: list[int], decay: float) -> list[float]:
    """The weight of each batch: all samples alike at first, no sample more than by the running average's own rule."""
    out: list[float] = []
    for t, n in enumerate(sizes):
        rho = min(decay, 1 - n / sum(sizes[: t + 1]))
        out = [w * rho for w in out] + [1 - rho]
    return out


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "sizes",
    [[1] * 30, [2] * 20, [7], [6, 1, 1, 1], [1, 6, 2, 9], [64, 1, 64, 1], [1, 1000]],
    ids=lambda s: f"{s[0]}…×{len(s)}" if len(s) > 5 else str(s),
)
def test_running_moments_are_those_of_the_weighted_samples(sizes, decay):
    """The law of total variance: μ and σ² of the mixture of all batches, also at one and two samples a batch."""
    state, batches = train(sizes, decay)
    w = weights(sizes, decay)
    mean = sum(a * x.mean(0) for a, x in zip(w, batches, strict=True))
    square = sum(a * (x**2).mean(0) for a, x in zip(w, batches, strict=True))
    torch.testing.assert_close(state["mean"][0], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["variance"][0], square - mean**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "every", "k"), [(5, 16, 1), (60, 16, 1), (70, 16, 2), (128, 16, 4), (128, 3, 3), (2000, 16, 16)]
)
def test_later_every_kth_step_is_observed_and_weighs_as_much(size, every, k):
    """After 20 steps: ρᵏ for what stands for k steps, k a 32nd of the batch."""
    steps, decay = 50, 0.8
    state, batches = train([size] * steps, decay, every=every)
    observed = [t for t in range(1, steps + 1) if t <= 20 or t % k == 0]
    w: list[float] = []
    for n, t in enumerate(observed, start=1):
        rho = min(decay if t <= 20 else decay**k, 1 - 1 / n)
        w = [x * rho for x in w] + [1 - rho]
    seen = [batches[t - 1] for t in observed]
    mean = sum(a * x.mean(0) for a, x in zip(w, seen, strict=True))
    square = sum(a * (x**2).mean(0) for a, x in zip(w, seen, strict=True))
    torch.testing.assert_close(state["mean"][0], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["variance"][0], square - mean**2, rtol=1e-9, atol=1e-12)
    assert state["count"].item() == size * len(observed)


@pytest.mark.parametrize(
    ("layer", "shape", "examples"),
    [
        (nn.Linear(3, 2), (24, 3), 24),
        (nn.Linear(3, 2), (24, 50, 3), 1200),
        (nn.Linear(3, 2), (3,), 1),
        (nn.Conv1d(3, 2, 2), (24, 3, 50), 24),
        (nn.Conv1d(3, 2, 2), (3, 50), 1),
        (nn.MultiheadAttention(4, 2), (50, 24, 4), 1200),
    ],
    ids=str,
)
def test_what_counts_is_how_many_examples_a_batch_holds(layer, shape, examples):
    """Positions of one image resemble each other and count as one; two forwards of a step are one larger batch."""
    optimizer = PreconditionedGD(layer, lr=1e-3, preconditioner=BNP())
    for _ in range(2):
        x = torch.randn(shape)
        out = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        out.sum().backward()
    optimizer.step()
    found = [t.item() for state in optimizer.state.values() for key, t in state.items() if key.startswith("examples")]
    assert found and set(found) == {2 * examples}


def test_the_start_is_pooled():
    """As long as the running average would weigh a batch more than its samples deserve, all samples weigh alike."""
    sizes = [3, 1, 5, 2]
    state, batches = train(sizes, 0.99)
    x = torch.cat(batches)
    torch.testing.assert_close(state["mean"][0], x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["variance"][0], x.var(0, correction=0), rtol=1e-12, atol=1e-12)
    assert state["count"].item() == len(x)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("batch", [1, 2, 60])
def test_small_batches_find_the_variance(batch, every):
    """Averaging the variances of batches would give 0 at one sample a batch, and half the truth at two."""
    state, _ = train([batch] * (1200 // batch), decay=1 - batch / 600, drift=0.0, every=every)
    torch.testing.assert_close(state["variance"][0].sqrt(), STD, rtol=0.1, atol=0)


def test_without_decay_statistics_are_the_batch_s_own():
    state, batches = train([5, 9, 4], decay=0.0)
    torch.testing.assert_close(state["mean"][0], batches[-1].mean(0))
    torch.testing.assert_close(state["variance"][0], batches[-1].var(0, correction=0))
    assert state["count"].item() == 4


def test_one_sample_is_scaled_by_its_square_and_not_centered():
    model = nn.Linear(3, 2).double()
    optimizer = PreconditionedGD(model, lr=1.0, preconditioner=BNP(damping=0.0))
    x = torch.tensor([[3.0, -0.5, 20.0]]).double()
    model(x).sum().backward()
    before = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before[0] - model.weight, model.weight.grad / x**2)
    torch.testing.assert_close(before[1] - model.bias, model.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_dead_inputs_are_left_alone(bias, damping, decay):
    """An input that was always zero has no scale and no gradient: its weight stays, and nothing becomes inf or NaN."""
    model = nn.Linear(4, 2, bias=bias).double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(decay=decay, damping=damping))
    x = data(8, 4)
    x[:, 1] = 0
    before = model.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(before[:, 1], model.weight[:, 1])
    assert all(p.isfinite().all() for p in model.parameters())
    assert (before[:, 0] - model.weight[:, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("size", [1e-19, 3e-20, 1e-20, 1e-22, 1e-23])
@pytest.mark.parametrize("recipe", ["bnp", "whitening", "auto"])
def test_inputs_whose_squares_are_denormal_take_finite_steps(recipe, size):
    """1/σ² is no number of float32 from σ = 5e-20 on."""
    model = nn.Linear(6, 2)
    optimizer = precond.RECIPES[recipe](model)
    for k in range(3):
        optimizer.zero_grad()
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(k))
        (model(x * size) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_constant_inputs_take_bounded_steps():
    """An input that never varies has no variance; damping by its square bounds its step, and the bias learns its part."""
    model = nn.Linear(2, 1).double()
    optimizer = PreconditionedGD(model, lr=0.5, preconditioner=BNP(damping=0.01))
    x = data(16, 2)
    x[:, 1] = 5.0
    y = 3 * x[:, :1] + 7
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 1e-6 * losses[0]


def test_conv_statistics_are_two_numbers_per_channel_or_patch_entry():
    model = nn.Conv2d(4, 6, 3, groups=2)
    for conv, features in (("channel", 2), ("patch", 18)):
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(conv=conv))
        state = optimizer.state[model.weight]
        assert state["count"].shape == (2,) and state["mean"].shape == state["variance"].shape == (2, features)
        optimizer.close()


def test_damping_spares_what_is_active_and_bounds_what_is_rare():
    """ε E[h²], and for inputs that few samples show a share of the layer's mean E[h²]: ⅓(1 − 3a²N/(N+8))₊, a = E|h−μ|/σ."""
    x = (
        torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * torch.tensor([1e-2, 1.0, 30.0, 1.0])
        + 1
    )
    x[:, 3] = 0
    x[:2, 3] = torch.tensor([3.0, 5.0])  # active in 2 samples of 50
    model = nn.Linear(4, 1).double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.02))
    for _ in range(2):  # the first step knows no mean to measure deviations from
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    mean, variance, square = x.mean(0), x.var(0, correction=0), x.square().mean(0)
    activity = (x - mean).abs().mean(0) / variance.sqrt()
    share = (1 - 3 * activity**2 * 50 / 58).clamp_min(0) / 3
    assert (share[:3] == 0).all() and share[3] > 0.2
    std = optimizer.map().blocks[0][1].map.std.flatten()
    torch.testing.assert_close(std**2, variance + 0.02 * square + share * square.mean(), rtol=1e-10, atol=0)


def whitened(sizes: list[int], P: Whitening, n: int = 4) -> tuple[nn.Linear, PreconditionedGD, list[Tensor]]:
    """A layer, its optimizer after batches of correlated inputs of some sizes, and the batches."""
    make = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=make, dtype=torch.float64)  # noqa: E731
    mix = random(n, n)
    batches = [random(size, n) @ mix + random(n) for size in sizes]
    model = nn.Linear(n, 2).double()
    optimizer = PreconditionedGD(model, lr=1e-3, preconditioner=P)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer, batches


@pytest.mark.parametrize("root", ["symmetric", "cholesky"])
@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("sizes", [[6, 3, 11, 2, 8, 30], [5, 1, 1, 40, 7]], ids=str)
def test_correlations_are_shrunk_by_what_few_samples_show(sizes, decay, shrinkage, root):
    """K ← (1−γ)K + γI, γ = sn/(N + sn), 1/N = Σ w²/n over the batches: the variance of a mean with these weights."""
    _, optimizer, batches = whitened(sizes, Whitening(decay, 0.0, root, every=1, observe_steps=1, shrinkage=shrinkage))
    w, n = weights(sizes, decay), 4
    mean = sum(a * x.mean(0) for a, x in zip(w, batches, strict=True))
    C = sum(a * x.T @ x / len(x) for a, x in zip(w, batches, strict=True)) - torch.outer(mean, mean)
    N = 1 / sum(a**2 / size for a, size in zip(w, sizes, strict=True))
    gamma = shrinkage * n / (N + shrinkage * n)
    D = torch.diag(C.diagonal().rsqrt())
    K = (1 - gamma) * (D @ C @ D) + gamma * torch.eye(n).double()
    P = optimizer.map().to_dense()
    M = P @ P.T
    per_row = M[: 2 * n, : 2 * n].reshape(2, n, 2, n)
    wanted = D @ torch.linalg.inv(K) @ D
    for i in (0, 1):
        torch.testing.assert_close(per_row[i, :, i], wanted, rtol=1e-7, atol=1e-9)
        assert not per_row[i, :, 1 - i].any()


@pytest.mark.parametrize(
    ("size", "samples", "steps"),
    [
        (8, 0.0, [1, 2, 3, 4, 5, 6, 7, 8, *range(12, 21)]),  # five before each refresh, at 1, 2, 4, 8, 16, 20
        (8, 2.0, [1, 2, 4, 8, 16, 20]),  # 2·4 samples are in one batch
        (50, 2.0, [1, 2, 4, 8, 16, 20]),
        (3, 2.0, [1, 2, 3, 4, 6, 7, 8, 14, 15, 16, 18, 19, 20]),  # three batches
        (1, 2.0, [1, 2, 3, 4, 5, 6, 7, 8, *range(12, 21)]),  # eight would be needed: never more than five
    ],
)
def test_which_steps_are_observed(size, samples, steps):
    """As many before a refresh as hold cn samples, at most ``observe_steps``; an observed step moves the mean."""
    make = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 2).double()
    optimizer = PreconditionedGD(model, lr=1e-3, preconditioner=Whitening(every=20, observe_steps=5, samples=samples))
    seen = []
    for t in range(1, 21):
        before = optimizer.state[model.weight]["mean"].clone()
        optimizer.zero_grad()
        model(torch.randn(size, 4, generator=make, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        if not torch.equal(before, optimizer.state[model.weight]["mean"]):
            seen.append(t)
    assert seen == steps


@pytest.mark.parametrize("size", [8, 12, 6, 2])
def test_a_batch_of_enough_samples_replaces_the_average(size):
    """ρ = min(decay, 1 − N/cn) of the newest batch: 0 where it holds cn samples."""
    decay, samples, n = 0.9, 2.0, 4
    model, optimizer, batches = whitened([16, 16, size], Whitening(decay, every=1, observe_steps=1, samples=samples))
    rho = min(decay, max(0.0, 1 - size / (samples * n)))
    old, new = batches[1], batches[2]  # the second has replaced the first
    rho = min(rho, 1 - size / (16 + size))  # pooled while that weighs the newest less
    mean = rho * old.mean(0) + (1 - rho) * new.mean(0)
    square = rho * old.T @ old / len(old) + (1 - rho) * new.T @ new / len(new)
    state = optimizer.state[model.weight]
    torch.testing.assert_close(state["mean"][0], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["covariance"][0], square - torch.outer(mean, mean), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state["noise"].item(), rho**2 / 16 + (1 - rho) ** 2 / size)
    assert state["size"].item() == size and state["count"].item() == (size if size >= 8 else 16 + size)


@pytest.mark.parametrize("options", [{}, {"root": "cholesky"}, {"rank": 2}], ids=str)
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_bias_that_comes_or_goes_makes_another_root_at_once(options: dict, engine: str) -> None:
    """M is the inverse of E[hhᵀ] without a bias and of E[ĥĥᵀ], ĥ = [h; 1], with one, also many steps before a root is due."""
    model, make = nn.Linear(9, 2).double(), torch.Generator().manual_seed(0)
    mix = torch.randn(9, 9, generator=make, dtype=torch.float64)
    if "rank" in options:  # of the form λ̄I + U(Λ − λ̄)Uᵀ with and without the mean, on features of one variance
        mix = torch.eye(9, dtype=torch.float64)
    whitening = Whitening(every=100, damping=0.0, shrinkage=0.0, **options)
    optimizer = PreconditionedGD(model, 1e-6, preconditioner=whitening, engine=engine)
    x = torch.randn(64, 9, generator=make, dtype=torch.float64)
    x = (
        torch.linalg.qr(x - x.mean(0)).Q * 8 @ mix + 1.5
    )  # of variance 1 before they are mixed: whatever is observed, moments are these
    for t in range(10):
        model.bias.requires_grad_(t not in (6, 7))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if t >= 5:
            params = [p for p in model.parameters() if p.requires_grad]
            P = precond.preconditioner_of(optimizer, params).to_dense()
            h = torch.cat([x, x.new_ones(64, 1)], 1) if len(params) == 2 else x
            rows = torch.cat([torch.arange(18).view(2, 9), torch.arange(18, 20)[:, None]], 1)[:, : h.shape[1]]
            M = (P @ P.T)[rows[1]][:, rows[1]]
            # Of a rank the leading eigenvectors are those of a few steps of orthogonal iteration.
            off = 2e-3 if "rank" in options else 1e-6
            torch.testing.assert_close(M @ (h.T @ h / 64), torch.eye(h.shape[1], dtype=torch.float64), rtol=0, atol=off)
    optimizer.close()


@pytest.mark.parametrize("options", [{}, {"root": "cholesky"}, {"rank": 1}], ids=str)
@pytest.mark.parametrize("inner", [None, RMS(), Polar()], ids=["alone", "rms", "polar"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_look_after_a_bias_came_or_went_shows_its_root_and_changes_nothing(options: dict, inner, engine: str) -> None:
    """In steps that observe and in others: M is the inverse of E[hhᵀ], or of C, as they are known before the step, of layers alike."""

    def trained(looks: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)]).double()
        whitening = Whitening(damping=0.0, shrinkage=0.0, **options)
        preconditioner = whitening if inner is None else whitening @ inner
        optimizer = PreconditionedGD(model, 1e-2, preconditioner=preconditioner, engine=engine)
        for t in range(16):
            frozen = t in (3, 4, 12, 13)
            if t in (3, 5, 12, 14):
                for layer in model[1:]:
                    layer.bias.requires_grad_(not frozen)
                if looks:
                    for layer in model[1:]:
                        look(layer, optimizer)
            optimizer.zero_grad()
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64) + 1
            model(x).square().mean().backward()
            optimizer.step()
        return [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]

    def look(layer: nn.Linear, optimizer: PreconditionedGD) -> None:
        params = [p for p in layer.parameters() if p.requires_grad]
        P = precond.preconditioner_of(optimizer, params).to_dense()
        optimizer.explain()
        if inner is None and "rank" not in options:
            state = optimizer.state[layer.weight]
            C, mean = state["covariance"][0], state["mean"][0]
            second = C if len(params) == 2 else C + torch.outer(mean, mean)
            M = (P @ P.T)[:5, :5]  # of a row; with a bias the block of the weight, whose inverse in M⁻¹ is C too
            torch.testing.assert_close(M @ second, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (2, 9)], ids=str)
def test_layers_side_by_side_have_their_own_covariances(sizes):
    """Of few samples of many features the rows are kept, of others the covariance."""
    batches = [
        torch.randn(1, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n + k)) for k, n in enumerate(sizes)
    ]
    joined = Moments.joined([covariance(x) for x in batches])
    for k, x in enumerate(batches):
        torch.testing.assert_close(joined.spread[k], torch.cov(x[0].T, correction=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(joined.mean[k], x[0].mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("root", ["symmetric", "cholesky"])
def test_roots_of_a_stack_may_be_taken_a_few_at_a_time(root, monkeypatch):
    """As an accelerator does where a refresh would need more memory than a step."""

    def roots(many: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).double()
        monkeypatch.setattr(Whitening, "_at_once", lambda self, state: many)
        optimizer = PreconditionedGD(model, lr=1e-3, preconditioner=Whitening(root=root, every=2))
        for _ in range(4):
            model(torch.randn(20, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return [optimizer.state[layer.weight]["factor"].clone() for layer in model]

    for whole, pieces in zip(roots(5), roots(2), strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
        assert not torch.equal(whole[0], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("samples", [3, 40])  # of which only few are kept as they are
@pytest.mark.parametrize("gain", [0.3, [0.3, 0.9]], ids=["one gain", "each its own"])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, 1e200])
def test_a_covariance_is_folded_in_where_it_is(samples, gain, bad):
    """What an accelerator does without looking: a group that holds what is not finite, or whose squares are not, stays as it is."""
    x, known = data(2 * samples, 8).view(2, samples, 8), torch.stack([torch.eye(8), 2 * torch.eye(8)]).double()
    seen = [x[k : k + 1].clone() for k in range(2)]
    if bad is not None:
        seen[1][0, 0, 0] = bad
    mean = torch.zeros(2, 8).double()
    new, S = Moments.joined([covariance(t) for t in seen]), known.clone()
    if bad is not None:
        new.bound_to_(mean, S)
        assert torch.equal(new.mean[1], mean[1]) and new.variance.isfinite().all() and not new.absolute[1].any()
    column = gain if isinstance(gain, float) else torch.tensor(gain, dtype=torch.float64)[:, None]
    new.fold_spread_(S, column)
    for k, g in enumerate([gain, gain] if isinstance(gain, float) else gain):
        expected = known[k].lerp(torch.cov(x[k].T, correction=0), g)
        torch.testing.assert_close(S[k], known[k] if bad is not None and k else expected, rtol=1e-12, atol=1e-12)
