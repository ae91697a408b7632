"""The optimizer: preconditioners, regularizers, momenta, the engine that steps them, and recipes of these.

The recipes stand here as classes under torch.optim's names, for trainers that ask for a class: ``precond.optim.AdamW``, ….
"""

from precond.optim.torch_classes import (
    BNP,
    SGD,
    SOAP,
    Adagrad,
    Adam,
    AdamW,
    Auto,
    Muon,
    Recipe,
    RMSprop,
    Shampoo,
    Whitening,
)

__all__ = ["BNP", "SGD", "SOAP", "Adagrad", "Adam", "AdamW", "Auto", "Muon", "RMSprop", "Recipe", "Shampoo", "Whitening"]
