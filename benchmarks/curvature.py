"""Hessian products and eigenvalues, counted in products and in gradients of time, against peers where they are installed.

Times are CPU time of one thread, so that other work on the machine counts as little as can be.

python benchmarks/curvature.py [products] [operators] [layers] [estimates] [ends] [kappa] [limit]
"""

from __future__ import annotations

import importlib
import operator
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from harness import table, take_turns
from torch import Tensor, nn

from precond.algebra import vec
from precond.analysis.curvature import (
    Objective,
    condition_number,
    eigenvalues,
    ekfac,
    fisher,
    gauss_newton,
    hessian,
    jacobian,
    kfac,
    restricted,
    to_scipy,
    trace,
)
from precond.analysis.curvature.products import CurvatureMap
from precond.analysis.curvature.symmetric import stacked
from precond.lab.workloads import load_data

CROSS = nn.CrossEntropyLoss()
PEERS = {"curvlinops": "curvlinops-for-pytorch", "pyhessian": "PyHessian", "hessian_eigenthings": "hessian-eigenthings"}


def peers() -> dict[str, ModuleType]:
    """The peers that can be imported; why the others are skipped."""
    found = {}
    for name, package in PEERS.items():
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            print(f"skipped {name}: {error}; pip install -c constraints.txt {package}")
    return found


def mlp() -> nn.Module:
    """784-256-128-10, 235,146 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))


def convnet() -> nn.Module:
    """Two convolutions and two linear layers, 191,911 parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 55), nn.ReLU(), nn.Linear(55, 10))


def fashion(count: int) -> tuple[Tensor, Tensor]:
    part = load_data("fashion-mnist").parts["train"]
    return part.inputs[:count], part.targets[:count]


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    params = list(model.parameters())
    return lambda: torch.autograd.grad(CROSS(model(x), y), params)


def _pulled(package: ModuleType, single: Any, v: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: package.hessian_vector_product(single.gradsH, single.params, list(v))


def products(available: dict[str, ModuleType]) -> None:
    """Time of one product on a fixed batch over the time of a gradient."""
    rows = [["model", "batch", "what", "ms", "gradients"]]
    for name, build, batch in (("MLP 235 k", mlp, 512), ("MLP 235 k", mlp, 2000), ("conv net 192 k", convnet, 128)):
        x, y = fashion(batch)
        model = build()
        params = list(model.parameters())
        v = tuple(torch.randn_like(p) for p in params)
        flat, objective = vec.flatten(v), Objective(model, CROSS, [(x, y)])
        H = hessian(objective)
        block = stacked([tuple(torch.randn_like(p) for p in params) for _ in range(8)])
        kept = lambda f=model, x=x, y=y, p=params: torch.autograd.grad(CROSS(f(x), y), p, create_graph=True)  # noqa: E731
        run: dict[str, Callable[[], object]] = {"gradient": gradient_of(model, x, y), "gradient, its graph kept": kept}
        run["product"] = lambda H=H, v=v: H.mv(v)
        run["8 vectors as a block"] = lambda H=H, block=block: H.mm(block)
        run["set-up"] = lambda o=objective: hessian(o)._graph(0)
        if "curvlinops" in available:
            theirs = available["curvlinops"].HessianLinearOperator(model, CROSS, params, [(x, y)], check_deterministic=False)
            run["curvlinops"] = lambda A=theirs, flat=flat: A @ flat
        if "hessian_eigenthings" in available:
            package = available["hessian_eigenthings"]
            other = package.HessianOperator(model, [(x, y)], package.supervised_loss(CROSS))
            run["hessian_eigenthings"] = lambda A=other, flat=flat: A.matvec(flat)
        if "pyhessian" in available:
            package = available["pyhessian"]
            loader = package.hessian(model, CROSS, dataloader=[(x, y)], cuda=False)
            run["pyhessian, loader"] = lambda h=loader, v=v: h.dataloader_hv_product(list(v))
            single = package.hessian(model, CROSS, data=(x, y), cuda=False)
            run["pyhessian, one batch"] = _pulled(package, single, v)
        times = take_turns(run, rounds=10, warm=1, clock=time.process_time)
        for what, seconds in times.items():
            share = seconds / times["gradient"] / (8 if "block" in what else 1)
            rows.append(
                [name, str(batch), what, f"{1e3 * seconds:.2f}", f"{share:.2f}" + (" a vector" if "block" in what else "")]
            )
        print(*rows[-len(times) :], sep="\n", file=sys.stderr)
    print(table(rows))


def against(
    available: dict[str, ModuleType], rows: list[list[str]], model: str, pairs: dict[str, tuple[Callable, Callable | None]]
) -> None:
    """One row each: ours, curvlinops', their ratio, taken in turns."""
    for what, (ours, theirs) in pairs.items():
        run = {"ours": ours} | ({"theirs": theirs} if "curvlinops" in available and theirs is not None else {})
        times = take_turns(run, rounds=7, warm=1, clock=time.process_time)
        other = times.get("theirs")
        shown = ["-", "-"] if other is None else [f"{1e3 * other:.2f}", f"{other / times['ours']:.1f}"]
        rows.append([model, what, f"{1e3 * times['ours']:.2f}", *shown])
        print(*rows[-1], file=sys.stderr, flush=True)


def operators(available: dict[str, ModuleType]) -> None:
    """Products of Jacobians, Gauss–Newton and Fisher matrices and of sub-matrices, against curvlinops'; set up before."""
    rows = [["model, batch", "product", "precond, ms", "curvlinops, ms", "quotient"]]
    package: Any = available.get("curvlinops")
    for name, build, batch in (("MLP 235 k, 512", mlp, 512), ("conv net 192 k, 128", convnet, 128)):
        (x, y), model = fashion(batch), build()
        params = list(model.parameters())
        v, data, quiet = tuple(torch.randn_like(p) for p in params), [(x, y)], {"check_deterministic": False}
        objective, listed, u = Objective(model, CROSS, data), list(v), torch.randn(batch, 10)
        J = jacobian(objective)
        ours: dict[str, Callable] = {
            "J v": lambda J=J, v=v: J.mv(v),
            "Jᵀu": lambda J=J, u=u: J.rmv((u,)),
            "J v, with its set-up": lambda o=objective, v=v: jacobian(o).mv(v),
            "Gauss–Newton": partial(gauss_newton(objective).mv, v),
            "empirical Fisher, with its set-up": lambda o=objective, v=v: fisher(o).mv(v),
            "empirical Fisher": partial(fisher(objective).mv, v),
            "sampled Fisher": partial(fisher(objective, "sampled").mv, v),
            "Hessian of the last layer": partial(restricted(hessian(objective), [len(v) - 2, len(v) - 1]).mv, v[-2:]),
        }
        theirs: dict[str, Callable] = {}
        if package is not None:
            A = package.JacobianLinearOperator(model, params, data, **quiet)
            B = package.TransposedJacobianLinearOperator(model, params, data, **quiet)
            n = sum(p.numel() for p in params)
            entries = list(range(n - sum(p.numel() for p in params[-2:]), n))
            whole = package.HessianLinearOperator(model, CROSS, params, data, **quiet)
            last = package.SubmatrixLinearOperator(whole, entries, entries)
            theirs = {
                "J v": lambda A=A, v=listed: A @ v,
                "J v, with its set-up": lambda p=params, m=model, d=data, q=quiet, v=listed: (
                    package.JacobianLinearOperator(m, p, d, **q) @ v
                ),
                "empirical Fisher, with its set-up": lambda p=params, m=model, d=data, q=quiet, v=listed: (
                    package.EFLinearOperator(m, CROSS, p, d, **q) @ v
                ),
                "Jᵀu": lambda B=B, u=u: B @ [u],
                "Hessian of the last layer": partial(operator.matmul, last, vec.flatten(v[-2:])),
            }
            for what, kind in (("Gauss–Newton", "GGN"), ("empirical Fisher", "EF"), ("sampled Fisher", "FisherMC")):
                theirs_ = getattr(package, f"{kind}LinearOperator")(model, CROSS, params, data, **quiet)
                theirs[what] = lambda A=theirs_, v=listed: A @ v
        against(available, rows, name, {what: (f, theirs.get(what)) for what, f in ours.items()})
    print(table(rows))


def layers(available: dict[str, ModuleType]) -> None:
    """K-FAC and EKFAC from data to a first product, and further products and damped inverses, against curvlinops'."""
    rows = [["model, batch", "what", "precond, ms", "curvlinops, ms", "quotient"]]
    package: Any = available.get("curvlinops")
    for name, build, batch in (("MLP 235 k, 512", mlp, 512), ("conv net 29 k, 128", small_convnet, 128)):
        (x, y), model = fashion(batch), build()
        params, data = list(model.parameters()), [(x, y)]
        v = tuple(torch.randn_like(p) for p in params)
        objective, listed = Objective(model, CROSS, data), list(v)

        def their(kind: str, fisher_type: str, params=params, model=model, data=data) -> Any:
            return getattr(package, f"{kind}LinearOperator")(
                model, CROSS, params, data, fisher_type=fisher_type, separate_weight_and_bias=False, check_deterministic=False
            )

        pairs: dict[str, tuple[Callable, Callable | None]] = {}
        for what, make, kind, ours, theirs in (
            ("K-FAC, exact", kfac, "KFAC", "exact", "type-2"),
            ("K-FAC, sampled", kfac, "KFAC", "sampled", "mc"),
            ("K-FAC, empirical", kfac, "KFAC", "empirical", "empirical"),
            ("EKFAC, exact", ekfac, "EKFAC", "exact", "type-2"),
            ("EKFAC, empirical", ekfac, "EKFAC", "empirical", "empirical"),
        ):
            pairs[what] = (
                lambda make=make, o=objective, k=ours, v=v: make(o, k).mv(v),
                lambda f=their, k=kind, t=theirs, v=listed: f(k, t) @ v,
            )
        K = kfac(objective)
        inverse = K.inverse(1e-3)
        pairs["K-FAC, a further product"] = (partial(K.mv, v), None)
        pairs["K-FAC, inverse, a further product"] = (partial(inverse.mv, v), None)
        pairs["K-FAC, inverse from data"] = (lambda o=objective, v=v: kfac(o).inverse(1e-3).mv(v), None)
        if package is not None:
            A = their("KFAC", "type-2")
            inverted: Any = lambda A: package.KFACInverseLinearOperator(A, damping=1e-3, use_exact_damping=True)  # noqa: E731
            B = inverted(A)
            pairs["K-FAC, a further product"] = (partial(K.mv, v), lambda A=A, v=listed: A @ v)
            pairs["K-FAC, inverse, a further product"] = (partial(inverse.mv, v), lambda B=B, v=listed: B @ v)
            pairs["K-FAC, inverse from data"] = (
                pairs["K-FAC, inverse from data"][0],
                lambda f=their, g=inverted, v=listed: g(f("KFAC", "type-2")) @ v,
            )
        against(available, rows, name, pairs)
    print(table(rows))


def small_convnet() -> nn.Module:
    """Two convolutions and a linear layer, 28,938 parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(288, 80), nn.ReLU(), nn.Linear(80, 10))


def estimates(available: dict[str, ModuleType]) -> None:
    """The trace of a trained network's Hessian (4,810 entries) from 96 products, in time and in error over 20 seeds, against curvlinops'."""
    rows = [["method", "precond, ms", "curvlinops, ms", "quotient", "rms error", "curvlinops'", "95 % intervals that hold"]]
    package: Any = available.get("curvlinops")
    part = load_data("digits").parts["train"]
    x, y = part.inputs[:500].flatten(1).float(), part.targets[:500]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    trained(model, x, y)
    params = list(model.parameters())
    H = hessian(Objective(model, CROSS, [(x, y)]))
    exact = trace(H, method="exact").value
    A = package and package.HessianLinearOperator(model, CROSS, params, [(x, y)], check_deterministic=False)
    for method, name in (("hutchinson", "hutchinson_trace"), ("hutch++", "hutchpp_trace"), ("xtrace", "xtrace")):
        found = [trace(H, method=method, products=96, seed=seed) for seed in range(20)]
        rms = lambda values: (sum((v - exact) ** 2 for v in values) / len(values)) ** 0.5 / abs(exact)  # noqa: E731
        holds = sum(low <= exact <= high for low, high in (e.interval() for e in found))
        run = {"ours": lambda m=method: trace(H, method=m, products=96)}
        theirs = []
        if package is not None:
            torch.manual_seed(0)
            theirs = [float(getattr(package, name)(A, 96)) for _ in range(20)]
            run["theirs"] = lambda n=name: getattr(package, n)(A, 96)
        times = take_turns(run, rounds=5, warm=1, clock=time.process_time)
        other = times.get("theirs")
        shown = ["-", "-"] if other is None else [f"{1e3 * other:.0f}", f"{other / times['ours']:.1f}"]
        rows.append(
            [
                method,
                f"{1e3 * times['ours']:.0f}",
                *shown,
                f"{rms([e.value for e in found]):.1e}",
                f"{rms(theirs):.1e}" if theirs else "-",
                f"{holds} of 20",
            ]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 12) -> None:
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for at in order.split(128):
            opt.zero_grad()
            CROSS(model(x[at]), y[at]).backward()
            opt.step()


class Counted:
    """A map whose products are counted."""

    def __init__(self, apply: Callable):
        self.apply, self.count = apply, 0

    def __call__(self, x):
        self.count += 1 if x.ndim == 1 else x.shape[1]
        return self.apply(x)


def ends(available: dict[str, ModuleType]) -> None:
    """λ_max, the top five and λ_min of the trained MLP to 1e-3, in float32."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    x, y = fashion(2000)
    model = mlp()
    trained(model, x, y)
    n, params = 235146, list(model.parameters())
    gradient = take_turns({"g": gradient_of(model, x, y)}, rounds=15, warm=1, clock=time.process_time)["g"]
    exact = eigenvalues(hessian(Objective(model, CROSS, (x, y)).double()), (1, 5), "both", tol=1e-8).values
    rows = [["method", "products", "gradients of time", "largest relative error", "of λ_min"]]

    def report(name: str, f: Callable[[], tuple[Tensor, Tensor | None, int | None]]) -> None:
        start = time.process_time()
        top, low, count = f()
        seconds = time.process_time() - start
        error = ((top.double().sort().values - exact[-5:]) / exact[-5:]).abs().max().item()
        of_low = "not offered" if low is None else f"{abs(low.double() / exact[0] - 1).max().item():.0e}"
        rows.append([name, "?" if count is None else str(count), f"{seconds / gradient:.0f}", f"{error:.0e}", of_low])

    def ours():
        found = eigenvalues(hessian(Objective(model, CROSS, (x, y))), (1, 5), "both", tol=1e-3)
        assert found.converged
        return found.values[-5:], found.values[:1], found.products

    report("precond", ours)

    def arpack(apply: Callable) -> tuple[Tensor, Tensor, int]:
        counted = Counted(apply)
        operator = LinearOperator((n, n), matvec=counted, dtype="float32")
        top = eigsh(operator, k=5, which="LA", tol=1e-3, return_eigenvectors=False)
        low = eigsh(operator, k=1, which="SA", tol=1e-3, return_eigenvectors=False)
        return torch.from_numpy(top), torch.from_numpy(low), counted.count

    report("precond products, ARPACK", lambda: arpack(to_scipy(hessian(Objective(model, CROSS, (x, y)))).matvec))
    if "curvlinops" in available:
        build = available["curvlinops"].HessianLinearOperator
        report("curvlinops, ARPACK", lambda: arpack(build(model, CROSS, params, [(x, y)]).to_scipy().matvec))
    if "pyhessian" in available:
        package = available["pyhessian"]

        def power():
            values, _ = package.hessian(model, CROSS, data=(x, y), cuda=False).eigenvalues(top_n=5)
            return torch.tensor(values), None, None

        report("PyHessian, power iteration", power)
    if "hessian_eigenthings" in available:
        package = available["hessian_eigenthings"]

        def lanczos(reorthogonalize: bool | None):
            counted = Counted(package.HessianOperator(model, [(x, y)], package.supervised_loss(CROSS)).matvec)
            operator = package.LambdaOperator(counted, size=n, dtype=torch.float32, device=torch.device("cpu"))
            top = package.lanczos(operator, k=5, which="LA", tol=1e-3, max_iter=100, seed=0, reorthogonalize=reorthogonalize)
            low = package.lanczos(operator, k=1, which="SA", tol=1e-3, max_iter=100, seed=0, reorthogonalize=reorthogonalize)
            return top.eigenvalues, low.eigenvalues, counted.count

        report("hessian-eigenthings, Lanczos, its defaults", lambda: lanczos(None))
        report("hessian-eigenthings, Lanczos, reorthogonalized", lambda: lanczos(True))
    print(
        f"\nexact: λ_min {exact[0]:.5f}, top five {[round(v, 4) for v in exact[-5:].tolist()]}; a gradient {1e3 * gradient:.1f} ms"
    )
    print(table(rows))


def penalized(widths: tuple[int, ...], lam: float = 5e-4) -> CurvatureMap:
    """The Hessian of a penalized tanh network on 500 digits, in float64, after up to 3,000 iterations of L-BFGS."""
    data = load_data("digits").parts["train"]
    x, y = data.inputs[:500].flatten(1).double(), data.targets[:500]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    params = list(model.parameters())
    opt = torch.optim.LBFGS(
        params,
        max_iter=3000,
        max_eval=6000,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-8,
        tolerance_change=0,
        history_size=50,
    )

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return CROSS(out, y) + lam / 2 * sum(p.square().sum() for p in params)

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    opt.step(closure)
    return hessian(Objective(model, loss, (x, y)))


def size(H: CurvatureMap) -> int:
    return sum(t.numel() for t in H.like)


def kappa(available: dict[str, ModuleType]) -> None:
    """κ of penalized tanh networks at their minimum, to 1e-8 in float64."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    rows = [["parameters", "κ", "bound", "method", "products", "CPU s"]]
    for widths in ((64, 27, 10), (64, 134, 10), (64, 277, 277, 10)):
        H = penalized(widths)
        n = size(H)
        start = time.process_time()
        found = condition_number(H, tol=1e-8, method="lanczos", max_products=2000)
        seconds = time.process_time() - start
        value, bound = (
            (f"{found.kappa:.6e}", f"{found.kappa_error / found.kappa:.0e}") if found.why is None else (found.why, "")
        )
        rows.append([f"{n:,}", value, bound, "precond", str(found.products), f"{seconds:.2f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
        if n < 5_000:
            counted = Counted(to_scipy(H).matvec)
            operator = LinearOperator((n, n), matvec=counted, dtype="float64")
            start = time.process_time()
            top, low = (
                eigsh(operator, k=1, which=w, tol=1e-8, return_eigenvectors=False, maxiter=10**6)[0] for w in ("LA", "SA")
            )
            seconds = time.process_time() - start
            rows.append([f"{n:,}", f"{top / low:.6e}", "", "ARPACK", str(counted.count), f"{seconds:.2f}"])
    print(table(rows))


def smallest_degree(values: Tensor, tol: float, seed: int) -> int:
    """Products until the best that a Krylov space of a random start holds gives κ to ``tol``, from the dense spectrum.

    Both extreme Ritz values of exact Lanczos are the best Rayleigh quotients in that space, so that no method with as many
    products and this start has better ones; it stops by the true error, which a method without the spectrum cannot see.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    q = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, diagonal, off = [q / q.norm()], [], []
    exact = values[-1] / values[0]
    while True:
        w = values * basis[-1]
        diagonal.append(float(w @ basis[-1]))
        Q = torch.stack(basis)
        for _ in range(2):
            w = w - Q.T @ (Q @ w)
        ritz = eigvalsh_tridiagonal(diagonal, off) if off else diagonal
        if abs(ritz[-1] / ritz[0] / exact - 1) <= tol:
            return len(diagonal)
        off.append(float(w.norm()))
        basis.append(w / w.norm())


def limit(available: dict[str, ModuleType]) -> None:
    """How few products κ can be had for from a Krylov space, beside those taken."""
    rows = [["parameters", "κ", "gap of λ_min / λ_max", "least products, five starts", "precond"]]
    for widths in ((64, 27, 10), (64, 134, 10)):
        H = penalized(widths)
        values = torch.linalg.eigvalsh(H.to_dense())
        least = sorted(smallest_degree(values, 1e-8, seed) for seed in range(5))
        found = condition_number(H, tol=1e-8, method="lanczos", max_products=2000)
        gap = (values[1] - values[0]) / values[-1]
        rows.append(
            [f"{len(values):,}", f"{values[-1] / values[0]:.6e}", f"{gap:.1e}", ", ".join(map(str, least)), str(found.products)]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    print(table(rows))


def main() -> None:
    warnings.filterwarnings("ignore", message=".*backward\\(\\) with create_graph=True.*")
    torch.set_num_threads(1)
    available = peers()
    sections = {f.__name__: f for f in (products, operators, layers, estimates, ends, kappa, limit)}
    for name in sys.argv[1:] or [name for name in sections if name != "limit"]:
        print(f"\n{name}")
        sections[name](available)


if __name__ == "__main__":
    main()
