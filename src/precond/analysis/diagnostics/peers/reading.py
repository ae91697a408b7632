"""What several of them share: denominators, and options whose P is no linear map or not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import InverseRoot, LinearMap
from precond.algebra.maps.tucker import Tucker
from precond.optim.blocks import state_dtype

Options = Mapping[str, Any]


def wide(t: Tensor) -> Tensor:
    """16-bit state in float32."""
    return t.detach().to(state_dtype(t.dtype))


def inverse_root(h: Tensor) -> LinearMap:
    """P = diag(h^(−1/2)); entries of h that are 0, without a gradient so far, are not moved."""
    return InverseRoot((torch.where(h == 0, torch.inf, h),))


def only(group: Options, **known: Any) -> None:
    """Refuse other values of options than those whose P is known.

    Raises:
        TypeError: naming the option.
    """
    for name, value in known.items():
        if (given := group.get(name, value)) != value:
            raise TypeError(
                f"preconditioner_of: with {name}={given!r} the step is not known as a linear map of the gradient (known is {name}={value!r}); "
                "state it with @precond.analysis.diagnostics.register"
            )


def rotated(bases: Sequence[Tensor | None], h: Tensor, param: Tensor, shape: Sequence[int]) -> LinearMap:
    """P = (Q₁ ⊗ Q₂ ⊗ …) diag(h^(−1/2)), of bases whose columns are the eigenvectors, None for the identity."""
    like = (param.detach(),)
    rotation = Tucker([None if Q is None else wide(Q) for Q in bases], like, shape)
    return rotation @ InverseRoot((torch.where(h == 0, torch.inf, h).reshape(param.shape),))
