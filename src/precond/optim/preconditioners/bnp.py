"""Batch Normalization Preconditioning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from precond.algebra import checks
from precond.optim.blocks import Block, State, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.inputs import Moments, Request
from precond.optim.inputs.moments import Conv
from precond.optim.preconditioners.input_side import InputSide
from precond.optim.preconditioners.layer_parts import LayerPart, key_of

_REQUESTS = {conv: Request("moments", conv) for conv in get_args(Conv)}
_DENSE = 20  # steps that are all observed
_ENOUGH = 32  # examples in a batch for each step up to the next one that is observed


@dataclass(frozen=True)
class BNP(InputSide):
    r"""Each layer in the coordinates of its standardized inputs: P = U D, U = [[1, −μᵀ], [0, I]], D = diag(1, 1/σ̃).

    What BatchNorm does to the conditioning, without changing the network: M = P Pᵀ is the inverse of E[ĥĥᵀ], ĥ = [1; h],
    with the covariances of different inputs dropped. M g costs a few vector operations:
    dw = (g_w − g_b μ)/σ̃², db = g_b − μᵀdw. Without a bias there is nothing to center with, and σ̃² is made of E[h²].

    Args:
        decay: ρ of the running averages, in [0, 1); 0: the batch's own statistics.
        damping: ε in σ̃² = σ² + ε(σ² + μ²), per feature, so that features of any scale are scaled alike; inputs that are
            rarely active get more (see :meth:`damping_of`). With ε = 0 nothing is damped.
        conv: convolutions have one feature per input ``"channel"`` or per ``"patch"`` entry.
        width_scaling: divide M by q² = max(n/N, 1), n inputs and N samples (Lange et al., §3.3): transfers learning rates
            between widths and batch sizes; conditioning is as before.
        every: after the first 20 steps a layer is observed in each k-th one (and ρ is ρ^k), with k = min(every, B/32) where it sees B
            rows or images: large batches need not be seen each time, and what a small one shows must bound its own step. With
            ``decay=0`` always.

    Raises:
        TypeError: (with an optimizer) where parameters are given instead of a module, whose inputs can be observed.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> x = torch.tensor([[1.0, -100.0], [3.0, 100.0]])  # μ = (2, 0), σ = (1, 100)
        >>> optimizer = precond.PreconditionedGD(model, lr=1.0, preconditioner=precond.BNP(decay=0.0, damping=0.0))
        >>> (model(x).T @ torch.tensor([-0.5, 0.5])).sum().backward()  # g_w = (1, 100), g_b = 0
        >>> _ = optimizer.step()
        >>> [round(v, 4) for v in (*model.weight[0].tolist(), model.bias.item())]  # −g_w/σ², and μᵀg_w/σ²
        [-1.0, -0.01, 2.0]

    References:
        Lange, Helfrich & Ye (2022), JMLR 23(72); Ye, eqs. (25)–(27).
    """

    decay: float = 0.99
    damping: float = 0.01
    conv: Conv = "channel"
    width_scaling: bool = False
    every: int = 16

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("BNP", decay=self.decay)
        checks.non_negative("BNP", damping=self.damping)
        checks.positive("BNP", every=self.every)

    @property
    def request(self) -> Request:
        return _REQUESTS[self.conv]

    def _intervals(self, step: float, examples: Tensor) -> list[float]:
        """k, at a step of layers that see so many examples."""
        dense = self.decay == 0 or step <= _DENSE
        return [1 if dense else min(max(n // _ENOUGH, 1), self.every) for n in examples.tolist()]

    def wants(self, state: State, part: LayerPart) -> list[bool]:
        step = min(state.steps) + 1
        return [any(step % k == 0 for k in self._intervals(step, state[key_of("examples", part)]))] * len(state.block.turns)

    def rate(self, step: float, new: Moments) -> list[float]:
        return [self.decay**k for k in self._intervals(step, new.examples)]

    def fresh(self, part: LayerPart, block: Block) -> dict[str, Tensor]:
        weight = block.leaves[part.weight].param
        shape = part.site.shape(self.request)
        dtype = state_dtype(weight.dtype)
        features = {name: torch.zeros(shape, dtype=dtype, device=weight.device) for name in ("mean", "variance", "activity")}
        return {"count": torch.zeros(shape[:1], dtype=dtype), "examples": torch.zeros((), dtype=dtype), **features}

    def arrow(self, part: LayerPart, state: State) -> tuple[Tensor, Tensor, float | Tensor]:
        layout = part.layout(self.request)
        mean, std = map(layout.spread_out, self.scales(part, state))
        if not self.width_scaling:
            return mean, std, 1.0
        n = layout.inputs(part.site.weight.shape)
        q = (n / state["count"].clamp_min(1)).clamp_min(1).sqrt().to(std)[:, None]
        return mean, std * q, (1 / q)[..., None]
