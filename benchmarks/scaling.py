"""What a step costs per rank from 8 to 1,024 GPUs, by calculation: bytes that owners exchange, operations, and their share of the time.

    python benchmarks/scaling.py --width 4096 --layers 32 --tokens 4194304

Nothing is measured. The model is printed with its numbers: a transformer with 12·width² numbers a layer, a rate of matrix products, a
bandwidth per GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from precond.optim.ranks.exchange import balanced


@dataclass(frozen=True)
class Machine:
    """A GPU and its network.

    Attributes:
        flops: of products of matrices, per second.
        roots: the same of decompositions.
        bandwidth: bytes per second that one GPU sends while it receives as many.
        latency: seconds of a collective over n ranks, times log₂ n.
    """

    flops: float = 4e14
    roots: float = 2e13
    bandwidth: float = 5e10
    latency: float = 2e-5


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """The matrices of a transformer: q, k, v as one, the projection, and two of the MLP, a layer."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


PRODUCTS = {
    "muon": lambda a, b: 5 * (4 * min(a, b) ** 2 * max(a, b) + 2 * min(a, b) ** 3),
    "soap": lambda a, b: sum(6 * a * b * n for n in (a, b) if n <= 10_000),
    "auto": lambda a, b: 6 * a * b * 32 + 8 * a * b * 64,
}
"""Operations of a step of a matrix (A, B): Newton–Schulz five times; two rotations and a factor of each side up to 10,000; products with
32 and 64 directions."""
ROOTS = {
    "muon": lambda a, b: 0,
    "soap": lambda a, b: sum(6 * n**3 for n in (a, b) if n <= 10_000) / 10,
    "auto": lambda a, b: 10 * 64 * b**2 / 8,
}
"""Operations of decompositions in a step, on the mean: a product and QR each 10 steps; subspace iterations each 8."""


def row(recipe: str, n: int, matrices: list[tuple[int, int]], tokens: int, machine: Machine) -> list[float]:
    """(GB sent, s of sending, s of matrices, that by the mean, s of backward) of the busiest rank of n, under FSDP2."""
    work = [PRODUCTS[recipe](a, b) for a, b in matrices]
    roots = [ROOTS[recipe](a, b) for a, b in matrices]
    seconds = [w / machine.flops + r / machine.roots for w, r in zip(work, roots, strict=True)]
    owners = balanced(seconds, n)
    own = [0.0] * n
    sent = [0.0] * n
    for k, (owner, (a, b)) in enumerate(zip(owners, matrices, strict=True)):
        own[owner] += seconds[k]
        sent[owner] += 4 * a * b  # steps back, float32
    parameters = sum(a * b for a, b in matrices)
    longest = max(own)
    moved = 4 * parameters / n + max(sent)
    sending = moved / machine.bandwidth + 2 * machine.latency * n.bit_length()
    backward = 4 * parameters * tokens / n / machine.flops
    return [moved / 1e9, sending, longest, longest * n / sum(seconds), backward]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2**22, help="of a step, all ranks together")
    args = parser.parse_args()
    matrices, machine = shapes(args.width, args.layers), Machine()
    print(f"{len(matrices)} matrices, {sum(a * b for a, b in matrices):,} numbers; {args.tokens:,} tokens a step; {machine}")
    print(
        "Sending and matrices come after the backward pass: share is what they take of all three. Statistics of inputs are left out."
    )
    print(
        f"{'recipe':7}{'GPUs':>6}{'GB sent':>9}{'sending s':>11}{'matrices s':>12}{'× mean':>8}{'backward s':>12}{'share':>8}"
    )
    for recipe in PRODUCTS:
        for n in (8, 16, 32, 64, 128, 256, 512, 1024):
            gigabytes, sending, longest, balance, backward = row(recipe, n, matrices, args.tokens, machine)
            share = (sending + longest) / (sending + longest + backward)
            print(f"{recipe:7}{n:6}{gigabytes:9.2f}{sending:11.4f}{longest:12.4f}{balance:8.2f}{backward:12.3f}{share:8.1%}")


if __name__ == "__main__":
    main()
