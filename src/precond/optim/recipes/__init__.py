"""The famous optimizers as choices of map, momentum and penalty, with torch.optim's signatures.

Parameter groups and state dicts go under torch's names, and load into torch's class of the same name and back.
``weight_decay`` means what it means there. Beyond torch's options each takes those of
:class:`~precond.PreconditionedGD`: ``regularizers``, ``max_norm`` (in p, as ``clip_grad_norm_``), ``nonfinite``, ….
"""

from collections.abc import Callable

from precond.optim.optimizer import PreconditionedGD
from precond.optim.recipes.adam import adam, adamw
from precond.optim.recipes.auto import auto
from precond.optim.recipes.input_side import bnp, whitening
from precond.optim.recipes.matrices import muon, soap
from precond.optim.recipes.shampoo import shampoo
from precond.optim.recipes.torch_named import adagrad, rmsprop, sgd

RECIPES: dict[str, Callable[..., PreconditionedGD]] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "bnp": bnp,
    "whitening": whitening,
    "muon": muon,
    "soap": soap,
    "shampoo": shampoo,
    "auto": auto,
}
"""All recipes by name."""

__all__ = ["RECIPES", "adagrad", "adam", "adamw", "auto", "bnp", "muon", "rmsprop", "sgd", "shampoo", "soap", "whitening"]
