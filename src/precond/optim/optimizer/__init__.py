"""The optimizer and its contract with torch, one concern a file."""

from precond.optim.optimizer.preconditioned import PreconditionedGD

__all__ = ["PreconditionedGD"]
