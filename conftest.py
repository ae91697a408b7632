"""Where a framework is not installed, the module that serves it has no doctests to collect."""

from importlib.util import find_spec

collect_ignore = [
    f"src/precond/integrations/{framework}.py" for framework in ("lightning", "transformers") if find_spec(framework) is None
]
