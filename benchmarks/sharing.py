"""What a rank does and sends in a step, of sixteen square layers over two and four ranks, on processors of this machine with gloo.

    python benchmarks/sharing.py --recipes muon,soap --width 256 --rounds 3

Seconds are those of processors in ``step()``, of 23 steps after the first: of the rank that spends most, the share of what as many processes
spend at the same time that each do all the work; the median of some rounds. ``thread`` is the thread that steps; ``process`` has besides
gloo's, which move what is sent through sockets. Bytes are what the rank that gives most gives to collectives, counted at each call.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from distributed import shares
from distributed.pool import Pool

LAYERS = 16


def spent(pool: Pool, recipe: str, wrap: str, width: int, rounds: int) -> tuple[float, float]:
    """(process, thread): of the rank that spends most, the share of one that does all the work; NaN of no rounds."""
    if not rounds:
        return math.nan, math.nan
    found = []
    for _ in range(rounds):
        alone, divided = (pool.run(shares.seconds, recipe, how, LAYERS, width) for how in ("alone", wrap))
        found.append([max(part[i] for part in divided) * pool.world / sum(one[i] for one in alone) for i in (0, 1)])
    process, thread = (statistics.median(part) for part in zip(*found, strict=True))
    return process, thread


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
    print(
        "| recipe | wrapper | ranks | process | thread | bytes / gradients | input statistics / gradients |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        pools = [Pool(Path(folder) / str(n), n) for n in (2, 4)]
        try:
            for pool in pools:
                pool.folder.mkdir()
            for recipe in options.recipes.split(","):
                for wrap in options.wraps.split(","):
                    for pool in pools:
                        process, thread = spent(pool, recipe, wrap, options.width, options.rounds)
                        total, inputs = sent(pool, recipe, wrap, options.width)
                        row = f"{process:.2f} | {thread:.2f} | {total:.2f} | {inputs:.2f}"
                        print(f"| {recipe} | {wrap} | {pool.world} | {row} |", flush=True)
        finally:
            for pool in pools:
                pool.stop()


if __name__ == "__main__":
    main()
