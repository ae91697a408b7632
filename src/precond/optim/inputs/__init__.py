"""Observing what layers receive: the statistics behind input-side preconditioners."""

from precond.optim.inputs.experts import routed
from precond.optim.inputs.kinds import Observed, Registration, register_layer
from precond.optim.inputs.moments import Moments, Request, Rows, pool
from precond.optim.inputs.observation import Inputs, Observation, observe
from precond.optim.inputs.onehot import OneHot
from precond.optim.inputs.reading import Unreadable, plain
from precond.optim.inputs.sites import Passed, Site, Survey, survey
from precond.optim.inputs.taps import Tap, Weight

__all__ = [
    "Inputs",
    "Moments",
    "Observation",
    "Observed",
    "OneHot",
    "Passed",
    "Registration",
    "Request",
    "Rows",
    "Site",
    "Survey",
    "Tap",
    "Unreadable",
    "Weight",
    "observe",
    "plain",
    "pool",
    "register_layer",
    "routed",
    "survey",
]
