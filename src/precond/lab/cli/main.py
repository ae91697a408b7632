"""The commands of ``precond``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from precond.lab.cli.bench import Bench
from precond.lab.cli.compare import Compare
from precond.lab.cli.config import config_path, from_toml
from precond.lab.cli.diagnose import Diagnose
from precond.lab.cli.errors import UserError
from precond.lab.cli.logistic import LogisticRegression
from precond.lab.cli.lr_range import LrRange
from precond.lab.cli.report import Report
from precond.lab.cli.settings import Settings
from precond.lab.cli.train import Train
from precond.lab.cli.verify import Verify

# A new command is one file with a dataclass that has ``run(argv) -> int``, and one row here.
COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "compare": Compare,
    "bench": Bench,
    "logistic": LogisticRegression,
    "diagnose": Diagnose,
    "lr-range": LrRange,
    "verify": Verify,
    "report": Report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0; 2 for what the user can put right; 130 after Ctrl-C; 141 where nobody reads what is printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return parse(argv).run(argv)
    except UserError as error:
        print(f"precond: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As a program that the signal ends: without a word, and without one from the interpreter when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stopped:
        # Rich has done the same already, with the code of a command that failed.
        if isinstance(stopped.__context__, BrokenPipeError):
            return 141
        raise
    except OSError as error:
        print(f"precond: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted before anything new was saved.", file=sys.stderr)
        return 130


def parse(argv: Sequence[str]) -> Any:
    """The command with its settings: flags before the file of ``--config`` before defaults.

    Raises:
        UserError: for a file that cannot be read.
        SystemExit: for arguments that cannot be read, and after ``--help``.
    """
    options = []
    for name, cls in COMMANDS.items():
        path = config_path(argv) if issubclass(cls, Settings) and argv[:1] == [name] else None
        default = {} if path is None else {"default": from_toml(path, cls)}
        options.append(Annotated[cls, tyro.conf.subcommand(name, **default)])
    union: Any = Union[tuple(options)]  # noqa: UP007 - made at run time
    return tyro.cli(
        union,
        prog="precond",
        description=__import__("precond").__doc__,
        args=argv or ["--help"],
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.DisallowNone),
    )
