"""P of Meta's Distributed Shampoo: against its own steps where it is installed, and against dense sums of a state made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import precond
from diagnostics.test_peers import LR, SHAPES, check, gradients, run
from precond.analysis.curvature import Objective, condition_number, gauss_newton


def library() -> Any:
    reason = "distributed_shampoo is not installed: put the source of github.com/facebookresearch/optimizers on PYTHONPATH"
    return pytest.importorskip("distributed_shampoo", reason=reason)


LARGER = [(4, 3), (3,), (2, 3, 2, 2), (7, 9), (5, 1, 13), ()]
"""A matrix, a vector, a convolution's weight, two that are larger than blocks of 6, and a scalar."""


def meta(config: str, grafting: str | None = None, amortized: Any = None, of: dict[str, Any] | None = None, **options: Any):
    """Makes a Distributed Shampoo that keeps all in float64, from a name of a configuration and of a grafted one."""
    package = library()
    wide = {"factor_matrix_dtype": torch.float64} if "Shampoo" in config else {}
    named = {"RootInv": ["inv_factor_matrix"], "Eigendecomposed": ["factor_matrix_eigenvectors", "factor_matrix_eigenvalues"],
             "EigenvalueCorrected": ["factor_matrix_eigenvectors", "corrected_eigenvalues"]}  # fmt: skip
    for kind, names in named.items():
        if config.startswith(kind):
            wide |= {f"{name}_dtype": torch.float64 for name in names}
    given = {**wide, **(of or {}), **({} if amortized is None else {"amortized_computation_config": amortized(package)})}
    options = {"betas": (0.0, 0.9), "epsilon": 1e-4, "max_preconditioner_dim": 6, **options}
    if "target" in options:
        options["distributed_config"] = package.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=options.pop("target")
        )
    if grafting:
        beta = {} if grafting in ("SGD", "AdaGrad") else {"beta2": 0.8}
        options["grafting_config"] = getattr(package, f"{grafting}PreconditionerConfig")(**beta)
    return lambda params: package.DistributedShampoo(
        params, lr=LR, preconditioner_config=getattr(package, f"{config}PreconditionerConfig")(**given), **options
    )


def pseudo(package: Any) -> Any:
    return package.EighEigendecompositionConfig(rank_deficient_stability_config=package.PseudoInverseConfig(rank_rtol=1e-6))


def afterwards(package: Any) -> Any:
    stability = package.PerturbationConfig(perturb_before_computation=False)
    return package.EighEigendecompositionConfig(rank_deficient_stability_config=stability)


META: dict[str, dict[str, Any]] = {
    "roots": {"config": "RootInvShampoo"},
    "roots of a sum": {"config": "RootInvShampoo", "betas": (0.0, 1.0)},
    "roots, not packed": {"config": "RootInvShampoo", "of": {"use_symmetric_packing": False}},
    "roots, not merged": {"config": "RootInvShampoo", "target": math.inf},
    "roots of matrices": {"config": "RootInvShampoo", "target": 2, "max_preconditioner_dim": math.inf},
    "roots, overridden": {"config": "RootInvShampoo", "target": math.inf, "of": {"inverse_exponent_override":
                                                                              {1: 0.0, 2: {0: 0.0}, 4: 0.1}}},
    "roots, old": {"config": "RootInvShampoo", "precondition_frequency": 3},
    "roots, none yet": {"config": "RootInvShampoo", "precondition_frequency": 9},
    "KL": {"config": "RootInvKLShampoo"},
    "grafted from SGD": {"config": "RootInvShampoo", "grafting": "SGD"},
    "grafted from AdaGrad": {"config": "RootInvShampoo", "grafting": "AdaGrad"},
    "grafted from RMSprop": {"config": "RootInvShampoo", "grafting": "RMSprop"},
    "grafted from Adam": {"config": "RootInvShampoo", "grafting": "Adam"},
    "grafted, none yet": {"config": "RootInvShampoo", "grafting": "Adam", "precondition_frequency": 9},
    "eigendecomposed": {"config": "EigendecomposedShampoo"},
    "eigendecomposed, shifted afterwards": {"config": "EigendecomposedShampoo", "amortized": afterwards},
    "eigendecomposed, pseudoinverse": {"config": "EigendecomposedShampoo", "amortized": pseudo, "epsilon": 0.0,
                                        "max_preconditioner_dim": 12, "precondition_frequency": 3},
    "eigendecomposed KL": {"config": "EigendecomposedKLShampoo"},
    "eigenvalue-corrected": {"config": "EigenvalueCorrectedShampoo"},
    "eigenvalue-corrected, biased": {"config": "EigenvalueCorrectedShampoo", "use_bias_correction": False},
    "eigenvalue-corrected, undamped sum": {"config": "EigenvalueCorrectedShampoo", "of": {"drop_weighting_factor_on_gsquare": True}},
    "eigenvalue-corrected, some sides": {"config": "EigenvalueCorrectedShampoo", "of": {"ignored_basis_change_dims": {1: [0], 2: [0]},
                                                                                     "inverse_exponent_override": {2: 0.4}}},
    "eigenvalue-corrected, old bases": {"config": "EigenvalueCorrectedShampoo", "precondition_frequency": 3},
    "eigenvalue-corrected, grafted": {"config": "EigenvalueCorrectedShampoo", "grafting": "Adam"},
    "Adam": {"config": "Adam", "of": {"beta2": 0.8}},
    "SGD": {"config": "SGD"},
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_distributed_shampoo(name):
    # It holds the learning rate and the corrections of biases in float32; second moments of 5 steps are of low rank, and ε bounds them.
    check(meta(**META[name]), LARGER, steps=5, rtol=2e-6)


@pytest.mark.parametrize("grafting", [None, "Adam"])
@pytest.mark.parametrize("config", ["RootInvShampoo", "EigenvalueCorrectedShampoo"])
@pytest.mark.parametrize("beta3", [-1.0, 0.6])
def test_distributed_shampoo_s_mean_of_gradients(config, grafting, beta3):
    """With β₃ a second step of the mean, of weight 1 − β₃, that the next one does not see."""
    make = meta(config, grafting, betas=(0.8, 0.9), beta3=beta3)
    params, optimizer, _, moved = run(make, LARGER, 5, torch.float64)
    used = 0.8 if beta3 < 0 else beta3
    weights = [used * 0.2 * 0.8 ** (3 - k) for k in range(4)] + [1 - used]
    steps = [gradients(LARGER, k, torch.float64) for k in range(5)]
    mean = tuple(sum(w * g for w, g in zip(weights, each, strict=True)) / sum(weights) for each in zip(*steps, strict=True))
    for ours, theirs in zip(precond.preconditioner_of(optimizer, params).gram(mean), moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("averaging", ["GeneralizedPrimalAveraging", "ScheduleFree"])
def test_the_step_of_z_of_distributed_shampoo_s_averages(averaging):
    averaged = getattr(library(), f"{averaging}Config")()
    make = meta("RootInvShampoo", iterate_averaging_config=averaged, max_preconditioner_dim=12)
    params, optimizer, _, _ = run(make, SHAPES[:2], 4, torch.float64)
    place = lambda p: optimizer.state[p]["block_0"]["weight_buffer"].reshape(p.shape).clone()  # noqa: E731
    before, g = [place(p) for p in params], gradients(SHAPES[:2], 9, torch.float64)
    for p, grad in zip(params, g, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    for ours, b, p in zip(precond.preconditioner_of(optimizer, params).gram(tuple(g)), before, params, strict=True):
        torch.testing.assert_close(ours, (b - place(p)) / LR, rtol=2e-6, atol=2e-6 * float(ours.abs().max()))


@pytest.mark.parametrize("config", ["RootInvShampoo", "EigendecomposedShampoo", "EigenvalueCorrectedShampoo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributed_shampoo_that_keeps_float32(config, dtype):
    package = library()
    make = lambda params: package.DistributedShampoo(  # noqa: E731
        params, lr=LR, betas=(0.0, 0.9), epsilon=1.0, preconditioner_config=getattr(package, f"{config}PreconditionerConfig")()
    )
    # Differences of float32 parameters lose two digits, as heavyball's, and so do roots of factors whose κ is 1e3 with this ε.
    check(make, LARGER, steps=5, dtype=dtype, rtol=3e-4)


def test_distributed_shampoo_s_block_without_a_gradient_is_not_moved():
    p = nn.Parameter(torch.ones(8, 2))
    optimizer = meta("RootInvShampoo", "Adam", max_preconditioner_dim=4)([p])
    p.grad = torch.cat([torch.ones(4, 2), torch.zeros(4, 2)])
    optimizer.step()
    P = precond.preconditioner_of(optimizer)
    M = P.gram((torch.ones(8, 2),))[0]
    assert not M[4:].any() and M[:4].any()
    assert torch.isfinite(P.gram_solve((torch.ones(8, 2),))[0]).all()


def test_distributed_shampoo_s_inverse():
    params, optimizer, g, _ = run(meta("RootInvShampoo", "Adam"), LARGER, 5, torch.float32)
    P = precond.preconditioner_of(optimizer, params)
    again = P.gram_solve(P.gram(tuple(g)))
    for a, b in zip(again, g, strict=True):  # κ of M's factors is at most some 1e3
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def test_distributed_shampoo_without_what_it_needs():
    params, optimizer, _, _ = run(meta("RootInvShampoo", "Adam"), LARGER, 2, torch.float64)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"ask before zero_grad\(\)"):
        precond.preconditioner_of(optimizer, params)
    params, optimizer, _, _ = run(meta("SignDescent"), LARGER, 2, torch.float64)
    with pytest.raises(TypeError, match="with preconditioner_config='SignDescentPreconditionerConfig' the step is not known"):
        precond.preconditioner_of(optimizer, params)


@pytest.mark.parametrize("config", ["RootInvShampoo", "EigenvalueCorrectedShampoo"])
def test_distributed_shampoo_leaves_alone_what_has_no_gradient_yet(config):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = meta(config, "Adam")([p, q])
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    P = precond.preconditioner_of(optimizer)
    assert torch.equal(P.gram((torch.ones(3), torch.ones(2, 2)))[1], torch.ones(2, 2))


# Without the library.


def by_hand(shape: tuple[int, ...], blocks: list[dict[str, Any]], config: str, **options: Any):
    """An optimizer of that name after 4 steps, with some state of each block."""
    cls = type("DistributedShampoo", (torch.optim.Optimizer,), {"__module__": "distributed_shampoo.distributed_shampoo"})
    named = lambda name, **fields: type(name, (SimpleNamespace,), {})(**fields)  # noqa: E731
    p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    overrides = {"inverse_exponent_override": {}, "ignored_basis_change_dims": {}, "drop_weighting_factor_on_gsquare": False}
    grafting = options.pop("grafting", None)
    group = {
        "lr": 0.1, "betas": (0.9, 0.8), "beta3": 0.9, "epsilon": 0.01, "use_bias_correction": True, "start_preconditioning_step": 1,
        "max_preconditioner_dim": 2, "distributed_config": named("SingleDeviceDistributedConfig", target_parameter_dimensionality=1),
        "preconditioner_config": named(f"{config}PreconditionerConfig", **overrides),
        "grafting_config": grafting and named(f"{grafting}PreconditionerConfig", beta2=0.8, epsilon=0.1,
                                              drop_weighting_factor_on_gsquare=False),
    }  # fmt: skip
    optimizer = cls([p], {**group, **options})
    optimizer.state[p].update({"step": torch.tensor(4), **{f"block_{i}": block for i, block in enumerate(blocks)}})
    return optimizer


def positive(n: int, seed: int) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A @ A.T + torch.eye(n, dtype=torch.float64)


BLOCKS = {(0, 0): (2, 2), (0, 2): (2, 1), (2, 0): (1, 2), (2, 2): (1, 1)}
"""Of a matrix (3, 3) in blocks of 2: where each begins, and its shape."""


def test_roots_of_four_blocks_by_hand():
    """The image A X B of one entry of a block after the other; each block's step is as long as Adam's."""
    make, state, want = torch.Generator().manual_seed(1), [], torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    for seed, ((i, j), (rows, columns)) in enumerate(BLOCKS.items()):
        A, B = positive(rows, seed), positive(columns, seed + 10)
        m, r = (torch.randn(rows, columns, generator=make, dtype=torch.float64) for _ in range(2))
        lines = tuple(S[tuple(torch.triu_indices(len(S), len(S)))] for S in (A, B))
        kept = SimpleNamespace(factor_matrices=lines, inv_factor_matrices=lines, use_symmetric_packing=True)
        state.append({"shampoo": kept, "filtered_grad": m, "adagrad": r**2})
        scale = (m / ((r**2 / (1 - 0.8**4)).sqrt() + 0.1)).norm() / (A @ m @ B).norm()
        for a in range(rows):
            for b in range(columns):
                unit = torch.zeros(rows, columns, dtype=torch.float64)
                unit[a, b] = 1.0
                want[i : i + rows, j : j + columns, i + a, j + b] = scale * A @ unit @ B
    P = precond.preconditioner_of(by_hand((3, 3), state, "RootInvShampoo", grafting="Adam")).to_dense()
    torch.testing.assert_close(P @ P.T, want.reshape(9, 9), rtol=1e-10, atol=1e-10)


def test_eigenvalue_correction_of_merged_sides_by_hand():
    """A tensor (2, 1, 2, 3), merged to (4, 3) in blocks of 4."""
    Q1, Q2 = (torch.linalg.qr(positive(n, n)).Q for n in (4, 3))
    r = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = SimpleNamespace(factor_matrices=(), factor_matrices_eigenvectors=(Q1, Q2), corrected_eigenvalues=r)
    optimizer = by_hand((2, 1, 2, 3), [{"shampoo": kept}], "EigenvalueCorrectedShampoo", max_preconditioner_dim=4)
    P = precond.preconditioner_of(optimizer).to_dense()
    Q = torch.kron(Q1, Q2)
    torch.testing.assert_close(P @ P.T, Q @ torch.diag(1 / ((r.flatten() / (1 - 0.8**4)).sqrt() + 0.01)) @ Q.T)


def test_a_process_that_keeps_only_its_blocks_is_named():
    optimizer = by_hand((2, 2), [], "SGD", distributed_config=type("DDPDistributedConfig", (), {})())
    with pytest.raises(TypeError, match="with distributed_config='DDPDistributedConfig' the step is not known"):
        precond.preconditioner_of(optimizer)


def test_what_is_grafted_on_itself_is_named():
    optimizer = by_hand((2, 2), [{"adagrad": torch.ones(2, 2)}], "Adam", grafting="Adam")
    with pytest.raises(TypeError, match="with grafting_config='AdamPreconditionerConfig' the step is not known"):
        precond.preconditioner_of(optimizer)


def test_a_version_that_keeps_something_else_is_named():
    kept = SimpleNamespace(factor_matrices=(torch.eye(2),), roots=(2,))
    with pytest.raises(TypeError, match="DistributedShampoo has no 'inv_factor_matrices' in its groups"):
        precond.preconditioner_of(by_hand((2,), [{"shampoo": kept}], "RootInvShampoo"))


def test_an_empty_tensor():
    assert precond.preconditioner_of(by_hand((3, 0), [], "SGD")).gram((torch.ones(3, 0),))[0].shape == (3, 0)


def test_kappa_is_told_in_both_precisions():
    """Of a least-squares problem, cut into blocks of 2, against dense matrices."""
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, n, generator=make) * torch.logspace(0, 1, n) for n in (3, 3))
    model = torch.nn.Linear(3, 3, bias=False).double()
    state = [
        {
            "shampoo": SimpleNamespace(
                factor_matrices=(A, B), inv_factor_matrices=(A.float(), B.float()), use_symmetric_packing=False
            ),
            "filtered_grad": A,
        }
        for A, B in ((positive(rows, 1), positive(columns, 2)) for rows, columns in BLOCKS.values())
    ]
    optimizer = by_hand((3, 3), state, "RootInvShampoo")
    optimizer.param_groups[0]["params"][0] = model.weight
    optimizer.state[model.weight] = optimizer.state.pop(next(iter(optimizer.state)))
    objective = Objective(model, torch.nn.functional.mse_loss, [(x.double(), y.double())])
    P, G = precond.preconditioner_of(optimizer, objective), gauss_newton(objective)
    dense = P.to_dense()
    # Of ‖x w − y‖²/3 per row: 2/3 of the inputs' second moments, for each of 3 outputs.
    H = torch.kron(torch.eye(3).double(), 2 / 3 * (x.double().T @ x.double()) / 40)
    want = torch.linalg.cond(dense.T @ H @ dense)
    for float64 in (False, True):
        torch.testing.assert_close(condition_number(P.T @ G @ P, float64=float64).kappa, float(want), rtol=1e-6, atol=0)
