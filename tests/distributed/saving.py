"""State that ranks own, saved and loaded at other numbers of ranks: run on each rank by :class:`distributed.pool.Pool`, or alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import precond
from distributed.training import Setting, build, contents, fit
from precond.optim.ranks import replicas


def _rank() -> int | None:
    return dist.get_rank() if dist.is_initialized() else None


def trained(setting: Setting, path: str, flat: bool = False) -> dict[str, Any]:
    """Train, save with torch.distributed.checkpoint in the midst of a period, and go on; what comes of it."""
    pair = build(setting, _rank())
    fit(setting, *pair, _rank())
    save(pair, path, flat)
    fit(setting, *pair, _rank(), first=10)
    return contents(*pair)


def save(pair: Any, path: str, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(*pair, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def load(pair: Any, path: str, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(*pair, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(*pair, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)


def resumed(setting: Setting, path: str, flat: bool = False) -> dict[str, Any]:
    """Load what :func:`trained` saved, whoever it was, and go on."""
    pair = build(setting, _rank())
    fit(setting, *pair, _rank(), first=20)  # DDP orders its sums anew after a step
    load(pair, path, flat)
    fit(setting, *pair, _rank(), first=10)
    return contents(*pair)


def resumed_from_state_dict(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same from the optimizer's own state dict."""
    first, twin = build(setting, _rank()), build(setting, _rank())
    fit(setting, *first, _rank())
    fit(setting, *twin, _rank(), first=20)
    twin[0].load_state_dict(first[0].state_dict())
    twin[1].load_state_dict(first[1].state_dict())
    fit(setting, *first, _rank(), first=10)
    fit(setting, *twin, _rank(), first=10)
    return contents(*first), contents(*twin)


def by_one_alone(setting: Setting, consolidated: bool) -> str:
    """One rank asks for the state dict; what comes of it."""
    model, optimizer = build(setting, _rank())
    fit(setting, model, optimizer, _rank())
    whole = optimizer.state_dict()
    if consolidated:
        optimizer.consolidate_state_dict()
    before, replicas.WAIT = replicas.WAIT, 0.5
    outcome = "nothing asked"
    try:
        if _rank() == 0:
            found = optimizer.state_dict()["state"]
            same = [torch.equal(found[k][name], t) for k, entries in whole["state"].items() for name, t in entries.items()]
            outcome = "the same" if same and all(same) else "another"
    except RuntimeError as error:
        outcome = str(error)
    finally:
        replicas.WAIT = before
    dist.barrier()
    fit(setting, model, optimizer, _rank(), first=10)
    again = optimizer.state_dict()["state"]  # of now, and together again
    steps = {int(entries["step"]) for entries in again.values()}
    return outcome if steps != {int(entries["step"]) for entries in whole["state"].values()} else "an old state"


def meanwhile(setting: Setting, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Saved by a thread (``dcp.async_save``) while training goes on: what comes of that, and of a twin that loads it."""
    first, twin = build(setting, _rank()), build(setting, _rank())
    fit(setting, *first, _rank())
    fit(setting, *twin, _rank(), first=20)
    model_state, optimizer_state = get_state_dict(*first)
    group = dist.new_group(backend="gloo")  # the thread's collectives are not to meet those of steps
    saving = dcp.async_save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path, process_group=group)
    fit(setting, *first, _rank(), first=10)
    saving.result()
    load(twin, path)
    fit(setting, *twin, _rank(), first=10)
    return contents(*first), contents(*twin)


def from_rank_0(setting: Setting, offload: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole tensors, which rank 0 alone has read, sent to all."""
    first, twin = build(setting, _rank()), build(setting, _rank())
    fit(setting, *first, _rank())
    fit(setting, *twin, _rank(), first=20)
    model_state, optimizer_state = get_state_dict(*first, options=StateDictOptions(full_state_dict=True, cpu_offload=offload))
    if _rank():
        assert not (offload and optimizer_state)
        model_state, optimizer_state = {}, {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(twin[0], model_state, options=options)
    set_optimizer_state_dict(*twin, optimizer_state, options=options)
    fit(setting, *first, _rank(), first=10)
    fit(setting, *twin, _rank(), first=10)
    return contents(*first), contents(*twin)


def of_layers_alike(recipe: str) -> dict[str, Any]:
    """Parameters and all state after some steps of a net whose layers are stacked, as every rank is told of them."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))).double()
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = getattr(precond, recipe)(model, lr=1e-2)
    for t in range(4):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        if dist.is_initialized():
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
    return contents(model, optimizer)
