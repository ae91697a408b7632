"""P of other libraries' optimizers, told by the names of their packages and classes and by what they keep in their state; none is imported."""

from precond.analysis.diagnostics.peers import distributed_shampoo, heavyball, pytorch_optimizer, schedulefree

__all__ = ["distributed_shampoo", "heavyball", "pytorch_optimizer", "schedulefree"]
