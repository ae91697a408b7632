"""A diagnosis as text of 80 columns: a summary, the advice, the worst layers, and what was not seen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from precond.analysis.diagnostics.calibrated import calibration
from precond.analysis.diagnostics.diagnosis import LABELS, Diagnosis
from precond.analysis.diagnostics.layer import Layer, block_texts
from precond.analysis.diagnostics.numbers import number

WIDTH = 80
_ADVICE, _LAYERS = 6, 12
_NAMES = {"standardize": "standardized data", "bnp": "BNP", "whitened": "whitening"}

Line = tuple[str, str]
"""Text and its style, one of rich's or nothing."""


def lines(found: Diagnosis, every: bool = False) -> Iterator[Line]:
    """Of a diagnosis.

    Args:
        found: it.
        every: all advice and layers, not the first six and the worst twelve.
    """
    yield from _wrapped(f"Looked at {found.looked_at}.")
    yield from _wrapped(found.verdict + ("" if found.verdict.endswith(".") else ":"), "bold")
    advice = found.advice if every else found.advice[:_ADVICE]
    for i, a in enumerate(advice, 1):
        yield from _wrapped(f"{i}. {a.what}", "bold", "   ")
        yield from _wrapped(f"   {a.promise}", "green", "   ")
        yield from _wrapped(f"   {a.why}", "", "   ")
        for line in a.code.split("\n"):
            yield f"   {line}", "cyan"  # code is not wrapped: it is copied
    if len(found.advice) > len(advice):
        yield f"   … and {len(found.advice) - len(advice)} more (on the page)", ""
    if rest := [c for c in found.considered if c.why]:
        yield "", ""
        yield "Also considered:", "bold"
        for c in rest:
            yield from _wrapped(f"   {_NAMES[c.name]}: {c.why}" + (f" ({c.gain})" if c.gain.known else ""), "", "     ")
    if any(a.gain.known for a in found.advice):
        yield "", ""
        yield from _wrapped(f"{calibration().short} More: docs/diagnostics.md, Gains.")
    if found.layers:
        yield "", ""
        yield from _layers(found, every)
    if found.lr is not None and found.lr_limit is not None:
        yield "", ""
        yield from _wrapped(f"Learning rate {number(found.lr)}; steps become unstable above {number(found.lr_limit)}")
    if found.notes:
        yield "", ""
        for note in found.notes:
            yield from _wrapped(f"Note: {note}.", "", "  ")


def _layers(found: Diagnosis, every: bool) -> Iterator[Line]:
    """The worst layers, one row each."""
    shown = found.worst if every else found.worst[:_LAYERS]
    kept = [name for name in ("raw", "optimizer", "bnp", "whitened") if name in found.columns]
    head = "κ of what layers receive" + (
        "" if len(shown) == len(found.layers) else f": the worst {len(shown)} of {len(found.layers)}"
    )
    yield head, "bold"
    blocks = found.matrix != "none"
    rows = [
        ["layer", "from", *(LABELS.get(name, name) for name in kept), *(["its block, in z"] if blocks else []), "driven by"]
    ]
    for layer in shown:
        kappas = [number(layer.spectra.kappa(name)) for name in kept]
        block = [", ".join(_short(x) for x in block_texts(layer))] if blocks else []
        rows.append([layer.name, layer.source, *kappas, *block, _driven(layer)])
    # Names and drivers share what numbers leave.
    middle = sum(max(len(row[i]) for row in rows) + 2 for i in range(2, len(rows[0]) - 1))
    last = max(min(max(len(row[-1]) for row in rows), WIDTH - middle - 28), 11)
    name = max(WIDTH - middle - last - 2 - 12 - 2, 8)
    fitted = [
        [cut(row[0], name), cut(row[1], 12), *row[2:-1], row[-1] if len(row[-1]) <= last else row[-1][: last - 1] + "…"]
        for row in rows
    ]
    for i, row in enumerate(_aligned(fitted)):
        yield row.rstrip(), "dim" if i == 0 else ""


def _short(text: str) -> str:
    return "indefinite" if text.startswith("indefinite") else cut(text, 12)


def _driven(layer: Layer) -> str:
    return layer.drivers.main + (f"; {layer.units}" if str(layer.units) else "")


def cut(text: str, width: int) -> str:
    """With the end kept, which tells layers apart."""
    return text if len(text) <= width else "…" + text[1 - width :]


def _wrapped(text: str, style: str = "", indent: str = "") -> Iterator[Line]:
    for line in textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]:
        yield line, style


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of words to the left, of numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(w) if i < 2 or i == last else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
