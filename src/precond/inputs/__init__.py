"""Observing what layers receive: the statistics behind input-side preconditioners."""

from precond.inputs.experts import routed
from precond.inputs.kinds import Observed, Registration, register_layer
from precond.inputs.moments import Moments, Request, Rows, pool
from precond.inputs.observation import Inputs, Observation, observe
from precond.inputs.observer import Observer
from precond.inputs.onehot import OneHot
from precond.inputs.reading import Unreadable, plain
from precond.inputs.sites import Passed, Site, Survey, survey
from precond.inputs.taps import Tap, Weight

__all__ = [
    "Inputs",
    "Moments",
    "Observation",
    "Observed",
    "Observer",
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
