"""The study of penalties in z against p: its results as a file that an interrupted run goes on with, and as a page of tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from precond.lab.evidence import study
from precond.lab.evidence.study import Result, Score, Setting
from precond.lab.report.evidence import number
from precond.lab.report.reading import parsed, read
from precond.lab.report.results import to_json
from precond.lab.workloads import write_atomically


def design(settings: Sequence[Setting]) -> dict[str, Any]:
    """Everything that a result depends on but the code."""
    return {
        "epochs": study.EPOCHS,
        "search_seeds": list(study.SEARCH_SEEDS),
        "seeds": list(study.SEEDS),
        "factors": list(study.FACTORS),
        "settings": {s.name: [list(s.sizes), s.batch, list(s.rates), s.standardize, s.hidden] for s in settings},
        "methods": {m.label: list(m.strengths) for m in study.methods()},
    }


def load_study(file: Path, settings: Sequence[Setting]) -> tuple[Result, ...]:
    """Results that are there already; none where there is no file.

    Raises:
        ValueError: where the file is damaged, or is one of a study with other seeds, data or strengths.
    """
    try:
        found = parsed(file.read_bytes())
        same = found["design"] == design(settings)
        results = tuple(_result(entry, f"results[{i}]", settings) for i, entry in enumerate(found["results"])) if same else ()
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it or name another folder with --out") from error
    if not same:
        raise ValueError(
            f"{file} holds a study with other seeds, data or strengths; delete it or name another folder with --out"
        )
    return results


def save_study(
    folder: Path, settings: Sequence[Setting], results: Sequence[Result], facts: dict[str, str], command: str
) -> None:
    """Write results.json and z-versus-p.md.

    Args:
        folder: where to.
        settings: all that there are, measured or not.
        results: what was measured.
        facts: how it was made, by name.
        command: that made it.

    Raises:
        WriteError: where they cannot be written.
    """
    order = [(s.name, m.label) for s in settings for m in study.methods()]
    results = sorted(results, key=lambda r: order.index((r.setting, r.method)))
    found = {"command": command, **facts, "design": design(settings), "results": [to_json(asdict(r)) for r in results]}
    write_atomically(folder / "results.json", json.dumps(found, indent=0, ensure_ascii=False) + "\n")
    write_atomically(folder / "z-versus-p.md", study_markdown(settings, results, command))


def study_markdown(settings: Sequence[Setting], results: Sequence[Result], command: str) -> str:
    """A table of each setting, then the differences of pairs in all of them."""
    searched = len(results[0].trials)
    lines = [
        "# Does regularizing in z beat regularizing in p?",
        "",
        f"What `{command}` measures. Networks with one hidden layer of {settings[0].hidden} ReLUs learn from few examples, "
        f"{study.EPOCHS} epochs, with a learning rate that falls to a twentieth. Each method had {searched} trials (learning rate and "
        f"strength, {len(study.SEARCH_SEEDS)} seeds each, the loss on the validation part decides); then {len(study.SEEDS)} other seeds, "
        "each with its own draw of examples, were trained at what it found, and again at multiples of the strength. Losses and "
        "accuracies are those of the test part, mean ± half the 95 % confidence interval over seeds; ∞ where a training diverged; † a strength "
        "at an end of those tried.",
        "",
        "- SAM takes the gradient g(p + d), the gradient norm of length ρ takes ½g(p) + ½g(p + d), both with ‖d‖ = ρ in either space, so that "
        "only the direction of d differs: g in p, M g in z.",
        "- λ‖∇L‖² is `GradientNorm` by a finite difference with one more gradient: ‖g‖² in p, ‖Pᵀg‖² in z. The strength is λ in p, and in "
        "z k = 4λ/α, α the first learning rate.",
        "- δ is the damping of M inside the penalty.",
    ]
    for setting in settings:
        some = {r.method: r for r in results if r.setting == setting.name}
        if not some:
            continue
        train, validation, test = setting.sizes
        heads = ["Method", "lr", "strength", "loss", "accuracy", *(f"loss at {k} × strength" for k in study.FACTORS)]
        lines += [
            "",
            f"## {setting.name}",
            "",
            f"{train} examples in batches of {setting.batch}, {validation} for validation, {test} for the test.",
            "",
            _row(heads),
            _row(["---"] * len(heads)),
        ]
        for r in some.values():
            accuracy, width = (100 * x for x in study.interval([s.accuracy for s in r.scores]))
            ends = {pick(t.strength for t in r.trials) for pick in (min, max)}
            strength = number(r.strength) + " †" * (r.strength in ends) if r.stronger else "–"
            beyond = [_interval(losses) for losses in r.stronger] or ["–"] * len(study.FACTORS)
            loss = _interval([s.test for s in r.scores])
            lines.append(_row([r.method, number(r.lr), strength, loss, f"{accuracy:.1f} ± {width:.1f} %", *beyond]))
    lines += [
        "",
        "## z against p",
        "",
        "Differences of test losses, seed by seed; negative: z is better; in bold where the 95 % interval leaves zero out, which for one in "
        "twenty it does by chance.",
    ]
    lines += _differences(
        settings, "At the strength found", {(r.setting, r.method): [s.test for s in r.scores] for r in results}
    )
    for index, factor in enumerate(study.FACTORS):
        stronger = {(r.setting, r.method): r.stronger[index] for r in results if r.stronger}
        lines += _differences(settings, f"At {factor} times the strength found", stronger)
    return "\n".join(lines) + "\n"


def _differences(settings: Sequence[Setting], title: str, losses: Mapping[tuple[str, str], Sequence[float]]) -> list[str]:
    """A table with a column for each setting, from the losses by setting and method."""
    names = [s.name for s in settings if any(setting == s.name for setting, _ in losses)]
    lines = ["", f"{title}:", "", _row(["z − p", *names]), _row(["---"] * (1 + len(names)))]
    for method in dict.fromkeys(method for _, method in losses if " in z" in method):
        pairs = [(losses.get((name, method)), losses.get((name, method.partition(" in z")[0] + " in p"))) for name in names]
        lines.append(_row([method, *("–" if z is None or p is None else _difference(z, p) for z, p in pairs)]))
    return lines


def _difference(z: Sequence[float], p: Sequence[float]) -> str:
    bad = [sum(not math.isfinite(x) for x in losses) for losses in (z, p)]
    if any(bad):
        return " and ".join(f"{name} diverged in {n} of {len(z)}" for name, n in zip("zp", bad, strict=True) if n)
    middle, width = study.difference(z, p)
    text = f"{middle:+.4f} ± {width:.4f}"
    return f"**{text}**" if abs(middle) > width else text


def _interval(values: Sequence[float]) -> str:
    middle, width = study.interval(values)
    return f"{middle:.3f} ± {width:.3f}" if math.isfinite(middle) else "∞"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _result(entry: Any, at: str, settings: Sequence[Setting]) -> Result:
    def loss(value: float) -> float:
        return math.inf if math.isnan(value) else value

    found = read(entry, Result, at)
    if found.setting not in [s.name for s in settings] or found.method not in [m.label for m in study.methods()]:
        raise ValueError(f"{at} is of {found.setting!r} and {found.method!r}, which there are not")
    if len(found.scores) != len(study.SEEDS) or not found.trials or len(found.stronger) not in (0, len(study.FACTORS)):
        raise ValueError(f"{at} is not complete")
    return replace(
        found,
        trials=tuple(replace(t, loss=loss(t.loss)) for t in found.trials),
        scores=tuple(Score(loss(s.validation), loss(s.test), s.accuracy) for s in found.scores),
        stronger=tuple(tuple(map(loss, losses)) for losses in found.stronger),
    )
