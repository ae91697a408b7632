"""What a trainer needs beside a changed line: second gradients over micro-batches, and the model where it passes parameters.

This module needs torch alone; ``integrations.lightning``, ``.transformers`` and ``.skorch`` import their frameworks.
"""

from precond.integrations.microbatches import MicroBatches

__all__ = ["MicroBatches"]
