"""What a step launches, waits for and keeps on a device, counted on a pretended one: no GPU is needed, a C++ compiler is.

python benchmarks/launches.py [recipe ...] [--width 32] [--vocabulary 64] [--where reads]

A GPT of 148 tensors, steps 11 to 20; counts do not depend on the machine, and on sizes only where a recipe does (ranks, blocks).
Behind a number stand the limit in force and the goal, of ``tests/device/table.py``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from device.building import Unavailable
from device.driving import Cost, cost
from device.gpt import GPT
from device.pretended import pretending
from device.table import ROWS, Limits

COLUMNS = {
    "launches": "launches",
    "worst": "worst step",
    "reads": "host reads",
    "temporaries": "temporaries B/param",
    "worst_temporaries": "worst",
}


def cells(found: Cost, now: Limits, goal: Limits) -> list[str]:
    """The table's row: each number, green where it reaches the goal, red where it passes the limit in force."""
    out = []
    for what in COLUMNS:
        value, limit, aim = (getattr(x, what) for x in (found, now, goal))
        color = "green" if value <= aim else "red" if value > limit else "yellow"
        out.append(f"[{color}]{value:.4g}[/] [dim]({limit:g} → {aim:g})[/]")
    return [*out, f"{found.hooks:.4g}", f"{found.mixed}", f"{found.copies}", f"{found.solvers}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"of {', '.join(ROWS)}; all, if left out")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument(
        "--where", choices=("launches", "reads", "mixed", "scattered", "solvers"), help="and say by which operations"
    )
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(ROWS):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("recipe", *COLUMNS.values(), "of it in hooks", "mixed", "copies", "solvers")
    details: list[str] = []
    console = Console()
    with pretending(), console.status("counting …"):
        for name in options.recipes or ROWS:
            row = ROWS[name]
            found = cost(row.make, GPT(options.width, vocabulary=options.vocabulary))
            table.add_row(name, *cells(found, row.now, row.goal))
            if options.where:
                details += [
                    f"{name}: {n / len(found.steps):.1f} {what}" for what, n in found.where(options.where).most_common(12)
                ]
    console.print(table)
    for line in details:
        console.print(line, markup=False)


if __name__ == "__main__":
    try:
        main()
    except Unavailable as why:
        sys.exit(f"no pretended device: {why}")
