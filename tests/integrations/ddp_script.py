"""Hugging Face's Trainer under DDP: ``torchrun --nproc-per-node 2 ddp_script.py <folder> <recipe>``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import integrations.conftest  # noqa: F401  # first: torchvision, where it does not fit
from integrations.test_transformers import CLASSES, arguments, bert, data, inside
from precond.integrations.transformers import Trainer


def trainer(folder: Path, recipe: str, **options: Any) -> Any:
    options = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": True, **options}
    return Trainer(bert(), arguments(folder, **options), train_dataset=data(32), optimizer_cls_and_kwargs=CLASSES[recipe])


def kept(optimizer: Any) -> int:
    """Numbers of the state that this process keeps."""
    return sum(t.numel() for entries in optimizer.state.values() for t in entries.values())


def run(folder: Path, recipe: str) -> dict[str, Any]:
    """Six steps of which the third is saved, and the same from there."""
    whole = trainer(folder, recipe, max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    rest = trainer(folder / "again", recipe, max_steps=6)
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {
        "params": {name: p.detach() for name, p in whole.model.named_parameters()},
        "resumed": {name: p.detach() for name, p in rest.model.named_parameters()},
        "kept": kept(inside(whole)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        torch.save(run(folder, name), Path(sys.argv[1]) / f"{name}{dist.get_rank()}.pt")
    dist.destroy_process_group()
