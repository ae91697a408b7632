"""Writes what the tests reach into ``docs/reliability.md``, wing by wing, from what ``coverage json`` wrote.

python tests/covered.py coverage.json [--of optim --with "tests/contract tests/peers"]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs/reliability.md"
PLACE = re.compile(r"(<!-- coverage of (\w+) -->\n).*?(<!-- end of coverage -->)", re.DOTALL)
COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def folder(file: str) -> str:
    """Two levels below ``precond``: a wing and what it is divided into."""
    inside = Path(file).parts[Path(file).parts.index("precond") + 1 : -1]
    return "/".join(inside[:2]) or "precond"


def table(report: dict[str, Any], of: str = "") -> str:
    """Rows of the folders of a wing, or of all, and their sum."""
    found: dict[str, list[int]] = defaultdict(lambda: [0] * len(COUNTS))
    for file, entry in report["files"].items():
        for name in (folder(file), "all") if folder(file).startswith(of) else ():
            found[name] = [a + entry["summary"][key] for a, key in zip(found[name], COUNTS, strict=True)]
    rows = ["| folder | lines | reached | branches | reached |", "|---|---|---|---|---|"]
    for name, (lines, reached, branches, taken) in sorted(found.items(), key=lambda row: (row[0] == "all", row[0])):
        rows.append(f"| `{name}` | {lines:,} | {_share(reached, lines)} | {branches:,} | {_share(taken, branches)} |")
    return "\n".join(rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("--of", default="", help="a wing: optim; all of them if not given")
    parser.add_argument("--with", dest="tests", default="", help="the tests that were run, where these are not all")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    said = f"What `{arguments.tests}` reach; the other tests were not run for it.\n\n" if arguments.tests else ""

    def made(place: re.Match[str]) -> str:
        wing = place[2]
        return f"{place[1]}\n{said}{table(report, wing)}\n\n{place[3]}" if arguments.of in ("", wing) else place[0]

    PAGE.write_text(PLACE.sub(made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
