"""What is asked of ranks that hold parts of a model: run on each of them by :class:`distributed.pool.Pool`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distributed.training import WRAPS, Setting, build, contents, fit, full
from inputs import kinds
from precond import (
    BNP,
    RMS,
    Dense,
    Diagonal,
    Fixed,
    GradientNorm,
    LossClosure,
    PreconditionedGD,
    Route,
    adamw,
    auto,
    muon,
    shampoo,
    soap,
    whitening,
)


def shapes(setting: Setting) -> dict[str, Any]:
    """How parameters and state are divided: (is a DTensor, local shape) by name."""
    model, optimizer = build(setting, dist.get_rank())
    fit(setting, model, optimizer, dist.get_rank())
    out = {}
    for name, p in model.named_parameters():
        for key, t in {"": p, **optimizer.state[p]}.items():
            out[f"{name} {key}"] = (isinstance(t, DTensor), tuple(t.to_local().shape if isinstance(t, DTensor) else t.shape))
    return out


def sharded_later(setting: Setting, steps: int = 0) -> dict[str, Any]:
    """A training whose trainer shards the model after the optimizer was made, and puts the new parameters into its groups."""
    rank = dist.get_rank()
    model, optimizer = build(setting, None)
    if steps:
        fit(replace(setting, steps=steps), model, optimizer, None)
    names = {p: name for name, p in model.named_parameters()}
    model = WRAPS[setting.wrap](model)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[p]) for p in group["params"]]
    losses = fit(setting, model, optimizer, rank)
    return {"losses": losses, **contents(model, optimizer)}


def frozen_between_steps() -> list[list[str]]:
    """Whose layers are known, before and after a parameter is frozen, which is followed within the next forward."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), mesh=_mesh())
    optimizer, out = whitening(model), []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        out.append([f"{leaf.name} {leaf.kind}" for leaf in optimizer._bound.leaves if leaf.module is not None])
        model[0].bias.requires_grad_(False)
    return out


# --- saving -----------------------------------------------------------------------------------------------------------------


def saved_and_resumed(setting: Setting, path: str, whole: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training, and the same one resumed from torch.distributed.checkpoint (or from whole tensors of rank 0)."""
    rank = dist.get_rank()
    first, twin = build(setting, rank), build(setting, rank)
    fit(setting, *first, rank)
    fit(setting, *twin, rank, first=20)
    if whole:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model_state, optimizer_state = get_state_dict(*first, options=options)
        payload = [model_state, optimizer_state]
        dist.broadcast_object_list(payload, 0)
        set_state_dict(*twin, model_state_dict=payload[0], optim_state_dict=payload[1], options=options)
        if rank == 0:
            torch.save(payload, path)
    else:
        model_state, optimizer_state = get_state_dict(*first)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        model_state, optimizer_state = get_state_dict(*twin)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(*twin, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    fit(setting, *first, rank, first=10)
    fit(setting, *twin, rank, first=10)
    return contents(*first), contents(*twin)


def saved(setting: Setting, path: str) -> None:
    """Train and save."""
    pair = build(setting, dist.get_rank())
    fit(setting, *pair, dist.get_rank())
    model_state, optimizer_state = get_state_dict(*pair)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def loaded_and_trained(setting: Setting, path: str) -> dict[str, Any]:
    """Load what :func:`saved` wrote, whoever it was, and go on."""
    rank = dist.get_rank() if dist.is_initialized() else None
    pair = build(setting, rank)
    model_state, optimizer_state = get_state_dict(*pair)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(*pair, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    fit(setting, *pair, rank, first=10)
    return contents(*pair)


def resumed_from_own_state_dict(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's own state dict on each rank, as torch.save would write it."""
    rank = dist.get_rank()
    first, twin = build(setting, rank), build(setting, rank)
    fit(setting, *first, rank)
    twin[0].load_state_dict(first[0].state_dict())
    twin[1].load_state_dict(first[1].state_dict())
    fit(setting, *first, rank, first=10)
    fit(setting, *twin, rank, first=10)
    return contents(*first), contents(*twin)


# --- layers that are divided in other ways, and what cannot be ----------------------------------------------------------------


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _along_outputs(p: nn.Parameter) -> Shard:
    return Shard(1) if p.ndim > 1 else Shard(0)


class Attention(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x[..., : self.inner.vdim])[0]


class Calls(nn.Module):
    """A layer that is called with more than x."""

    def __init__(self, inner: nn.Module, call: Any):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def _experts(transposed: bool) -> nn.Module:
    """Three, of which the ranks hold two and one; sequences go to two of them by their times."""
    make = kinds.ExpertsFirst if transposed else kinds.Experts
    return Calls(make(transposed, True), lambda m, x: m(x.transpose(0, 1).flatten(0, 1), len(x) * torch.tensor([2, 0, 3])))


LAYERS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "transposed, along outputs": (lambda: nn.ConvTranspose1d(3, 4, 2), (4, 3, 6), _along_outputs),
    "transposed": (lambda: nn.ConvTranspose1d(4, 2, 2), (4, 4, 6), None),
    "transposed, groups": (lambda: nn.ConvTranspose1d(4, 8, 2, groups=2), (4, 4, 6), _along_outputs),
    "linear, along inputs": (lambda: nn.Linear(4, 2), (4, 4), _along_outputs),
    "depthwise": (lambda: nn.Conv1d(5, 5, 2, groups=5), (4, 5, 6), None),
    "separate projections": (lambda: Attention(vdim=3), (4, 6, 4), None),
    "Conv1D, along outputs": (lambda: kinds.Conv1D(6, 4), (4, 5, 4), _along_outputs),
    "Conv1D": (lambda: kinds.Conv1D(3, 4), (4, 5, 4), None),
    "experts": (lambda: _experts(False), (4, 5, 4), None),
    "experts, inputs first": (lambda: _experts(True), (4, 5, 4), None),
    "bilinear": (lambda: Calls(nn.Bilinear(3, 3, 5), lambda m, x: m(x, 2 * x)), (8, 3), None),
    "LSTM": (lambda: Calls(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), lambda m, x: m(x.mT)[0]), (8, 3, 5), None),
    "GRU cell": (lambda: Calls(nn.GRUCell(3, 4), lambda m, x: m(x, x.new_ones(len(x), 4))), (8, 3), None),
    "separate, no bias": (lambda: Attention(vdim=3, bias=False), (4, 6, 4), None),
}


def layer(name: str, alone: bool = False, copies: bool = False) -> dict[str, Any]:
    """Three steps of a layer, which ranks hold parts or copies of."""
    make, shape, placement = LAYERS[name]
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(make()).double()
    if copies:
        model = DistributedDataParallel(model)
    elif not alone:
        model = fully_shard(model, mesh=_mesh(), shard_placement_fn=placement)
    optimizer = PreconditionedGD(model, 0.02, preconditioner=BNP(damping=0.0, width_scaling=True) @ RMS(eps=1e-3))
    for k in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) * 3 + 1
        x = _share(x, alone)
        optimizer.step(LossClosure(lambda x=x: model(x).square().mean()))
    return contents(model, optimizer)


def _share(x: Tensor, alone: bool) -> Tensor:
    return x if alone else x.chunk(dist.get_world_size())[dist.get_rank()]


REFUSED: dict[str, Any] = {
    "exact": (
        lambda m: PreconditionedGD(m, preconditioner=RMS(), regularizers=[GradientNorm(0.1, method="exact")]),
        "differentiates twice",
    ),
}


def _odd_one(first: Any, second: Any) -> Any:
    return lambda m: (second if dist.get_rank() else first)(m)


DIFFERENT: dict[str, Any] = {
    "recipes": (_odd_one(muon, shampoo), "steps them otherwise"),
    "options": (_odd_one(muon, lambda m: muon(m, weight_decay=0.5)), "other options than rank 0"),
    "parameters": (lambda m: muon([p for p in m.parameters() if dist.get_rank() == 0 or p.ndim == 2]), "other parameters"),
}
FIXED: dict[str, Any] = {
    "Dense": lambda: Fixed(Dense(torch.arange(64.0).view(8, 8).sin())),
    "Diagonal": lambda: Fixed(Diagonal((torch.arange(6.0).view(2, 3), torch.ones(2)))),
    "routed": lambda: Route([("*", BNP() @ Fixed(Dense(torch.eye(8) + 0.1)))]),
}


def refused(name: str) -> None:
    REFUSED[name][0](fully_shard(nn.Linear(3, 2), mesh=_mesh()))


def different(name: str, wrap: str) -> None:
    """Ranks that would not take the same step."""
    model: nn.Module = nn.Linear(3, 2)
    DIFFERENT[name][0](fully_shard(model, mesh=_mesh()) if wrap == "fsdp" else DistributedDataParallel(model))


def late() -> None:
    """Sharded after the optimizer was made."""
    model = nn.Linear(3, 2)
    optimizer = muon(model)
    fully_shard(model, mesh=_mesh())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()


def other_meshes() -> None:
    """A layer whose weight and bias are divided over different ranks."""
    model = nn.Linear(3, 2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("weight", "bias"))
    for name in mesh.mesh_dim_names:
        setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh[name], [Shard(0)])))
    whitening(model)


def _stepped(make: Any, mesh: Any) -> PreconditionedGD:
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(80, 70), mesh=mesh)
    optimizer = make(model)
    model(torch.ones(2, 80)).sum().backward()
    optimizer.step()
    return optimizer


def of_another_recipe() -> None:
    """A state dict of soap, loaded by shampoo."""
    _stepped(shampoo, _mesh()).load_state_dict(_stepped(soap, _mesh()).state_dict())


def of_another_mesh(recipe: str) -> bool:
    """Whether a state dict is the same after it went through an optimizer whose parameters are divided over another mesh."""
    make = {"soap": soap, "adamw": adamw, "auto": auto}[recipe]
    saved = _stepped(make, _mesh()).state_dict()
    other = _stepped(make, init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts")))
    other.load_state_dict(saved)
    again = other.state_dict()["state"]
    return all(torch.equal(full(t), full(again[i][key])) for i, entries in saved["state"].items() for key, t in entries.items())


def copied() -> None:
    """An optimizer whose state other ranks have, without its model."""
    model = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = muon(model)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    twin.step()


def fixed(name: str, alone: bool = False) -> dict[str, Any]:
    """A step by a map that takes all parameters jointly."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(3, 2)
    if not alone:
        model = fully_shard(model, mesh=_mesh())
    optimizer = PreconditionedGD(model, 0.1, preconditioner=FIXED[name](), max_norm=1.0)
    x = torch.arange(12.0).view(4, 3)
    model(_share(x, alone)).square().mean().backward()
    optimizer.step()
    return contents(model, optimizer)


def bad_row(nonfinite: str) -> dict[str, Any]:
    """A gradient with NaN in a row that rank 1 holds."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(3, 2), mesh=_mesh())
    optimizer = PreconditionedGD(model, 0.1, preconditioner=BNP() @ RMS(), nonfinite=nonfinite)
    before = contents(model, optimizer)["params"]
    model(torch.ones(4, 3)).sum().backward()
    if dist.get_rank() == 1:
        model.weight.grad.to_local().fill_(torch.nan)
    raised = False
    try:
        optimizer.step()
    except FloatingPointError:
        raised = True
    after = contents(model, optimizer)["params"]
    return {"raised": raised, "unchanged": all(torch.equal(t, after[name]) for name, t in before.items())}


def kahan(alone: bool = False) -> dict[str, Any]:
    """bfloat16 parameters whose rounding errors are kept."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(6, 3).bfloat16()
    if not alone:
        model = fully_shard(model, mesh=_mesh())
    optimizer = PreconditionedGD(model, 1e-3, preconditioner=BNP(damping=0.0) @ RMS(), rounding="kahan")
    for k in range(3):
        x = _share(torch.randn(8, 6, generator=torch.Generator().manual_seed(k)).bfloat16(), alone)
        optimizer.step(LossClosure(lambda x=x: model(x).float().square().mean()))
    return contents(model, optimizer)
