"""The output folder: whose it is, what is done already, and where the rest goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from precond.lab.cli.errors import UserError
from precond.lab.report import outcome_from_json, outcome_to_json
from precond.lab.report.reading import parsed
from precond.lab.workloads import Checkpoint, Outcome, WriteError, sweep, write_atomically


@dataclass(frozen=True)
class Folder:
    """One experiment on the disk.

    Args:
        path: the folder: ``settings.json``, ``results.json``, ``report.html``, and under ``trainings/`` a folder per task with one file per
            training, ``.json`` when it is done, ``.pt`` while it is under way.
        checkpoint_seconds: the shortest time between two checkpoints.
    """

    path: Path
    checkpoint_seconds: float

    @contextmanager
    def claimed(self, settings: dict[str, Any], tasks: Iterable[str], resume: bool) -> Iterator[None]:
        """Make the folder that of these settings, and keep other processes away from these tasks.

        Processes with the same settings and other tasks may work in it at the same time.

        Args:
            settings: everything that the results depend on, as JSON's own types.
            tasks: names of the tasks' folders.
            resume: keep what the same settings left there; otherwise remove it.

        Raises:
            UserError: where it holds the work of other settings, or another process works on one of the tasks.
            WriteError: where it cannot be written.
        """
        with ExitStack() as locks:
            whole = locks.enter_context(_opened(self.path / ".lock"))
            # Who removes must be alone; who trains shares the folder.
            if not _locked(whole, alone=not resume):
                raise _busy(self.path)
            for task in tasks:
                folder = self.path / "trainings" / task
                if not _locked(locks.enter_context(_opened(folder / ".lock")), alone=True):
                    raise _busy(self.path)
                sweep(folder)
            if not resume:
                self._clear()
            with self.alone():
                sweep(self.path)
                file = self.path / "settings.json"
                if file.exists():
                    self._compare(file, settings)
                write_atomically(file, json.dumps(settings, indent=1, ensure_ascii=False))
            if not _locked(whole, alone=False):
                raise _busy(self.path)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While files are written that processes share, the others wait."""
        with _opened(self.path / ".lock-shared") as file:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _compare(self, file: Path, settings: dict[str, Any]) -> None:
        remedy = "name another folder with --out, or start all over with --no-resume"
        try:
            before = parsed(file.read_bytes())
            names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged; {remedy}") from error
        if names:
            changes = "; ".join(f"{name} was {_shown(before.get(name))}, now {_shown(settings.get(name))}" for name in names)
            raise UserError(f"{self.path} holds a run with other settings: {changes}; {remedy}")

    def _clear(self) -> None:
        for pattern in (
            "trainings/**/*.json",
            "trainings/**/*.pt",
            "settings.json",
            "results.json",
            "report.html",
            "summary.md",
            "model.pt",
        ):
            for file in self.path.glob(pattern):
                file.unlink()

    def checkpoint(self, slug: str) -> Checkpoint:
        """Of the training of that name."""
        return Checkpoint(self.path / "trainings" / f"{slug}.pt", self.checkpoint_seconds)

    def outcome(self, slug: str) -> Outcome | None:
        """Of the training of that name, None where it is not done.

        Raises:
            UserError: where the file is damaged.
        """
        file = self.path / "trainings" / f"{slug}.json"
        try:
            return outcome_from_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise damaged(file, error) from error

    def finish(self, slug: str, outcome: Outcome) -> None:
        """Keep what came of a training, and drop its checkpoint.

        Raises:
            WriteError: where it cannot be written; the checkpoint is still there.
        """
        write_atomically(self.path / "trainings" / f"{slug}.json", json.dumps(outcome_to_json(outcome), allow_nan=False))
        self.checkpoint(slug).discard()


@contextmanager
def sole(path: Path) -> Iterator[None]:
    """The folder of a command that writes its files at its end, for this process alone.

    Raises:
        UserError: where another process works in it, or it cannot be written; before the work, not after it.
    """
    with ExitStack() as locks:
        try:
            if not _locked(locks.enter_context(_opened(path / ".lock")), alone=True):
                raise _busy(path)
            sweep(path)
        except OSError as error:
            raise cannot_work(path, error) from error
        try:
            yield
        except WriteError as error:
            raise UserError(str(error)) from error


def cannot_work(path: Path, error: OSError) -> UserError:
    """What is wrong with a folder."""
    return UserError(f"cannot work in {path}: {error}; name another folder with --out")


def damaged(file: Path, error: Exception) -> UserError:
    """What is wrong with what a training left."""
    reason = f"{error}".strip().split("\n")[0] or type(error).__name__
    return UserError(f"{file} is damaged ({reason}); delete it to repeat this training, or start all over with --no-resume")


def file_name(text: str, also: str = "") -> str:
    """Letters and digits of a text, other characters that are named, and hyphens for all between.

    What is too long for a file system ends in a digest.

    Example:
        >>> file_name("../MLP, batch 128"), file_name("train my_own:one", "_"), len(file_name("x" * 1000))
        ('MLP-batch-128', 'train-my_own-one', 87)
    """
    name = "-".join("".join(c if c.isalnum() or c in also else " " for c in text).split()) or "x"
    short = name.encode()[:80].decode(errors="ignore")
    return name if len(name.encode()) <= 120 else f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _busy(path: Path) -> UserError:
    return UserError(f"another process works in {path}; wait until it ends, or name another folder with --out")


def _opened(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not "wb": a link of that name may lead to a file of the user.
    return open(path, "ab")


def _locked(file: IO[bytes], alone: bool) -> bool:
    """Hold a lock until the file is closed, with others or alone; False where another process is in the way."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return True
    # Some network file systems have no locks: better to work without one than not at all.
    with suppress(OSError):
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
