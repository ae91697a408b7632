"""Parameters that several processes hold in parts (FSDP2): the part of each, and sums over the parts of all.

Inside, everything works on local tensors. Parameters, gradients and state become local where they enter (:func:`local`),
state of a parameter's shape leaves as a DTensor again (:meth:`Shard.whole`), so that torch.distributed.checkpoint can divide
it anew, and numbers of all entries together are asked of :class:`Sums`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from precond.algebra import collectives, vec
from precond.algebra.vec import Vec


def divided(t: Any) -> bool:
    """Whether a tensor is a DTensor."""
    # Where nobody has imported DTensor there is none, and importing it takes as long as half of torch.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(t, loaded.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, the same memory; any other tensor itself."""
    if not divided(t):
        return t
    if not torch.is_grad_enabled():  # as in a step, which asks for many
        return t.to_local()  # type: ignore[attr-defined]
    with torch.no_grad():
        return t.to_local()  # type: ignore[attr-defined]


def gathered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Arguments of a call with DTensors made whole, by all who hold them, and whether this process speaks for them: the first one does."""
    plain = not kwargs and all([type(x) is Tensor for x in args])
    if plain or not (dist.is_available() and dist.is_initialized()):  # and so no DTensor
        return args, kwargs, True
    speaks = True

    def whole(x: Any) -> Any:
        nonlocal speaks
        if not divided(x):
            return x
        speaks &= not any(x.device_mesh.get_coordinate())
        return x.full_tensor()

    return *torch.utils._pytree.tree_map(whole, (args, kwargs)), speaks


def replicated(t: Tensor) -> Tensor | None:
    """A tensor that this process holds whole, with its graph; None where others hold parts of it."""
    if not divided(t):
        return t
    return t.to_local() if all(p.is_replicate() for p in t.placements) else None  # type: ignore[attr-defined]


def copy_(target: Tensor, value: Tensor) -> None:
    """target ← value, whichever of them is divided among processes."""
    if divided(value) and not (divided(target) and value.device_mesh == target.device_mesh):  # type: ignore[attr-defined]
        value = value.full_tensor()  # type: ignore[attr-defined]
    if divided(target) and not divided(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]
    target.copy_(value)


def parts_of(modules: Iterable[nn.Module]) -> dict[Tensor, Tensor]:
    """What stands in a module → the parameter itself, where FSDP2 has put a whole tensor in its place, as it does within passes."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    states = {m._get_fsdp_state() for m in modules if loaded is not None and isinstance(m, loaded.FSDPModule)}
    out: dict[Tensor, Tensor] = {}
    for each in (each for state in states for group in state._fsdp_param_groups for each in group.fsdp_params):
        there = each._module_info.module._parameters[each._module_info.param_name]
        if there is not None and there is not each.sharded_param:
            out[there] = each.sharded_param
    return out


def flattened(module: nn.Module) -> bool:
    """Whether a module is wrapped by FSDP1, which makes flat vectors of its parameters."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FullyShardedDataParallel)


@dataclass(frozen=True, eq=False)
class Shard:
    """How a parameter is divided among processes."""

    param: Any = field(repr=False)

    @classmethod
    def of(cls, param: Tensor) -> Shard | None:
        """The division of a parameter; None where this process holds all of it."""
        return cls(param) if divided(param) else None

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups of processes that hold different parts."""
        mesh, placements = self.param.device_mesh, self.param.placements
        return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate())

    def span(self, dim: int) -> range | None:
        """The positions along ``dim`` that this process holds; None where the tensor is divided otherwise."""
        from torch.distributed.tensor import Shard as Along
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        placements = self.param.placements
        if any(not p.is_replicate() and not (type(p) is Along and p.dim == dim) for p in placements):
            return None
        shape, offset = compute_local_shape_and_global_offset(self.param.shape, self.param.device_mesh, placements)
        return range(offset[dim], offset[dim] + shape[dim])

    def whole(self, part: Tensor) -> Tensor:
        """A DTensor of the parameter's shape of which this process holds ``part``, the same memory."""
        from torch.distributed.tensor import DTensor

        p = self.param
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


class Sums:
    """Sums over all entries of vectors, also of those that other processes hold.

    Args:
        shards: how each tensor of the vectors is divided; None where it is whole.
    """

    def __init__(self, shards: Sequence[Shard | None]):
        self._parts: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
        for i, shard in enumerate(shards):
            self._parts.setdefault(() if shard is None else shard.groups, []).append(i)

    def total(self, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Σ (or the largest) over the tensors of numbers that each contributes, shape (tensors, …)."""
        reduce = torch.amax if op == dist.ReduceOp.MAX else torch.sum
        out = []
        for groups, index in self._parts.items():
            mine = reduce(numbers[index], 0)
            for group in groups:
                collectives.all_reduce(mine, "norms", group, op)
            out.append(mine)
        return reduce(torch.stack(out), 0)

    def dot(self, a: Vec, b: Vec) -> Tensor:
        """⟨a, b⟩."""
        return self.total(torch.stack([torch.dot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True)]))

    def norm(self, a: Vec, q: float = 2) -> Tensor:
        """‖a‖_q."""
        sizes = torch.stack([t.abs().amax() if q == math.inf and t.numel() else t.abs().pow(q).sum() for t in a])
        return self.total(sizes, dist.ReduceOp.MAX) if q == math.inf else self.total(sizes).pow(1 / q)

    def each(self, a: Vec) -> list[Tensor]:
        """The sum of the entries of each tensor."""
        sums = torch.stack([t.sum() for t in a])
        for groups, index in self._parts.items():
            for group in groups:
                mine = sums[index]
                collectives.all_reduce(mine, "sums", group)
                sums[index] = mine
        return list(sums)

    def means(self, a: Vec) -> list[Tensor]:
        """The mean of the finite entries of each tensor."""
        finite = [t.isfinite() for t in a]
        sums = torch.stack([torch.where(f, t, 0).sum() for f, t in zip(finite, a, strict=True)])
        both = torch.stack([sums, torch.stack([f.sum() for f in finite]).to(sums)])
        for groups, index in self._parts.items():
            for group in groups:
                mine = both[:, index].contiguous()
                collectives.all_reduce(mine, "sums", group)
                both[:, index] = mine
        return list(both[0] / both[1].clamp_min(1))


class LocalSums(Sums):
    """Where this process holds everything."""

    def __init__(self) -> None:
        super().__init__(())

    def each(self, a: Vec) -> list[Tensor]:
        return [t.sum() for t in a]

    dot = staticmethod(vec.dot)
    norm = staticmethod(vec.norm)

    def total(self, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        return numbers.amax(0) if op == dist.ReduceOp.MAX else numbers.sum(0)


LOCAL_SUMS = LocalSums()


def sums(shards: Sequence[Shard | None]) -> Sums:
    """Sums over vectors whose tensors are divided in these ways."""
    return LOCAL_SUMS if all(s is None for s in shards) else Sums(shards)
