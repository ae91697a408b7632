"""A problem and an optimizer together: what makes training slow, what would mend it, and what happens while it runs."""

from precond.diagnostics.advice import Advice
from precond.diagnostics.diagnosis import Diagnosis, Layer, diagnose
from precond.diagnostics.monitor import Monitor
from precond.diagnostics.preconditioner import preconditioner_of, step_size
from precond.diagnostics.registry import register
from precond.diagnostics.sinks import Jsonl, TensorBoard
from precond.diagnostics.stability import stable_factor

__all__ = [
    "Advice",
    "Diagnosis",
    "Jsonl",
    "Layer",
    "Monitor",
    "TensorBoard",
    "diagnose",
    "preconditioner_of",
    "register",
    "stable_factor",
    "step_size",
]
