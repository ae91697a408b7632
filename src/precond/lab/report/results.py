"""results.json: everything that a comparison found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from precond.lab.report.reading import parsed, read
from precond.lab.workloads import Aim, Judge, LrFrom, Outcome, Trial, write_atomically

SCHEMA = 2
"""Version of the file's layout; it changes when a reader of an older file would be misled."""

Clock = Literal["cpu_seconds", "seconds"]


class ResultsError(ValueError):
    """A file holds no results, or those of another layout; the message names it and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One entrant: where its learning rate comes from, one training per seed, and of its search the trials and the range."""

    label: str
    lr_from: LrFrom
    runs: tuple[Outcome, ...]
    search: tuple[Trial, ...] = ()
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"{self.label!r} has no training")

    @property
    def lr(self) -> float:
        """Its peak learning rate."""
        return self.runs[0].lr

    @property
    def error(self) -> str | None:
        """What the first training that failed raised."""
        return next((run.error for run in self.runs if run.status == "failed"), None)


@dataclass(frozen=True)
class Target:
    """The loss to be reached on a part of the data, and where that number comes from; NaN where every entrant diverged."""

    value: float
    part: Literal["validation", "train"]
    rule: str


@dataclass(frozen=True)
class TaskResults:
    """What came of one task.

    Attributes:
        name: of the task.
        metric: ``"accuracy"``, ``"R²"`` or None.
        facts: what is said of data and model.
        target: the loss to be reached.
        entries: in the order in which they were named.
        reference: label of the entrant whose work is the unit of the others'; None: there is none.
        judge: on what part of the data searches were judged.
        aim: by what: final losses, or steps to the lowest loss of the reference's best trial.
        family: with whose tasks it is averaged; None: with all.
    """

    name: str
    metric: str | None
    facts: dict[str, str]
    target: Target
    entries: tuple[Entry, ...]
    reference: str | None = None
    judge: Judge = "validation"
    aim: Aim = "loss"
    family: str | None = None

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError(f"{self.name!r} has no entrant")

    @property
    def probes(self) -> bool:
        """Whether some training took more gradients than steps."""
        return any(r.curve.gradients[-1:] > r.curve.step[-1:] for e in self.entries for r in e.runs)

    @property
    def held_out(self) -> bool:
        """Whether there is a validation part."""
        return any(r.curve.validation_loss for e in self.entries for r in e.runs)


@dataclass(frozen=True)
class Results:
    """A comparison.

    Attributes:
        title: what it is called.
        command: the command line that makes it.
        created: local date and time.
        clock: the seconds that are shown: of the processor, where one thread does all the work, else those that passed.
        settings: every setting.
        versions: of Python, torch, precond.
        machine: processor, cores, threads.
        tasks: in order.
        rules: under which entrants were compared, a sentence or two each.
    """

    title: str
    command: str
    created: str
    clock: Clock
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    tasks: tuple[TaskResults, ...]
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"{self.title!r} has no task")


def to_json(value: Any) -> Any:
    """Tuples and paths as JSON's own types; NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """A training as JSON's own types."""
    return to_json(asdict(outcome))


def outcome_from_json(content: bytes) -> Outcome:
    """The inverse, from the text; null is NaN in a curve and as a learning rate.

    Raises:
        ValueError: for anything else than a training.
    """
    return read(parsed(content), Outcome, "")


def save_results(
    path: Path, results: Results, tables: list[list[dict[str, Any]]], against: dict[str, Any] | None = None
) -> None:
    """Write results.json, with the final table of each task beside what it is computed from.

    Args:
        path: the file.
        results: what is kept.
        tables: the final table of each task.
        against: work in units of a reference's.

    Raises:
        WriteError: where it cannot be written.
    """
    content = {"schema": SCHEMA, **asdict(results), **({"against": against} if against else {})}
    for task, table in zip(content["tasks"], tables, strict=True):
        task["table"] = table
    write_atomically(path, _text(to_json(content), "") + "\n")


def _text(value: Any, indent: str) -> str:
    """JSON with lists of numbers on one line."""
    if isinstance(value, dict) and value:
        inner = [f"{indent} {json.dumps(key, ensure_ascii=False)}: {_text(item, indent + ' ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(f"{indent} {_text(item, indent + ' ')}" for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def load_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        ResultsError: where it is absent, damaged, or of another layout.
    """
    try:
        found = parsed(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {path}; name a results.json or the folder that holds it") from error
    except ValueError as error:
        raise ResultsError(f"{path} is no JSON ({error}); run the comparison again") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ResultsError(f"{path} holds no results of layout {SCHEMA}; run the comparison again with this version of precond")
    try:
        return read(found, Results, "")
    except ValueError as error:
        raise ResultsError(f"{path} does not hold what results hold ({error}); run the comparison again") from error
