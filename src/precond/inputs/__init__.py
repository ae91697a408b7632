"""Observing what layers receive: the statistics behind input-side preconditioners."""

from precond.inputs.moments import Moments, Reference, Request, pool
from precond.inputs.observer import Observer
from precond.inputs.sites import Site, Survey, survey
from precond.inputs.taps import Tap, Weight

__all__ = ["Moments", "Observer", "Reference", "Request", "Site", "Survey", "Tap", "Weight", "pool", "survey"]
