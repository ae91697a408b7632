"""Names of modules and parameters as a model has them, without what wrappers add."""

from __future__ import annotations


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
