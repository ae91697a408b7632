"""What an operation costs on a device: launches, and whether the host waits for it. Rules of torch 2.13, read off schemas and tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# Allocations, and bookkeeping that no kernel does, beside views and questions, which their schemas give away.
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift", "detach_",
           "_unsafe_view", "record_stream"}  # fmt: skip
# One launch each here, though they are dozens.
SOLVERS = {
    *("linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "linalg_svd", "_linalg_svd"),
    *("linalg_qr", "geqrf", "ormqr", "linalg_householder_product"),
    *("linalg_cholesky", "linalg_cholesky_ex", "cholesky_inverse", "linalg_lu_factor_ex", "linalg_ldl_factor_ex"),
    *("linalg_inv_ex", "_linalg_solve_ex", "linalg_solve_triangular", "triangular_solve"),
}
READS_INFO = {"_linalg_eigh", "_linalg_check_errors"}
# Of a multi-tensor kernel: tensors in one launch by the number of lists, blocks in one launch, entries of a block.
TENSORS, BLOCKS, BLOCK = (110, 64, 48, 36, 30), 320, 65536
CONCATENATED = 128


@cache
def name_of(func: OpOverload) -> str:
    """``_foreach_add_`` of ``aten::_foreach_add_.List``."""
    return func._schema.name.split("::")[-1]


@cache
def is_free(func: OpOverload) -> bool:
    """Whether no kernel runs: a view, an allocation, or an answer that is no tensor."""
    name, schema = name_of(func), func._schema
    if name in NOTHING:
        return True
    if name in READS_INFO:
        return False
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    is_view = bool(aliases) and not any(a.is_write for a in aliases)
    answers = not schema.is_mutable and not any("Tensor" in str(r.type) for r in schema.returns)
    return is_view or answers


def waits(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the host must read what the device holds: a number, the shape of a result, a solver's ``info``."""
    if name_of(func) in ("index", "index_put", "index_put_"):
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
    return _always_waits(func)


@cache
def _always_waits(func: OpOverload) -> bool:
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name_of(func) in READS_INFO or not tags.isdisjoint(func.tags)


def launches(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Kernels that the operation launches."""
    name = name_of(func)
    if is_free(func):
        return 0
    if name.startswith(("_foreach", "_fused")):
        return _multi_tensor(name, [x for x in (*args, *kwargs.values()) if _is_list(x)])
    if name in ("stack", "cat"):
        return ceil(len(args[0]) / CONCATENATED)
    return 2 if name == "addr_" else 1


def pairs_up(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether a call on lists computes on one device at a time, tensor by tensor."""
    if not name_of(func).startswith("_foreach"):
        return False
    lists, others = [x for x in args if _is_list(x)], [x for x in args if isinstance(x, Tensor)]
    return not others and all(len({t.device for t in row}) == 1 for row in zip(*lists, strict=True))


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple) and bool(x) and isinstance(x[0], Tensor)


def _multi_tensor(name: str, lists: Sequence[Sequence[Tensor]]) -> int:
    """As many tensors and blocks as fit in the arguments of a kernel, for each launch; what is new is one more list."""
    of = lists[0]
    if len({t.device for t in of}) > 1:  # the slow route: tensor by tensor
        return sum(t.device.type != "cpu" for t in of)
    reduces = name == "_foreach_norm"
    depth = len(lists) + (not name.endswith("_") and not reduces)
    blocks = sum(ceil(max(t.numel(), 1) / BLOCK) for t in of)
    return (1 + reduces) * max(ceil(len(of) / TENSORS[min(depth, 5) - 1]), ceil(blocks / BLOCKS))
