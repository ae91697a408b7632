r"""S of a piecewise linear model: with J = ∂f/∂a the Jacobian of the outputs, S = Jᵀ(∇²_f ℓ)J exactly, all neurons at once.

Behind a ReLU network's layer there is no other curvature than the loss's own; ∇²_f ℓ = Σ_r w_r F_r F_rᵀ takes as many backward passes as it has
factors (C − 1 for cross-entropy with C classes), instead of a double backprop per unit and position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from precond.analysis.curvature.neurons.loss import LossCurvature
from precond.analysis.curvature.neurons.record import Op, Record

# Linear or piecewise linear in all tensors together.
_ADDITIVE = frozenset(
    {
        "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "sub_", "rsub", "neg", "__neg__",
        "cat", "concat", "stack", "relu", "relu_", "leaky_relu", "leaky_relu_", "relu6", "hardtanh", "hardtanh_",
        "threshold", "threshold_", "abs", "clamp", "clamp_min", "clamp_max", "clip", "max_pool1d", "max_pool2d",
        "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
        "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "flatten", "unflatten", "view", "reshape", "contiguous", "clone", "permute", "transpose",
        "movedim", "swapaxes", "squeeze", "unsqueeze", "expand", "__getitem__", "chunk", "split", "narrow", "select",
        "roll", "flip", "mean", "sum", "amax", "amin", "maximum", "minimum", "pad", "interpolate", "pixel_shuffle",
    }
)  # fmt: skip
# Linear in the first tensor, where no other one depends on a.
_LINEAR = frozenset(
    {
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
        "__matmul__", "mm", "bmm", "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide", "prelu",
    }
)  # fmt: skip


def piecewise_linear(record: Record, starts: Iterable[Tensor], outputs: Tensor) -> bool:
    """Whether all that a recorded forward computes of ``starts``, and that the loss reads, is ``outputs``, by piecewise linear calls.

    Args:
        record: of the forward pass and the loss.
        starts: the δ added to pre-activations.
        outputs: of the model.
    """
    end = record.producer(outputs, len(record.ops))
    if end is None:
        return False
    given = {id(t) for t in starts}
    depend = set(given)
    for op in record.ops[: end + 1]:
        touched = [t for t in op.inputs if id(t) in depend]
        if not touched:
            depend -= {id(op.out)} - given  # overwritten
        elif _is_linear(op, touched):
            depend.add(id(op.out))
        else:
            return False
    return not any(id(t) in depend and t is not outputs for op in record.ops[end + 1 :] for t in op.inputs)


def _is_linear(op: Op, touched: Sequence[Tensor]) -> bool:
    name = getattr(op.function, "__name__", "")
    if name == "batch_norm":
        return not op.argument(5, "training", False) and op.argument(1, "running_mean") is not None
    if name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
        return not op.argument(2, "training", True)
    if name in _ADDITIVE:
        return True
    first = next(op.inputs)
    divides = name in ("div", "__truediv__", "true_divide")
    return name in _LINEAR and len(touched) == 1 and (not (divides or name == "prelu") or first is touched[0])


def pulled_back(
    outputs: Tensor, deltas: Sequence[Tensor], loss: LossCurvature
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """JᵀF_r of each factor, for each of ``deltas``, and w, (r, N)."""
    if loss.factors is not None:
        F, w = loss.factors
    else:
        assert loss.c is not None
        C = loss.c.shape[1]
        F = torch.eye(C, dtype=loss.c.dtype, device=loss.c.device)[:, None].expand(C, *loss.c.shape)
        w = loss.c.T
    rows = [
        torch.autograd.grad(outputs, deltas, f.reshape(outputs.shape), retain_graph=True, materialize_grads=True) for f in F
    ]
    return rows, w
