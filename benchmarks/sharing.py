"""What a rank does and sends in a step, of sixteen square layers over two and four ranks, on processors of this machine with gloo.

    python benchmarks/sharing.py --recipes muon,soap --width 256 --rounds 3

Seconds are those of processors in ``step()``, of 23 steps after the first: of the rank that spends most, the share of what as many processes
spend at the same time that each do all the work; the median of some rounds. ``thread`` is the thread that steps; ``process`` has besides
gloo's, which move what is sent through sockets. Of the thread's, ``statistics`` is what goes into the others' input statistics, ``exchange``
what goes into gradients, steps and parameters that are sent, and the rest is work on matrices. ``floors`` are what no rank
can do without: the n-th part of one process's seconds, and those of a bare program that only sends as many bytes, by calls one after the
other, or with products of matrices between them for as long as a step works there, whose seconds are not counted. Bytes are what the rank
that gives most gives to collectives, counted at each call.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from distributed import shares
from distributed.pool import Pool

LAYERS = 16


PARTS = ("process", "thread", "statistics", "exchange")
FLOORS = ("together", "apart")


def spent(pool: Pool, recipe: str, wraps: Sequence[str], width: int, rounds: int) -> dict[str, list[float]]:
    """By wrapper, of each part, and the floors: of the rank that spends most, the share of one that does all the work; NaN of no rounds."""
    found: dict[str, list[list[float]]] = {wrap: [] for wrap in wraps}
    for _ in range(rounds):
        alone, *divided = (pool.run(shares.seconds, recipe, how, LAYERS, width) for how in ("alone", *wraps))
        bare = [pool.run(shares.of_collectives, recipe, how, LAYERS, width) for how in wraps]
        for wrap, ranks, every in zip(wraps, divided, bare, strict=True):
            whole = {"process": sum(one["process"] for one in alone), "thread": sum(one["thread"] for one in alone)}
            most = max(ranks, key=lambda part: part["process"])
            row = [most.get(part, 0.0) * pool.world / whole.get(part, whole["thread"]) for part in PARTS]
            least = [max(of[how] for of in every) for how in FLOORS]
            found[wrap].append([*row, *(1 / pool.world + seconds * pool.world / whole["process"] for seconds in least)])
    none = [math.nan] * (len(PARTS) + len(FLOORS))
    return {
        wrap: [statistics.median(column) for column in zip(*rows, strict=True)] if rows else none
        for wrap, rows in found.items()
    }


def sent(pool: Pool, recipe: str, wrap: str, width: int) -> tuple[float, float]:
    """Of the rank that gives most, a step's bytes and those of input statistics, as a share of the bytes of all gradients."""
    every = pool.run(shares.bytes_per_step, recipe, wrap, LAYERS, width)
    steps = [(given, total) for steps, total in every for given in steps]
    about = max(sum(given.get(what, 0) for what in shares.ABOUT_INPUTS) / total for given, total in steps)
    return max(sum(given.values()) / total for given, total in steps), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(shares.RECIPES))
    parser.add_argument("--wraps", default="ddp,fsdp")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="0: bytes alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["recipe", "wrapper", "ranks", *PARTS, *(f"floor, calls {how}" for how in FLOORS)]
    columns += ["bytes / gradients", "input statistics / gradients"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        pools = [Pool(Path(folder) / str(n), n) for n in (2, 4)]
        try:
            for pool in pools:
                pool.folder.mkdir()
            for recipe in options.recipes.split(","):
                for pool in pools:
                    for wrap, parts in spent(pool, recipe, options.wraps.split(","), options.width, options.rounds).items():
                        row = " | ".join(f"{x:.2f}" for x in (*parts, *sent(pool, recipe, wrap, options.width)))
                        print(f"| {recipe} | {wrap} | {pool.world} | {row} |", flush=True)
        finally:
            for pool in pools:
                pool.stop()


if __name__ == "__main__":
    main()
