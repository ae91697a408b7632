"""State dicts: written under an optimizer's names, read by parameter name where names are known, all or nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from copy import deepcopy
from itertools import filterfalse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precond.algebra.sharding import copy_, divided
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf
from precond.optim.checking.arguments import shown
from precond.optim.engine.shared_state import Owned, from_owners
from precond.optim.optimizer.binding import is_spare
from precond.optim.optimizer.entries import follow
from precond.optim.optimizer.naming import Naming
from precond.optim.ranks.replicas import meet

if TYPE_CHECKING:
    from precond.optim.optimizer.stepping import Stepping


def whole(state_dict: dict[str, Any], optimizer: Stepping) -> dict[str, Any]:
    """A state dict with what other ranks own: on every rank all of it, or its part where the parameter is divided among ranks."""
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {key: dict(entries) for key, entries in state_dict["state"].items()}
    wanted: list[tuple[Leaf, Owned, Tensor]] = []
    places: list[tuple[dict[str, Any], str]] = []
    for leaf in _owned_leaves(optimizer):
        mine = state.get(index[leaf.param], {})
        for key, it in sorted(optimizer._owned[leaf.param].items()):
            if (outer := optimizer.naming.outside(key)) in mine:
                wanted.append((leaf, it, mine[outer]))
                places.append((mine, outer))
    for i, t in from_owners(wanted):
        leaf, (mine, outer) = wanted[i][0], places[i]
        mine[outer] = _in_parts(t, leaf) if divided(leaf.param) and t.numel() > _SMALL else t
    return {**state_dict, "state": state}


def meet_owners(optimizer: Stepping) -> None:
    """Wait for all ranks whose state is to be put together.

    Raises:
        RuntimeError: where they do not come.
    """
    groups = {leaf.pieces.ranks: leaf.pieces.group for leaf in _owned_leaves(optimizer) if leaf.pieces is not None}
    for group in groups.values():
        meet(group, f"{optimizer.naming.name}.state_dict", _ON_EVERY_RANK)


def _owned_leaves(optimizer: Stepping) -> list[Leaf]:
    """Those of whose state one rank has what others have not, also where they are frozen."""
    return [leaf for leaf in optimizer._bound.leaves if leaf.param in optimizer._owned and leaf.pieces is not None]


_ON_EVERY_RANK = (
    "Ranks keep the state of what they own: call state_dict() on every rank and save on one, or call consolidate_state_dict() on every "
    "rank before, after which one may call it alone"
)
_SMALL = 2**12
"""Numbers of a tensor that each rank keeps whole in a state dict."""


def _in_parts(t: Tensor, leaf: Leaf) -> Tensor:
    """The DTensor of which each rank holds some rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    assert leaf.pieces is not None
    mesh = DeviceMesh.from_group(leaf.pieces.group, t.device.type)
    return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)


def started(state_dict: dict[str, Any], optimizer: Stepping) -> dict[str, Any]:
    """A state dict, where the optimizer's torch twin has it so, without the tensors of parameters that made no step.

    It says which parameters were frozen in the last step, or had no gradient: that decides which others are stepped jointly.
    """
    drop = optimizer.naming.only_started
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    frozen, absent = ({index[p] for p in of} for of in (optimizer.frozen, optimizer.absent))
    state = {}
    for key, entries in state_dict["state"].items():
        step = torch.as_tensor(entries.get("step", 0.0))
        narrow = step.to(torch.float32)  # as torch.optim's, where that holds it
        kept = {} if drop and not step else entries
        state[key] = {**kept, "step": narrow if narrow == step else step}
        if key in frozen:
            state[key][FROZEN] = True
        if key in absent:
            state[key][ABSENT] = True
    return {**state_dict, "state": state}


def load(optimizer: Stepping, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict (this library's or, for a torch-named recipe, torch.optim's).

    Nothing changes unless everything fits. State keeps its own dtype. Options and tensors that the dict lacks keep
    the values of a fresh optimizer.

    Raises:
        ValueError: where groups, shapes or keys do not fit; the message names the parameter.
    """
    try:
        saved_groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
        saved_state: Mapping[Any, Mapping[str, Any]] = state_dict["state"]
        if not isinstance(saved_state, Mapping):
            raise TypeError
        for group in saved_groups:
            list(group["params"])
    except (KeyError, TypeError) as error:
        check_mapping(state_dict)
        if any(str(key).startswith("state.") for key in state_dict):
            raise ValueError(
                "load_state_dict: the state dict is flattened, which torch.distributed.checkpoint.state_dict undoes, but not together with "
                "full_state_dict=True: leave out one of the two, when saving and when loading"
            ) from error
        raise ValueError(
            "load_state_dict: expected a dict with 'state' and 'param_groups' (dicts with 'params'), as optimizer.state_dict() returns; "
            "is the file truncated, or a model's state dict?"
        ) from error
    groups = optimizer.param_groups
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"load_state_dict: the state dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}; "
            "make the same groups before loading"
        )
    identity = _match(groups, saved_groups)
    new_groups = [
        {**ours, **{k: deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")}}
        for ours, saved in zip(groups, saved_groups, strict=True)
    ]
    # Cells are those of the step before saving; what has been frozen or thawed since is followed as if never stopped.
    frozen = {p for p in identity if _was_frozen(saved_state, identity[p])} if saved_state else None
    if frozen is not None:
        frozen |= {p for group in groups for p in group["params"] if p not in identity and not p.requires_grad}
    absent = frozenset(p for p, key in identity.items() if saved_state.get(key, {}).get(ABSENT, False))
    bound = optimizer.bound_to(new_groups, {}, frozen, absent)
    known: dict[Tensor, dict[str, Tensor]] = {}
    names = {}
    for leaf, key, tensor in bound.entries:
        known.setdefault(leaf.param, {})[key] = tensor
        names[leaf.param] = leaf.name
    # The map of Muon is made of the momentum in each step, so that a state without it, torch's, is whole.
    of_momentum = {
        leaf.param
        for cell in bound.cells
        for inside in cell.cells
        for leaf in inside.leaves
        if inside.preconditioner.uses_momentum and inside.preconditioner.timeless
    }
    elsewhere = {id(t) for shared in bound.shared for leaf, key, t in shared.elsewhere}
    for shared in bound.shared:
        for leaf, key, tensor in shared.elsewhere:
            known[leaf.param][key] = tensor
    copies: list[tuple[Tensor, Tensor]] = []
    for param, mine in known.items():
        saved = {k: v for k, v in saved_state.get(identity.get(param), {}).items() if isinstance(v, Tensor | int | float)}
        theirs = {optimizer.naming.inside(k): v for k, v in saved.items() if k not in _MARKS}
        if param in bound.waiting:
            theirs = {key: theirs[key] for key in mine.keys() & theirs.keys()}
        needed = set() if param in of_momentum else set(filterfalse(bound.is_optional, mine.keys() - {"step", "clock"}))
        copies += _fit(optimizer.naming, names[param], mine, theirs, needed)
    unsaved = {p for p in frozen or () if identity.get(p) not in saved_state and not p.requires_grad}
    lost = [leaf.name for leaf in bound.leaves if leaf.param in unsaved and optimizer.state.get(leaf.param)]
    with torch.no_grad():
        for target, value in copies:
            if id(target) not in elsewhere:
                copy_(target, value)
            elif divided(value):
                value.full_tensor()  # type: ignore[attr-defined]  # its owner's, who needs this rank's part
        bound.read_counts()
    for ours, new in zip(groups, new_groups, strict=True):
        ours.update(new)
    optimizer.adopt(bound, defaultdict(dict))
    optimizer._settle()
    for param, key in identity.items():
        if saved_state and param in bound.waiting and key in saved_state:
            waits = {k: deepcopy(v) for k, v in saved_state[key].items() if k not in _MARKS}
            optimizer.state[param] = waits | optimizer.state.get(param, {})
    follow(optimizer.state)
    if lost:
        warn(
            f"load_state_dict: the state dict has nothing of {', '.join(lost[:3])}{', …' if lost[3:] else ''}, which is frozen: "
            "its state starts anew when it is thawed. Torch's set_state_dict leaves out what is frozen: call it before freezing"
        )


def check_mapping(state_dict: Any) -> None:
    """Raise TypeError where something is no dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: state_dict must be a dict, as optimizer.state_dict() returns, got {shown(state_dict)}; "
            "read a file by torch.load"
        )


def _was_frozen(saved_state: Mapping[Any, Mapping[str, Any]], key: Any) -> bool:
    return key not in saved_state or bool(saved_state[key].get(FROZEN, False))


def _was_called(k: int, before: str, now: str) -> bool:
    """Whether version 0.1 called a parameter of a group that was added later so, which has the name of its model now."""
    before = before.removeprefix(f"{k}.")
    return k > 0 and (re.fullmatch(r"param_\d+", before) is not None or now.endswith(f".{before}"))


def _match(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Any]:
    """Which saved state belongs to which parameter: by name where both sides know names that tell parameters apart, else by position."""
    saved, ours = _by_name(saved_groups), _by_name(groups)
    if saved is not None and ours is not None:
        for k, (g, s) in enumerate(zip(groups, saved_groups, strict=True)):
            for now, before in zip(g["param_names"], s["param_names"], strict=False):
                if now not in saved and before not in ours and _was_called(k, before, now):
                    saved[now] = saved.pop(before)
        new, gone = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
        if new or gone:
            warn(
                "load_state_dict: parameters do not match by name; "
                f"start fresh: {', '.join(new) or 'none'}; ignored: {', '.join(gone) or 'none'}"
            )
        return {ours[n]: saved[n] for n in ours if n in saved}
    for k, (g, s) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(g["params"]) != len(s["params"]):
            raise ValueError(
                f"load_state_dict: group {k} of the state dict has {len(s['params'])} parameters, the optimizer's has "
                f"{len(g['params'])}; pass the model (or named parameters) on both sides to load by name"
            )
    return {p: i for g, s in zip(groups, saved_groups, strict=True) for p, i in zip(g["params"], s["params"], strict=True)}


def _by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What groups hold, by name; None where they lack names, or two have one, as in torch's groups of two models."""
    if not all("param_names" in g for g in groups):
        return None
    pairs = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    found = dict(pairs)
    return found if len(found) == len(pairs) else None


def _fit(
    naming: Naming, name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any], needed: Set[str]
) -> list[tuple[Tensor, Tensor]]:
    """(target, value) pairs of one parameter; ValueError where they do not fit, or lack what is ``needed`` of a state that was begun."""

    def called(keys: Iterable[str]) -> str:
        return ", ".join(map(repr, sorted(map(naming.outside, keys))))

    # "clean": kept once, where statistics now are of what is descended.
    if alien := list(filterfalse(is_spare, theirs.keys() - mine.keys() - {"clean"})):
        raise ValueError(
            f"load_state_dict: the state of {name!r} has {called(alien)}, which {naming.name} does not keep "
            f"(it keeps {called(mine)}); was it saved by another recipe, or with other options?"
        )
    # Version 0.1 did not count the directions that Polar's mean has: all of them.
    uncounted = {key: key.removesuffix("rank") + "gram" for key in mine.keys() - theirs.keys() if key.split(".")[-1] == "rank"}
    missing = needed - theirs.keys() - uncounted.keys()
    if missing and (theirs.keys() - {"step"} or theirs.get("step")):
        raise ValueError(
            f"load_state_dict: the state of {name!r} lacks {called(missing)}, which {naming.name} keeps (it has "
            f"{called(theirs)}); was it saved by another recipe, or with other options?"
        )
    out = []
    for key, target in mine.items():
        if key in theirs:
            value = torch.as_tensor(theirs[key])
            value = value.reshape(()) if key == "step" else value
            if key == "step" and naming.only_started and theirs.keys() - {"step"}:
                value = value.clamp_min(1)  # torch.optim.SGD carries on what it was given
            if value.shape != target.shape:
                raise ValueError(
                    f"load_state_dict: {naming.outside(key)!r} of {name!r} has shape {tuple(value.shape)}, the parameter needs "
                    f"{tuple(target.shape)}; was it saved from another model?"
                )
            out.append((target, value))
        elif key == "step" and theirs:
            # torch.optim.SGD counts no steps: a buffer that exists has been started.
            out.append((target, torch.ones(())))
        elif key in uncounted and theirs:
            out.append((target, torch.full((), float(mine[uncounted[key]].shape[-1]))))
    return out


FROZEN, ABSENT = _MARKS = "frozen", "absent"
"""What the state of a parameter holds that was frozen when it was saved, or had no gradient where others of its layer had."""
