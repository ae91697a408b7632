"""Hugging Face's Trainer: second gradients, and recipes that observe the model's layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from precond.integrations.microbatches import MicroBatches, check_clipping, inside
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import ModuleGroups


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` that repeats a step's micro-batches for second gradients and hands the model to the optimizer.

    SAM's gradient is taken over all of ``gradient_accumulation_steps``, before ``max_grad_norm`` clips.
    ``optimizer_cls_and_kwargs=(precond.optim.Auto, {"lr": 1e-2})`` gets the model with the Trainer's groups, so that layer inputs
    can be observed. Under ``DistributedDataParallel`` the processes divide the work on matrices. Everything else, and every other
    optimizer, is as in ``transformers``.
    """

    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    _micro: MicroBatches | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            cls, options = self.optimizer_cls_and_kwargs
            whole = isinstance(cls, type) and issubclass(cls, PreconditionedGD) and not {"params", "model"} & options.keys()
            if whole:
                self.optimizer_cls_and_kwargs = (cls, {**options, "params": self._groups(model or self.model)})
        return super().create_optimizer(model)

    def _groups(self, model: nn.Module) -> ModuleGroups:
        """The Trainer's own groups, with names, and the module."""
        decayed = set(self.get_decay_parameter_names(model))
        live = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [pair for pair in live if (pair[0] in decayed) == decay], "weight_decay": weight_decay}
            for decay, weight_decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        return ModuleGroups([group for group in groups if group["params"]], model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Every rank comes here and one saves."""
        if (optimizer := inside(self.optimizer)) is not None:
            optimizer.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(output_dir)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro = None  # of a training that was interrupted
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        optimizer = inside(self.optimizer)
        if optimizer is not None and isinstance(model, nn.parallel.DistributedDataParallel) and not optimizer.watches(model):
            optimizer.watch(model)  # wrapped since the optimizer was made: from now on ranks divide the work on matrices
        if optimizer is None or not optimizer.probes:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._micro is None or self._micro.optimizer is not optimizer:
            check_clipping(optimizer, self.args.max_grad_norm > 0, "set max_grad_norm=0 in TrainingArguments")
            self._micro = MicroBatches(optimizer, self.accelerator.scaler)
        loss = self._micro.backward(super().training_step, model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._micro.repeat()
        return loss
