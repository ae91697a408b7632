"""Names of modules and parameters as a model has them, without what wrappers add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn


def unwrapped_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers add (torch.compile, DDP, checkpointing).

    Example:
        >>> unwrapped_name("module._orig_mod.body.0.weight")
        'body.0.weight'
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(p for p in parts if p not in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


def unwrapped_layers(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Modules by their names without such prefixes; of those that hold parameters each has a name of its own, and the prefix where it must.

    Example:
        >>> import torch
        >>> own = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1)}), "head": torch.nn.Linear(1, 1)})
        >>> [name for name, _ in unwrapped_layers(list(own.named_modules()))]
        ['', 'module', 'module.head', 'head']
    """
    alike = Counter(unwrapped_name(path) for path, module in modules if module._parameters)
    return [(path if alike[name := unwrapped_name(path)] > 1 else name, module) for path, module in modules]
