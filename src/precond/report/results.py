"""results.json: everything that a comparison found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from precond.workloads import Curve, Outcome, write_atomically

SCHEMA = 1
"""Version of the file's layout; it changes when a reader of an older file would be misled."""

# Fields that are read back as dataclasses.
_MADE = ("target", "entries")

LrFrom = Literal["given", "own", "searched", "default"]


class ResultsError(ValueError):
    """A file holds no results, or those of another layout; the message names it and the remedy."""


@dataclass(frozen=True)
class Trial:
    """One candidate of a learning-rate search: its final validation loss, NaN where it diverged."""

    lr: float
    loss: float


@dataclass(frozen=True)
class Entry:
    """One entrant: where its learning rate comes from, the trials of its search, and one training per seed."""

    label: str
    lr_from: LrFrom
    runs: tuple[Outcome, ...]
    search: tuple[Trial, ...] = ()

    @property
    def lr(self) -> float:
        """Its peak learning rate."""
        return self.runs[0].lr


@dataclass(frozen=True)
class Target:
    """The loss to be reached on a part of the data, and where that number comes from; NaN where every entrant diverged."""

    value: float
    part: Literal["validation", "train"]
    rule: str


@dataclass(frozen=True)
class Results:
    """A comparison.

    Attributes:
        title: what it is called.
        command: the command line that makes it.
        created: local date and time.
        metric: ``"accuracy"``, ``"R²"`` or None.
        facts: what is said of data and model.
        settings: every setting.
        versions: of Python, torch, precond.
        machine: processor, cores, threads.
        target: the loss to be reached.
        entries: in the order in which they were named.
    """

    title: str
    command: str
    created: str
    metric: str | None
    facts: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    target: Target
    entries: tuple[Entry, ...]

    @property
    def probes(self) -> bool:
        """Whether some training took more gradients than steps."""
        return any(r.curve.gradients[-1:] > r.curve.step[-1:] for e in self.entries for r in e.runs)

    @property
    def held_out(self) -> bool:
        """Whether there is a validation part."""
        return any(r.curve.validation_loss for e in self.entries for r in e.runs)


def to_json(value: Any) -> Any:
    """Dataclasses and tuples as JSON's own types; NaN and infinities, which JSON lacks, as null."""
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


def outcome_from_json(found: dict[str, Any]) -> Outcome:
    """The inverse; null in a curve is NaN."""
    columns: dict[str, Any] = {name: [math.nan if x is None else x for x in column] for name, column in found["curve"].items()}
    return Outcome(**{**found, "curve": Curve(**columns)})


def save_results(path: Path, results: Results, table: list[dict[str, Any]]) -> None:
    """Write results.json, with the final table beside what it is computed from.

    Raises:
        WriteError: where it cannot be written.
    """
    content = {"schema": SCHEMA, **to_json({f.name: getattr(results, f.name) for f in fields(results) if f.name not in _MADE})}
    content["target"] = to_json(asdict(results.target))
    content["entries"] = [to_json(asdict(entry)) for entry in results.entries]
    content["table"] = to_json(table)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def load_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        ResultsError: where it is absent, damaged, or of another layout.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {path}; name a results.json or the folder that holds it") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path} is no JSON ({error}); run the comparison again") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ResultsError(f"{path} holds no results of layout {SCHEMA}; run the comparison again with this version of precond")
    try:
        value = found["target"]["value"]
        target = Target(**{**found["target"], "value": math.nan if value is None else value})
        entries = tuple(_entry(entry) for entry in found["entries"])
        return Results(
            **{k: v for k, v in found.items() if k not in ("schema", "table", *_MADE)}, target=target, entries=entries
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} lacks what results hold ({error}); run the comparison again") from error


def _entry(found: dict[str, Any]) -> Entry:
    trials = tuple(Trial(t["lr"], math.nan if t["loss"] is None else t["loss"]) for t in found["search"])
    return Entry(found["label"], found["lr_from"], tuple(outcome_from_json(run) for run in found["runs"]), trials)
