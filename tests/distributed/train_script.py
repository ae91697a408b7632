"""A training script as a user starts it: ``torchrun --nproc-per-node 2 train_script.py <folder>``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed.training import Setting, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for wrap in ("ddp", "fsdp"):
        result = train(Setting("BNP @ RMS", (7, 5), wrap=wrap))
        torch.save(result, Path(sys.argv[1]) / f"{wrap}{dist.get_rank()}.pt")
    dist.destroy_process_group()
