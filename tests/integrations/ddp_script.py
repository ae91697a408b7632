"""Hugging Face's Trainer under DDP: ``torchrun --nproc-per-node 2 ddp_script.py <folder> <recipe>``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import integrations.conftest  # noqa: F401  # first: torchvision, where it does not fit
import precond
from integrations.test_transformers import CLASSES, arguments, bert, data, inside
from precond.integrations.transformers import Trainer

RESUMED = ["adamw", "auto", "soap", "SAM in z"]


def trainer(folder: Path, recipe: str, **options: Any) -> Any:
    options = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": True, **options}
    return Trainer(bert(), arguments(folder, **options), train_dataset=data(32), optimizer_cls_and_kwargs=CLASSES[recipe])


def kept(optimizer: Any) -> int:
    """Numbers of the state that this process keeps."""
    return sum(t.numel() for entries in optimizer.state.values() for t in entries.values())


def gpt2() -> Any:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of different numbers of tokens that count."""
    rows = [row["input_ids"] for row in data(count)]
    return [{"input_ids": x, "labels": x.masked_fill(torch.arange(len(x)) < k % 4, -100)} for k, x in enumerate(rows)]


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


JOINT = {
    "a classifier, as set": (bert, data, {}),
    "a classifier": (bert, data, {"average_tokens_across_devices": False}),
    "a language model": (gpt2, texts, {}),
}
"""Model, rows and options: the Trainer multiplies losses by the number of processes unless told not to, which is right where the model divides
by the number of tokens of all processes, as language models do."""
TWIN = {
    "torch's AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (precond.AdamW, {"lr": 0.01, "weight_decay": 0.01}),
}


def joint(folder: Path, kind: str, recipe: str, processes: int) -> dict[str, torch.Tensor]:
    """Parameters after four steps of four rows for each of two micro-batches, whatever the number of processes; in float64."""
    make, rows, options = JOINT[kind]
    model = make().double()
    options = {
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "ddp_find_unused_parameters": True,
        **options,
    }
    cls, more = {**CLASSES, **TWIN}[recipe]
    Trainer(model, arguments(folder, **options), train_dataset=rows(32), optimizer_cls_and_kwargs=(cls, dict(more))).train()
    return {name: p.detach() for name, p in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    for name in sys.argv[2:]:
        found = run(base / name, name) if name in RESUMED else {}
        found |= {kind: joint(base / name, kind, name, 2) for kind in JOINT}
        torch.save(found, base / f"{name}{dist.get_rank()}.pt")
    dist.destroy_process_group()
