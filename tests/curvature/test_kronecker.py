"""K-FAC and EKFAC against factors and blocks that are summed sample by sample, place by place, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from curvature.cases import CROSS, examples, network
from precond.algebra import vec
from precond.algebra.maps import Dense
from precond.analysis.curvature import CoupledSamples, Objective, Singular, condition_number, ekfac, fisher, gauss_newton, kfac


class Pooled(nn.Module):
    """A linear layer at each position, whose mean is classified."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.each(x)).mean(1))


class Twice(nn.Module):
    """A layer that is applied twice, to different inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.cat([self.a(x), self.a(x.square())], 1)))


class TimeFirst(Pooled):
    def forward(self, x):
        return self.head(torch.tanh(self.each(x.transpose(0, 1))).mean(0))


def images(*shape):
    torch.manual_seed(1)
    return [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in (5, 3)]


def vectors():
    return [examples(7), examples(4, seed=2)]


def conv(**options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, **options), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers).double()


def transposed():
    torch.manual_seed(0)
    layers = [nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(28, 3)]
    return nn.Sequential(*layers).double()


def built(kind):
    torch.manual_seed(0)
    return kind().double()


PROBLEMS = {
    "mlp": lambda: (network(), vectors()),
    "conv": lambda: (conv(stride=2, padding=1, dilation=1), images(2, 6, 5)),
    "grouped": lambda: (conv(groups=2, padding=1, padding_mode="circular"), images(2, 4, 5)),
    "transposed": lambda: (transposed(), images(2, 3)),
    "positions": lambda: (built(Pooled), images(4, 3)),
    "time first": lambda: (built(TimeFirst), images(4, 3)),
    "twice": lambda: (built(Twice), vectors()),
}


def seen(model: nn.Module, x: torch.Tensor, y: torch.Tensor, scale: float):
    """Of one sample: ∂f/∂a of each place of each layer, what its weight meets there, and ∇²_f and ∇_f of its share of the loss.

    The inputs of a convolution at a place are read off its own derivative: a_t = W ĥ_t, so that ∂a_tu/∂W_u = h_t.
    """
    calls: dict[str, list] = {}
    handles = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear | nn.modules.conv._ConvNd):

            def note(m, args, out, name=name):
                calls.setdefault(name, []).append((m, out))
                return out.clone()

            handles.append(m.register_forward_hook(note))
    f = model(x[None])
    for handle in handles:
        handle.remove()
    share = lambda f: CROSS(f.view(1, -1), y[None]) * scale  # noqa: E731
    at = f.detach().flatten()
    S, g = torch.autograd.functional.hessian(share, at), torch.autograd.functional.jacobian(share, at)
    layers = {}
    for name, each in calls.items():
        d, h = [], []
        for m, out in each:
            back = torch.stack([torch.autograd.grad(c, out, retain_graph=True)[0] for c in f.flatten()])  # (C, *out)
            back = back if isinstance(m, nn.Linear) else back.movedim(2, -1)
            a = out if isinstance(m, nn.Linear) else out.movedim(1, -1)
            back, a = back.reshape(len(back), -1, a.shape[-1]), a.reshape(-1, a.shape[-1])
            d.append(back)
            rows = []
            for t in range(a.shape[0]):
                per_unit = [torch.autograd.grad(a[t, u], m.weight, retain_graph=True)[0] for u in range(a.shape[1])]
                if isinstance(m, nn.Linear | nn.Conv2d):
                    rows.append(torch.stack([w[u].flatten() for u, w in enumerate(per_unit)]))
                else:  # transposed: weight (in, out / groups, …)
                    k = m.weight.shape[1]
                    size = m.in_channels // m.groups
                    own = [(slice(u // k * size, (u // k + 1) * size), u % k) for u in range(len(per_unit))]
                    rows.append(torch.stack([w[at].flatten() for w, at in zip(per_unit, own, strict=True)]))
            h.append(torch.stack(rows))  # (T, units, n): of each unit, its own group's
        layers[name] = torch.cat(d, 1), torch.cat(h)
    return layers, S, g


def truth(model: nn.Module, data, kind: str, sharing: str) -> tuple[torch.Tensor, dict[str, list]]:
    """K-FAC's matrix in the order of the parameters, and the per-sample (δ, ĥ) of each layer."""
    total = sum(len(y) for _, y in data)
    collected: dict[str, list] = {}
    for xs, ys in data:
        for x, y in zip(xs, ys, strict=True):
            layers, S, g = seen(model, x, y, 1 / total)
            w, U = torch.linalg.eigh(S)
            V = U * w.clamp_min(0).sqrt() if kind == "exact" else total**0.5 * g[:, None]
            for name, (d, h) in layers.items():
                delta = torch.einsum("cr,ctu->rtu", V, d)
                if getattr(model.get_submodule(name), "bias", None) is not None:
                    h = torch.cat([h, torch.ones_like(h[..., :1])], -1)
                collected.setdefault(name, []).append((delta, h))
    blocks = []
    for name, samples in collected.items():
        m = model.get_submodule(name)
        groups = getattr(m, "groups", 1)
        units = samples[0][0].shape[-1]
        size = units // groups
        n = samples[0][1].shape[-1]
        K = torch.zeros(units * n, units * n, dtype=torch.float64)
        for k in range(groups):
            own = slice(k * size, (k + 1) * size)
            A, B, places = torch.zeros(n, n).double(), torch.zeros(size, size).double(), 0
            for delta, h in samples:
                h = h[:, k * size]
                if sharing == "reduce":
                    delta, h = delta.sum(1, keepdim=True), h.mean(0, keepdim=True)
                for t in range(len(h)):
                    A += torch.outer(h[t], h[t])
                    B += sum(torch.outer(dr[t, own], dr[t, own]) for dr in delta)
                places += len(h)
            at = slice(k * size * n, (k + 1) * size * n)
            K[at, at] = torch.kron(B, A / places)
        blocks.append((name, n, K))
    return in_order(model, blocks), collected


def in_order(model: nn.Module, blocks) -> torch.Tensor:
    """Matrices on [W b], rows by units, as one in the order of the flattened parameters."""
    index, start = {}, 0
    for name, p in model.named_parameters():
        index[name] = start + torch.arange(p.numel()).view(p.shape)
        start += p.numel()
    whole = torch.zeros(start, start, dtype=torch.float64)
    for name, _, K in blocks:
        m, W = model.get_submodule(name), index[f"{name}.weight"]
        if isinstance(m, nn.ConvTranspose1d):
            W = W.view(m.groups, -1, *W.shape[1:]).transpose(1, 2).flatten(0, 1)
        rows = W.flatten(1)
        if f"{name}.bias" in index:
            rows = torch.cat([rows, index[f"{name}.bias"][:, None]], 1)
        at = rows.flatten()
        whole[at[:, None], at] = K
    return whole


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kfac(name, kind, sharing):
    model, data = PROBLEMS[name]()
    exact, _ = truth(model, data, kind, sharing)
    K = kfac(Objective(model, CROSS, data), kind, sharing=sharing)
    torch.testing.assert_close(K.to_dense(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_ekfac_is_the_diagonal_of_each_block_in_the_basis_of_kfac(name, kind):
    model, data = PROBLEMS[name]()
    objective = Objective(model, CROSS, data)
    G = (gauss_newton if kind == "exact" else fisher)(objective).to_dense()
    K, E = kfac(objective, kind, sharing="reduce"), ekfac(objective, kind, sharing="reduce")
    dense = E.to_dense()
    blocks = {name: place.positions for name, place in K.places.items()}
    ends = torch.tensor([0, *(p.numel() for p in model.parameters())]).cumsum(0).tolist()
    for layer, positions in blocks.items():
        at = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in positions])
        place, factor = K.places[layer], E.factors[layer]
        # Columns of U ⊗ V as vectors of the parameters.
        count = factor.S.numel()
        units = torch.eye(count, dtype=torch.float64).view(count, *factor.S.shape)
        X = factor.U @ units @ factor.V.mT
        Q = torch.stack([vec.flatten(tuple(place.parted(x, K.like)[i] for i in positions)) for x in X], 1)
        torch.testing.assert_close(Q.T @ Q, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
        expected = (Q.T @ G[at[:, None], at] @ Q).diagonal()
        torch.testing.assert_close(factor.S.flatten(), expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(dense[at[:, None], at], (Q * expected) @ Q.T, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(dense[at[:, None], at].trace(), G[at[:, None], at].trace(), rtol=1e-9, atol=0)
    assert E.layers == K.layers == tuple(blocks)


def linear(pooled: bool):
    """A deep linear network under the squared error, of one place a sample, or of the mean over places."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(9, 5, 3).double() if pooled else torch.randn(9, 3).double()
    loss = lambda out, y: 0.5 * ((out.mean(1) if pooled else out) - y).square().sum(1).mean()  # noqa: E731
    return model, Objective(model, loss, [(x, torch.randn(9, 2).double())])


@pytest.mark.parametrize("pooled", [False, True])
def test_where_theory_says_it_is_exact(pooled):
    model, objective = linear(pooled)
    G = gauss_newton(objective).to_dense()
    K = kfac(objective, sharing="reduce" if pooled else "expand").to_dense()
    first = sum(p.numel() for p in model[0].parameters())
    for at in (slice(0, first), slice(first, len(G))):
        torch.testing.assert_close(K[at, at], G[at, at], rtol=1e-10, atol=1e-13)
    assert not K[:first, first:].any()


def test_inputs_alone_are_whitening():
    model, data = PROBLEMS["mlp"]()
    K = kfac(Objective(model, CROSS, data), "inputs")
    x = torch.cat([x for x, _ in data])
    h = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    torch.testing.assert_close(K.factors["0"].A[0], h.T @ h / len(h))
    assert torch.equal(K.factors["0"].B[0], torch.eye(5).double())


def test_sampled_factors_are_right_on_average():
    model, data = PROBLEMS["positions"]()
    objective = Objective(model, CROSS, data)
    for make in (kfac, ekfac):
        found = torch.stack([make(objective, "sampled", samples=20, seed=s).eigenvalues for s in range(30)])
        mean, error = found.sum(1).mean(), found.sum(1).std() / 30**0.5
        exact = make(objective).eigenvalues.sum()
        assert abs(mean - exact) < 4 * error and error < 0.02 * exact


def test_functions():
    model, data = PROBLEMS["conv"]()
    objective = Objective(model, CROSS, data)
    v = tuple(torch.randn_like(p) for p in model.parameters())
    for K in (kfac(objective), ekfac(objective)):
        A, one = K.to_dense(), torch.eye(len(vec.flatten(v)), dtype=torch.float64)
        damped = torch.linalg.inv(A + 1e-2 * one)
        torch.testing.assert_close(K.inverse(1e-2).to_dense(), damped, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            vec.flatten(K.inverse(1e-2).solve(v)), (A + 1e-2 * one) @ vec.flatten(v), rtol=1e-9, atol=1e-11
        )
        P = K.preconditioner(1e-2)
        torch.testing.assert_close((P @ P.T).to_dense(), damped, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(vec.flatten(P.gram(v)), damped @ vec.flatten(v), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(K.shifted(0.5).to_dense(), A + 0.5 * one, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(K.eigenvalues.sort().values, torch.linalg.eigvalsh(A), rtol=1e-8, atol=1e-12)
        block = tuple(torch.randn(3, *t.shape).double() for t in v)
        for k in range(3):
            one_by_one = K.mv(tuple(t[k] for t in block))
            torch.testing.assert_close(tuple(t[k] for t in K.mm(block)), one_by_one, rtol=1e-11, atol=1e-13)


def test_damping_apart_is_that_of_the_factors():
    model, data = PROBLEMS["mlp"]()
    K = kfac(Objective(model, CROSS, data))
    blocks = []
    for name in K.layers:
        A, B = K.factors[name].A[0], K.factors[name].B[0]
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        shift = lambda X, s: torch.linalg.inv(X + s * torch.eye(len(X), dtype=torch.float64))  # noqa: E731
        blocks.append((name, len(A), torch.kron(shift(B, 0.1**0.5 / pi), shift(A, 0.1**0.5 * pi))))
    torch.testing.assert_close(K.inverse(0.1, "apart").to_dense(), in_order(model, blocks), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="how='apart' is for Kronecker products"):
        K.shifted(1.0).inverse(0.1, "apart")


def test_a_root_is_a_preconditioner():
    model, objective = linear(False)
    K = kfac(objective)
    P, H = K.preconditioner(1e-3), gauss_newton(objective)
    assert condition_number(P.T @ H @ P).kappa_positive < 0.2 * condition_number(H).kappa_positive
    optimizer = precond.PreconditionedGD(
        model, lr=0.3, preconditioner=precond.Fixed(P), regularizers=[precond.L2(0.01, space="z")]
    )
    before, old = objective.value(), tuple(p.detach().clone() for p in model.parameters())
    g = objective.gradient()
    for p, t in zip(model.parameters(), g, strict=True):
        p.grad = t
    optimizer.step()
    step = vec.sub(old, tuple(p.detach() for p in model.parameters()))
    M = torch.linalg.inv(K.to_dense() + 1e-3 * torch.eye(len(vec.flatten(g)), dtype=torch.float64))
    expected = 0.3 * (M @ vec.flatten(g) + 0.02 * vec.flatten(old))
    torch.testing.assert_close(vec.flatten(step), expected, rtol=1e-9, atol=1e-11)
    assert objective.value() < before


def test_a_damped_root_is_damped_block_by_block():
    model, objective = linear(False)
    P = kfac(objective).preconditioner(1e-3)
    v = tuple(torch.randn_like(p) for p in model.parameters())
    first = sum(p.numel() for p in model[0].parameters())
    M, parts = P.to_dense() @ P.to_dense(), []
    for at in (slice(0, first), slice(first, len(M))):
        own = Dense(torch.linalg.cholesky(M[at, at])).damped(0.1).matrix
        parts.append(own @ own.T)
    torch.testing.assert_close(
        vec.flatten(P.damped(0.1).gram(v)), torch.block_diag(*parts) @ vec.flatten(v), rtol=1e-8, atol=1e-9
    )


def test_some_parameters():
    model, data = PROBLEMS["mlp"]()
    whole = kfac(Objective(model, CROSS, data))
    alone = kfac(Objective(model, CROSS, data, ["0.weight", "2.bias"]))
    A = whole.factors["0"].A[0][:-1, :-1]
    expected = torch.block_diag(torch.kron(whole.factors["0"].B[0], A), whole.factors["2"].B[0])
    torch.testing.assert_close(alone.to_dense(), expected, rtol=1e-10, atol=1e-13)
    single = kfac(Objective(model.float(), CROSS, [(x.float(), y) for x, y in data]).double())
    assert single.like[0].dtype == torch.float64 and len(single.layers) == 2


def test_half_precision_is_summed_in_float32():
    model, data = PROBLEMS["mlp"]()
    data = [(x.bfloat16(), y) for x, y in data]
    K = kfac(Objective(model.bfloat16(), CROSS, data))
    assert K.factors["0"].A.dtype == torch.float32 and K.mv(K.like)[0].dtype == torch.bfloat16


class Tied(nn.Module):
    """A weight that its layer shares: with a table of embeddings, or with a function."""

    def __init__(self, table: bool):
        super().__init__()
        self.table = nn.Embedding(5, 3) if table else None
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        if table:
            self.head.weight = self.table.weight

    def forward(self, x):
        h = self.table(x) if self.table is not None else torch.nn.functional.linear(x, self.head.weight.mT)
        return self.head(torch.tanh(self.inner(h)))


@pytest.mark.parametrize("made", [kfac, ekfac])
@pytest.mark.parametrize("table", [True, False])
def test_a_weight_that_others_use_too_is_refused(made, table):
    model = Tied(table).double()
    x = torch.randint(5, (6,)) if table else torch.randn(6, 5, dtype=torch.float64)
    objective = Objective(model, nn.CrossEntropyLoss(), [(x, torch.randint(5, (6,)))])
    by = "'table'" if table else "a function"
    with pytest.raises(ValueError, match=f"'(head|table).weight' is used by {by} too"):
        made(objective)
    made(objective.only(["inner.weight", "inner.bias"]))


class Sly(nn.Module):
    """A function's use of a layer's weight beside a call of the layer of which nothing comes, or in the cast of autocast."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.layer, self.last = how, nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x):
        if self.how in ("detached", "no_grad"):
            with torch.set_grad_enabled(self.how == "detached"):
                self.layer(x).sum().detach()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            h = self.layer(x)
            if self.how != "no_grad":
                h = torch.nn.functional.linear(h, self.layer.weight)
        return self.last(h.to(x.dtype))


@pytest.mark.parametrize("how", ["detached", "autocast"])
def test_another_use_is_found_behind_calls_that_lead_nowhere_and_in_another_precision(how):
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"'layer\.weight' is used by a function too"):
        kfac(Objective(Sly(how), nn.MSELoss(), [(x, torch.randn(6, 2))]))


def test_a_call_under_no_grad_is_no_use():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    model = Sly("no_grad").double()
    plain = nn.Sequential(model.layer, model.last)
    found, expected = (kfac(Objective(m, nn.MSELoss(), [(x, y)])).to_dense() for m in (model, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("made", [kfac, ekfac])
def test_a_layer_that_is_called_several_times_is_not(made):
    """Each call is heard of."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    made(Objective(model, nn.MSELoss(), [(x, x)]))


def test_refusals():
    model, data = PROBLEMS["mlp"]()
    objective = Objective(model, CROSS, data)
    with pytest.raises(Singular, match="layer '2' is singular; give a damping > 0"):
        kfac(objective).inverse()
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        kfac(objective).preconditioner(-1)
    with pytest.raises(ValueError, match="'whole' or 'apart', got 'both'"):
        kfac(objective).preconditioner(1, "both")
    with pytest.raises(ValueError, match="fisher must be one of"):
        kfac(objective, "mc")
    with pytest.raises(ValueError, match="sharing must be"):
        kfac(objective, sharing="mean")
    normalized = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"'1\.weight', '1\.bias' belong to no linear layer"):
        kfac(Objective(normalized, CROSS, data))
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' belongs to the layers '0' and '2'"):
        kfac(Objective(tied, CROSS, data))
    coupled = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    names = ["0.*", "2.*"]
    with pytest.raises(CoupledSamples, match="depend on layer '0' in another"):
        ekfac(Objective(coupled, CROSS, data, names, mode="train"))
    assert len(ekfac(Objective(coupled, CROSS, data, names)).layers) == 2
    skipped = nn.Sequential(nn.Linear(6, 3)).double()
    skipped.add_module("unused", nn.Identity())
    skipped.unused.layer = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match=r"'unused\.layer' was not called as a module"):
        kfac(Objective(skipped, CROSS, data))
