"""Fine-tuning of small nets that are trained before, once in a process, always to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.networks import CharacterTransformer
from precond.lab.workloads.pool.images import PlainNet
from precond.lab.workloads.pool.language import CONTEXT, gpt, text
from precond.lab.workloads.pool.member import Member
from precond.lab.workloads.problem import Tensors, in_batches
from precond.lab.workloads.randomness import isolated

_SEED = 86


class LoRA(nn.Module):
    """x ↦ W₀x + b + (α/r) B A x, W₀ and b frozen, B = 0 at first (Hu et al., 2022)."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


def with_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Freeze a model, and put a LoRA on each linear layer but its head; the same module."""
    model.requires_grad_(False)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    for name in linear:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRA(getattr(owner, child), rank, alpha))
    return model


def tuned_with_lora(model: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> nn.Module:
    """A model with the trained state of another that differs in its head: a LoRA on each linear layer, and the head, are trained."""
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("head")}, strict=False)
    with_lora(model, rank, alpha)
    model.get_submodule("head").requires_grad_(True)
    return model


def trained(
    make: Callable[[], nn.Module], part: Part, batch_size: int, steps: int, lr: float, seed: int = _SEED
) -> dict[str, Tensor]:
    """State of a model after so many steps of torch's AdamW on the cross entropy, its learning rate falling to 0 along half a cosine."""
    with isolated(seed):
        model, batches = make(), in_batches({"train": part}, batch_size)["train"]
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            epoch, place = divmod(step, len(batches))
            if place == 0:
                stream = batches.epoch(epoch)
            inputs, targets = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@cache
def _new_digits() -> Tensors:
    data = load_data("digits")
    parts = {name: Part(part.inputs / 16, part.targets) for name, part in data.parts.items()}

    def make() -> nn.Module:
        return PlainNet((16, 32), 8, 5)

    old = {name: Part(p.inputs[p.targets < 5], p.targets[p.targets < 5]) for name, p in parts.items()}
    new = {name: Part(p.inputs[p.targets >= 5], p.targets[p.targets >= 5] - 5) for name, p in parts.items()}
    state = trained(make, old["train"], 64, 150, 0.005)

    def tuned() -> nn.Module:
        model = make()
        model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("head")}, strict=False)
        return model

    return Tensors(
        "digits",
        f"{data.about} Divided by 16; the digits 5 to 9.",
        new,
        tuned,
        F.cross_entropy,
        "accuracy",
        32,
        200,
        "conv net, 3×3 of 16 and 32 channels, ReLU, trained before on the digits 0 to 4; all of it is tuned, with a new last layer",
        "cross entropy",
    )


@cache
def _lora() -> Tensors:
    state = trained(gpt, text("code")[1]["train"], 16, 400, 0.003)
    about, parts = text("English")

    def tuned() -> nn.Module:
        model: CharacterTransformer = gpt()
        model.load_state_dict(state)
        return with_lora(model, rank=8, alpha=16)

    return Tensors(
        "English",
        about,
        parts,
        tuned,
        F.cross_entropy,
        "accuracy",
        16,
        64,
        f"GPT of width 64, 2 layers, context {CONTEXT}, trained before on code; LoRA of rank 8 on each linear layer but the last",
        "cross entropy of the next character",
    )


MEMBERS = (
    Member("conv net tuned to new digits", "fine-tuning", 300, _new_digits),
    Member("GPT with LoRA, from code to English", "fine-tuning", 200, _lora),
)
