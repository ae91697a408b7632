"""A problem and an optimizer together: what makes training slow, what would mend it, and what happens while it runs."""

from precond.analysis.diagnostics.advice import Advice
from precond.analysis.diagnostics.calibrated import Gain
from precond.analysis.diagnostics.diagnosis import Diagnosis, diagnose
from precond.analysis.diagnostics.layer import Layer
from precond.analysis.diagnostics.monitor import Monitor
from precond.analysis.diagnostics.preconditioner import preconditioner_of, step_size
from precond.analysis.diagnostics.rates import Range, lr_range
from precond.analysis.diagnostics.registry import register
from precond.analysis.diagnostics.sinks import Jsonl, TensorBoard
from precond.analysis.diagnostics.stability import stable_factor
from precond.analysis.diagnostics.trying import Tried, try_remedies

__all__ = [
    "Advice",
    "Diagnosis",
    "Gain",
    "Jsonl",
    "Layer",
    "Monitor",
    "Range",
    "TensorBoard",
    "Tried",
    "diagnose",
    "lr_range",
    "preconditioner_of",
    "register",
    "stable_factor",
    "step_size",
    "try_remedies",
]
