"""The entry point ``precond``, which also starts where an extra is not installed, and says so."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

EXTRA = "cli"
"""What the command line needs beside the library."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as :func:`precond.lab.cli.main.main`; 2 where something that it needs is not installed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"precond {version('precond')}")
        return 0
    if missing := absent():
        command = " ".join(["precond", *argv[:1]])
        print(
            f"precond: error: {command} needs {', '.join(missing)}, not installed here; the extra [{EXTRA}] brings what all commands "
            f"need: pip install 'precond[{EXTRA}]' (in a clone: pip install '.[{EXTRA}]')",
            file=sys.stderr,
        )
        return 2
    # A terminal that lacks letters gets their numbers, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from precond.lab.cli.main import main as run

    return run(argv)


def absent() -> list[str]:
    """Packages of the extra that are not installed."""
    of_extra = re.compile(rf"([\w.-]+).*extra == ['\"]{EXTRA}['\"]")
    if not _installed("precond"):  # sources on the path of modules, which say nothing of what they need
        return []
    names = [found[1] for line in requires("precond") or () if (found := of_extra.match(line))]
    return [name for name in names if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
