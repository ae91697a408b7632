"""A problem and an optimizer together: what makes training slow, what would mend it, and what happens while it runs."""

from precond.diagnostics.advice import Advice
from precond.diagnostics.calibrated import Gain
from precond.diagnostics.diagnosis import Diagnosis, diagnose
from precond.diagnostics.layer import Layer
from precond.diagnostics.monitor import Monitor
from precond.diagnostics.preconditioner import preconditioner_of, step_size
from precond.diagnostics.rates import Range, lr_range
from precond.diagnostics.registry import register
from precond.diagnostics.sinks import Jsonl, TensorBoard
from precond.diagnostics.stability import stable_factor
from precond.diagnostics.trying import Tried, try_remedies

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
