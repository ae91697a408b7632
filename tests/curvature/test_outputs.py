"""Jacobians, Fisher matrices, their square roots and parts of maps, against matrices that are made column by column in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature.cases import CROSS, examples, network
from precond.algebra import vec
from precond.algebra.maps import Diagonal
from precond.analysis.curvature import (
    CoupledSamples,
    CurvatureError,
    Objective,
    eigenvalues,
    fisher,
    gauss_newton,
    gauss_newton_root,
    hessian,
    in_float64,
    jacobian,
    restricted,
)


class Tokens(nn.Module):
    """A classifier of each position, which mixes positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.embed(x))
        return self.head(h + h.mean(1, keepdim=True)).transpose(1, 2)  # (N, C, T)


class HalfSquare(nn.Module):
    def forward(self, out, y):
        return 0.5 * (out - y).square().mean()


def mlp():
    return network(), [examples(9), examples(4, seed=2)], CROSS


def convnet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return model, [(torch.randn(n, 1, 4, 4).double(), torch.randint(0, 3, (n,))) for n in (6, 3)], CROSS


def tokens():
    torch.manual_seed(0)
    model = Tokens().double()
    y = torch.randint(0, 3, (5, 4))
    y[0, 1] = -100
    return model, [(torch.randn(5, 4, 3).double(), y)], CROSS


def regression():
    torch.manual_seed(0)
    model = network(widths=(6, 5, 2))
    return model, [(x, torch.randn(len(x), 2).double()) for x, _ in (examples(7), examples(4, seed=2))], HalfSquare()


def binary():
    model = network(widths=(6, 5, 2))
    return model, [(x, torch.stack([y % 2, y // 2], 1).double()) for x, y in (examples(7),)], nn.BCEWithLogitsLoss()


PROBLEMS = {"mlp": mlp, "conv": convnet, "tokens": tokens, "regression": regression, "binary": binary}


def of_samples(model, data, loss) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(J_n, ∇_f L_n, ∇²_f L_n) of each sample, L = Σ_n L_n, by torch's own functions of flat vectors, one sample at a time."""
    names, params = zip(*model.named_parameters(), strict=True)
    like = tuple(p.detach() for p in params)
    flat, total, found = vec.flatten(like), sum(len(y) for _, y in data), []
    for x, y in data:
        out = model(x).detach()
        for n in range(len(x)):

            def share(f, n=n, out=out, x=x, y=y):
                whole = torch.cat([out[:n], f.view(1, *out.shape[1:]), out[n + 1 :]])
                return loss(whole, y) * len(x) / total

            def outputs(p, n=n, x=x):
                return torch.func.functional_call(
                    model, dict(zip(names, vec.unflatten(p, like), strict=True)), (x[n : n + 1],)
                ).flatten()

            f = out[n].flatten()
            J = torch.autograd.functional.jacobian(outputs, flat)
            found.append((J, torch.autograd.functional.jacobian(share, f), torch.autograd.functional.hessian(share, f)))
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_jacobian(name):
    model, data, loss = PROBLEMS[name]()
    J = jacobian(Objective(model, loss, data))
    exact = torch.cat([Jn for Jn, _, _ in of_samples(model, data, loss)])
    torch.testing.assert_close(J.to_dense(), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(J.T.to_dense(), exact.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((J @ J.T).to_dense(), exact @ exact.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((J.T @ J).to_dense(), exact.T @ exact, rtol=1e-10, atol=1e-12)
    assert [t.shape for t in J.images] == [model(x).shape for x, _ in data]
    P = Diagonal(tuple(torch.rand_like(p) + 0.5 for p in model.parameters()))
    in_z = J @ P
    torch.testing.assert_close(in_z.T.to_dense(), (exact * vec.flatten(P.d)).T, rtol=1e-10, atol=1e-12)


def test_a_wide_jacobian_takes_as_many_passes_as_outputs():
    model, data, loss = regression()
    J, passes = jacobian(Objective(model, loss, data[:1])), []
    graph = J._graph(0)
    backward = graph.backward
    graph.backward = lambda u, batched=False: (passes.append(len(u[0])), backward(u, batched))[1]
    assert J.to_dense().shape == (14, 47) and sum(passes) == 14


@pytest.mark.parametrize("name", PROBLEMS)
def test_square_roots_and_fisher_matrices(name):
    model, data, loss = PROBLEMS[name]()
    objective, parts = Objective(model, loss, data), of_samples(model, data, loss)
    total = len(parts)
    G = sum(J.T @ S @ J for J, _, S in parts)
    E = total * sum(torch.outer(J.T @ g, J.T @ g) for J, g, _ in parts)
    for kind, exact in {"exact": G, "empirical": E}.items():
        R = gauss_newton_root(objective, kind)
        torch.testing.assert_close((R.T @ R).to_dense(), exact, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fisher(objective, kind).to_dense(), exact, rtol=1e-9, atol=1e-11)
        rows = R.to_dense()
        torch.testing.assert_close(rows.T @ rows, exact, rtol=1e-9, atol=1e-11)
        gram = R @ R.T
        torch.testing.assert_close(gram.to_dense(), rows @ rows.T, rtol=1e-9, atol=1e-11)
        top, of_gram = (eigenvalues(A, 2, tol=1e-8).values for A in (fisher(objective, kind), gram))
        torch.testing.assert_close(top, of_gram, rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(gauss_newton(objective).to_dense(), G, rtol=1e-9, atol=1e-11)
    gram = gauss_newton_root(objective, "empirical")
    assert (gram @ gram.T).to_dense().shape == (total, total)


@pytest.mark.parametrize("name", PROBLEMS)
def test_sampled_fisher_matrices_are_right_on_average(name):
    model, data, loss = PROBLEMS[name]()
    objective = Objective(model, loss, data)
    exact = gauss_newton(objective).to_dense()
    found = torch.stack([fisher(objective, "sampled", samples=50, seed=s).to_dense() for s in range(40)])
    # Five standard errors of the mean of each entry, of up to a few thousand entries; an error in scale by a tenth is twice that at the largest.
    errors = found.std(0) / 40**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * errors + 1e-12).all()
    assert errors.max() < 0.02 * exact.abs().max()
    F = fisher(objective, "sampled", seed=3)
    assert torch.equal(F.to_dense(), F.to_dense()) and not torch.equal(F.to_dense(), fisher(objective, "sampled").to_dense())


def test_fisher_matrices_in_float64_are_those_of_the_double_model():
    model, data, loss = mlp()
    single = Objective(model.float(), loss, [(x.float(), y) for x, y in data])
    for make in (jacobian, fisher, gauss_newton_root):
        torch.testing.assert_close(
            in_float64(make(single)).to_dense(), make(single.double()).to_dense(), rtol=1e-12, atol=1e-14
        )


def test_refusals():
    model, data, _ = mlp()
    with pytest.raises(CoupledSamples, match="no sum over samples"):
        fisher(Objective(model, lambda out, y: out.mean().square() + CROSS(out, y), data)).to_dense()
    with pytest.raises(CurvatureError, match="not convex"):
        gauss_newton_root(Objective(model, lambda out, y: out.pow(4).mean() - out.square().mean(), data)).to_dense()
    with pytest.raises(ValueError, match="kind must be one of 'exact', 'sampled', 'empirical', got 'type-2'"):
        fisher(Objective(model, CROSS, data), "type-2")
    with pytest.raises(ValueError, match="samples must be a whole number >= 1, got 0"):
        gauss_newton_root(Objective(model, CROSS, data), samples=0)
    J = jacobian(Objective(model, CROSS, data))
    with pytest.raises(ValueError, match=r"1 tensors, the objective 2 batches"):
        J.rmv((torch.zeros(9, 3),))
    with pytest.raises(ValueError, match=r"align vectors to map.images"):
        J.rmv((torch.zeros(9, 3), torch.zeros(9, 3)))


def test_sub_matrices():
    model, data, loss = mlp()
    objective = Objective(model, loss, data)
    H = hessian(objective)
    A = H.to_dense()
    sizes = [p.numel() for p in model.parameters()]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    at = lambda i: slice(ends[i], ends[i + 1])  # noqa: E731
    torch.testing.assert_close(restricted(H, "2.*").to_dense(), A[ends[2] :, ends[2] :], rtol=1e-10, atol=1e-13)
    assert len(restricted(H, "2.*").objective.params) == 2
    B = restricted(H, "0.bias", ["2.weight", 0])
    expected = torch.cat([A[at(0), at(1)], A[at(2), at(1)]])
    torch.testing.assert_close(B.to_dense(), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(B.T.to_dense(), expected.T, rtol=1e-10, atol=1e-13)
    P = Diagonal(tuple(torch.rand_like(p) + 0.5 for p in model.parameters()))
    in_z = restricted(P.T @ H @ P, [2, 3], [2, 3])
    d = vec.flatten(P.d)[ends[2] :]
    torch.testing.assert_close(in_z.to_dense(), d[:, None] * A[ends[2] :, ends[2] :] * d, rtol=1e-10, atol=1e-13)
    double = restricted(hessian(Objective(model.float(), loss, [(x.float(), y) for x, y in data]).double()), "0.*")
    assert double.like[0].dtype == torch.float64
    assert torch.isfinite(double.to_dense()).all()
    J = jacobian(Objective(model.double(), loss, data))
    torch.testing.assert_close(restricted(J.T @ J, 3, 3).to_dense(), (J.to_dense().T @ J.to_dense())[at(3), at(3)])
    for which, words in {"9.*": "it has 0.weight", 4: r"positions in \[0, 4\)", (): "is empty"}.items():
        with pytest.raises(ValueError, match=words):
            restricted(H, which)
    with pytest.raises(ValueError, match="no names; give positions"):
        restricted(P, "0.*")
