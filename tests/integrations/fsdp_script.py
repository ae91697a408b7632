"""Accelerate with FSDP2: ``torchrun --nproc-per-node 2 fsdp_script.py <folder> <recipe> …``, or one process, which takes the batches whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from integrations.table import RECIPES, batches, loss_fn
from precond.integrations import MicroBatches

TWIN = {"torch's AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)}


class Block(nn.Linear):
    """What FSDP2 wraps by itself; beside it the model holds layers of its own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.blocks, self.head = nn.Linear(6, 7), nn.ModuleList(Block(7, 7) for _ in range(2)), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


def sharding() -> accelerate.Accelerator:
    """Accelerate takes FSDP for a matter of accelerators alone: its state is told, all else is its own."""
    AcceleratorState._reset_state(False)
    GradientState._reset_state()
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
    )  # fmt: skip
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = accelerate.DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def make(recipe: str) -> tuple[accelerate.Accelerator, Any, Any, Any]:
    """The optimizer before ``prepare``, as Accelerate wants it."""
    model = Net().double()
    optimizer = {**RECIPES, **TWIN}[recipe](model)
    accelerator = (
        sharding() if dist.is_torchelastic_launched() else accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, MicroBatches(optimizer, accelerator.scaler) if recipe in RECIPES else None


def run(accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any, micro: Any, data: Any) -> None:
    rank, size = accelerator.process_index, accelerator.num_processes

    def backward(x: torch.Tensor, y: torch.Tensor) -> None:
        accelerator.backward(loss_fn(model(x), y))

    for x, y in data:
        mine = x.chunk(size)[rank], y.chunk(size)[rank]
        with accelerator.accumulate(model):
            if micro is None:
                backward(*mine)
            else:
                micro.backward(backward, *mine)
            if accelerator.sync_gradients:
                if micro is not None:
                    micro.repeat()
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()


def params(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()}


def ends(recipe: str, folder: Path | None = None) -> dict[str, Any]:
    """After four steps, and after the two that follow what was saved in their middle."""
    first = make(recipe)
    run(*first, batches(4))
    if folder is not None:
        first[0].save_state(str(folder))
    run(*first, batches(8)[4:])
    found = {"params": params(first[1])}
    if folder is not None:
        second = make(recipe)
        second[0].load_state(str(folder))
        run(*second, batches(8)[4:])
        found["resumed"] = params(second[1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[2:]):
        folder = Path(sys.argv[1])
        found = ends(name, folder / str(number))
        torch.save(found, folder / f"{name}{dist.get_rank()}.pt")
    dist.destroy_process_group()
