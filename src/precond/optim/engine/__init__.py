"""How a step is executed: ``loop`` is the equations, ``fused`` does observe, momentum, M and decay in one pass."""
