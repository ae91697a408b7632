"""κ, optimum and iterations against NumPy, with formulas instead of autograd and scikit-learn's own arrays."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine

from precond.lab.workloads.logistic import METHODS, Descent, Logistic, descents, logistic

L2 = 1e-3
LOADS: dict[str, Any] = {"wine": load_wine, "breast-cancer": load_breast_cancer}


@pytest.fixture(scope="module", params=list(LOADS))
def case(request: pytest.FixtureRequest) -> tuple[Logistic, dict[str, Descent], Any]:
    problem = logistic(request.param, L2)
    found = descents(problem, limit=2000)
    assert [d.label for d in found] == list(METHODS)
    return problem, {d.label: d for d in found}, LOADS[request.param](return_X_y=True)


def softmax(a: Any) -> Any:
    e = np.exp(a - a.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def standard(X: Any) -> Any:
    return np.concatenate([(X - X.mean(0)) / X.std(0), np.ones((len(X), 1))], 1)


def test_the_optimum_has_no_gradient(case: Any) -> None:
    problem, _, (X, y) = case
    # Split and order of the examples do not matter to the sums.
    W, P, Z = problem.optimum.numpy(), problem.P.numpy(), standard(X)
    z = np.linalg.solve(P, W.T)
    g = Z.T @ (softmax(Z @ z) - np.eye(problem.classes)[y]) / len(y) + 2 * L2 * z
    assert np.abs(g).max() < 1e-7  # the data sets hold features in float32


def test_kappa_is_that_of_the_formula(case: Any) -> None:
    problem, found, (X, _) = case
    W, P, Z, K = problem.optimum.numpy(), problem.P.numpy(), standard(X), problem.classes
    p = softmax(Z @ np.linalg.solve(P, W.T))
    S = np.einsum("nk,kl->nkl", p, np.eye(K)) - p[:, :, None] * p[:, None, :]
    H = np.einsum("nkl,ni,nj->kilj", S, Z, Z).reshape(K * Z.shape[1], -1) / len(Z) + 2 * L2 * np.eye(K * Z.shape[1])
    # Without the common shift of all classes, which has the eigenvalue 2λ of the penalty alone, once per feature.
    Q = np.kron(np.linalg.svd(np.ones((1, K)))[2][1:].T, np.eye(Z.shape[1]))
    H = Q.T @ H @ Q
    values = np.linalg.eigvalsh(H)
    assert found["GD, standardized data"].kappa == pytest.approx(values[-1] / values[0], rel=1e-6)
    back = np.kron(np.eye(K - 1), np.linalg.inv(P))
    values = np.linalg.eigvalsh(back.T @ H @ back)
    assert found["GD"].kappa == pytest.approx(values[-1] / values[0], rel=1e-2)  # rounding of 1e-16 at κ up to 1e12
    assert found["GD"].kappa > 1e8


def test_bnp_on_raw_data_goes_the_way_of_standardized_data(case: Any) -> None:
    _, found, _ = case
    bnp, standardized = found["BNP, exact statistics"], found["GD, standardized data"]
    assert bnp.kappa == pytest.approx(standardized.kappa, rel=1e-6)
    assert bnp.reached == standardized.reached is not None
    assert bnp.iterations == standardized.iterations
    assert bnp.gap == pytest.approx(standardized.gap, rel=1e-4, abs=1e-9)


def test_iterations_are_those_of_a_loop_in_numpy(case: Any) -> None:
    problem, found, (X, y) = case
    Z, hot = standard(X), np.eye(problem.classes)[y]
    lr, z = found["GD, standardized data"].lr, np.zeros((Z.shape[1], problem.classes))

    def gap(z: Any) -> float:
        p = softmax(Z @ z)
        return float(-np.log(p[np.arange(len(y)), y]).mean() + L2 * (z**2).sum() - problem.lowest)

    start, count = gap(z), 0
    while gap(z) > 1e-6 * start:
        z = z - lr * (Z.T @ (softmax(Z @ z) - hot) / len(y) + 2 * L2 * z)
        count += 1
    assert abs(count - found["GD, standardized data"].reached) <= 1


def test_raw_data_are_out_of_reach(case: Any) -> None:
    _, found, _ = case
    for label in METHODS[:2]:
        assert found[label].reached is None
        assert found[label].predicted > 1e6
    cautious = found["GD, cautious step"].gap
    assert cautious[-1] < cautious[0]
    assert list(cautious) == sorted(cautious, reverse=True)


@pytest.mark.parametrize(("name", "l2", "words"), [("digits", 1e-3, "data must be one of"), ("wine", 0, "l2 must be > 0")])
def test_bad_input(name: str, l2: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logistic(name, l2)
