"""Observing what layers receive: the statistics behind input-side preconditioners."""

from precond.inputs.moments import Moments, Request, pool
from precond.inputs.observer import Observer
from precond.inputs.sites import Site, Survey, survey
from precond.inputs.taps import Tap, Weight

__all__ = ["Moments", "Observer", "Request", "Site", "Survey", "Tap", "Weight", "pool", "survey"]
