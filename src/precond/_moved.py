"""Import paths of earlier versions: ``precond.curvature`` is ``precond.analysis.curvature``, the same module.

Nothing is loaded before it is asked for. What is pickled under an old path is found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WINGS = {
    "algebra": "checks maps precision schedules sharding spaces vec",
    "optim": "averages blocks engine inputs momentum optimizer preconditioners recipes regularizers",
    "optim.blocks": "turns",
    "optim.checking": "arguments contracts",
    "optim.inputs": "hooks paths",
    "optim.optimizer": "interrupts",
    "optim.preconditioners": "workspace",
    "optim.ranks": "exchange replicas",
    "analysis": "convergence curvature diagnostics normalization",
    "lab": "cli evidence report workloads",
}
MOVED = {name: f"precond.{wing}.{name}" for wing, names in WINGS.items() for name in names.split()}
MOVED["observing"] = "precond.optim.inputs.watching"


def moved(name: str) -> str | None:
    """Where a module of an earlier version is now; None for others."""
    package, _, rest = name.partition(".")
    first, dot, below = rest.partition(".")
    return f"{MOVED[first]}{dot}{below}" if package == "precond" and first in MOVED else None


class _Same(Loader):
    """Loads a module under another name: it is the one that is there."""

    def __init__(self, name: str):
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has just replaced


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        name = moved(fullname)
        return None if name is None else ModuleSpec(fullname, _Same(name))


def install() -> None:
    """From now on old paths can be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: a search for precond.maps.dense in the path of precond.algebra.maps would load that file twice.
        sys.meta_path.insert(0, _Finder())
