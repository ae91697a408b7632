"""How often the intervals of trace and diagonal hold: dense matrices of known spectra in float64, many seeds.

python benchmarks/intervals.py [--repetitions 600]
"""

from __future__ import annotations

import argparse

import torch
from harness import table
from torch import Tensor

from precond.analysis.curvature import diagonal, trace

N = 200
METHODS = ("hutchinson", "hutch++", "xtrace")


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    i = torch.arange(1, N + 1, dtype=torch.float64)
    flat, both = (draw(N, generator=generator, dtype=torch.float64) for draw in (torch.rand, torch.randn))
    return {
        "1 to 2": 1 + flat,
        "1/i": 1 / i,
        "1/i²": i**-2,
        "0.9^i": 0.9**i,
        "ten of 1, others 1e-3": torch.where(i <= 10, 1.0, 1e-3).double(),
        "one of 1, others 1e-6": torch.where(i <= 1, 1.0, 1e-6).double(),
        "one of 100, others 0 to 1": torch.where(i <= 1, 100.0, flat),
        "normal": both,
        "normal/i": both / i,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=600)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    basis = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    for what, estimate in (("trace", trace), ("diagonal, entries of all seeds", diagonal)):
        rows = [["eigenvalues", *(f"{method}, {products}" for method in METHODS for products in (12, 48, 96))]]
        for name, values in spectra().items():
            A = (basis * values) @ basis.T
            truth = A.trace() if what == "trace" else A.diagonal()
            row = [name]
            for method in METHODS:
                for products in (12, 48, 96):
                    held = torch.zeros(())
                    for seed in range(repetitions if what == "trace" else 50):
                        low, high = estimate(A, products=products, method=method, seed=seed).interval()
                        low, high = (x[0] if isinstance(x, tuple) else x for x in (low, high))
                        held += ((low <= truth) & (truth <= high)).double().mean()
                    row.append(f"{100 * float(held) / (seed + 1):.1f}")
            rows.append(row)
        print(f"\n{what}: % of 95 % intervals that hold, by method and products")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
