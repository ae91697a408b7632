"""RMS whose steps are in proportion to what a layer puts out at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import LinearMap, Scaled
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, Stack, State, state_dtype
from precond.optim.preconditioners.eigenbases import WARM_UP
from precond.optim.preconditioners.parts import Part, placed
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.seen import Seen


@dataclass(frozen=True)
class RelativeRMS(RMS):
    r"""RMS, of a layer with raw inputs in proportion: M = s·diag(1/(√r̂ + ε)), s = ‖z₀‖/√A where that is large, otherwise 1.

    Behind :class:`~precond.Whitening` or :class:`~precond.BNP`, z₀ = P₁⁻¹p at the first step and A the number of outputs, ‖z₀‖/√A is the
    root mean square of the outputs of a layer. RMS moves every entry of z by about the learning rate, whatever its size. Of a layer
    whose inputs are in the thousands so are z₀ and the outputs, and thousands of steps would pass before they were undone. Here
    a step is to these outputs what it is to those of standardized inputs. Decoupled weight decay is not longer.

    ``adam``, ``adamw`` and ``whitening`` take it for layers where ``inputs=`` is given. What is no observed layer takes ``RMS``.

    Args:
        decay, eps, start, bias_correction, centered, amsgrad: as in :class:`~precond.RMS`.
        large: ≥ 0, the ‖z₀‖/√A from which s is that. Standardized inputs and usual initial weights make it about 1, and
            trained networks a few.

    Raises:
        ValueError: as in :class:`~precond.RMS`, and for a negative ``large``.

    Example:
        >>> import torch, precond
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> P = precond.Whitening(damping=0.0, shrinkage=0.0) @ precond.RelativeRMS(decay=0.0, eps=0.0)
        >>> optimizer = precond.PreconditionedGD(layer, lr=0.1, preconditioner=P)
        >>> layer(torch.tensor([[10.0, 0.0], [0.0, 10.0]])).sum().backward()  # outputs 30 and 40
        >>> _ = optimizer.step(); round(optimizer.state[layer.weight]["inner.scale"].item(), 1)
        35.4

    References:
        The project's own. You, Gitman & Ginsburg (2017), LARS, for steps in proportion to weights.
    """

    large: float = 10.0

    counts = frozenset({"scale"})

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.non_negative("RelativeRMS", large=self.large)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        of_layers = [i for i, leaf in enumerate(leaves) if _is_layer(leaf)]
        plain = RMS(**{field.name: getattr(self, field.name) for field in fields(RMS)})
        rest = [i for i in range(len(leaves)) if i not in set(of_layers)]
        mine = [leaves[i] for i in of_layers]
        return [Part(tuple(of_layers[i] for i in part), self) for part in blocks.by_group(mine)] + placed(plain, leaves, rest)

    def looks(self, step: int) -> bool:
        return step == 1  # ranks that share a block agree about a step before they count it

    def settled(self, state: State) -> bool:
        return "scale" not in state or all(_each(state["scale"]))

    def init(self, block: Block) -> dict:
        scale = torch.zeros((), dtype=state_dtype(block.tensors[0].dtype))  # on the host; 0: not known
        return {**super().init(block), **({"scale": scale} if _outputs(block) else {})}

    def observe(self, state: State, seen: Seen) -> None:
        super().observe(state, seen)
        if seen.position is not None:
            self.measure(state, seen.position, seen.ready)

    def measure(self, state: State, position: Callable[[], Vec], ready: Callable[[], bool]) -> None:
        """Keep s of the parameters z₀, where none is known and P₁ is: in the first steps alone, and then a device waits once."""
        if "scale" not in state or max(state.steps) > WARM_UP or all(_each(state["scale"])) or not ready():
            return
        stacked = isinstance(state.block, Stack)
        squares = torch.stack([t.square().flatten(int(stacked)).sum(-1) for t in position()])
        size = (state.block.sums.total(squares) / _outputs(state.block)).sqrt()
        found = torch.where(size > self.large, size, 1.0).to(state["scale"])
        state["scale"].copy_(torch.where(state["scale"] > 0, state["scale"], found))

    @staticmethod
    def scale(state: State) -> float | Tensor | None:
        """s; of a stack (k,); None where it is 1."""
        found = [s or 1.0 for s in _each(state["scale"])] if "scale" in state else []
        if all(s == 1 for s in found):
            return None
        return torch.tensor(found, dtype=torch.float64).to(state["r"][0]) if isinstance(state.block, Stack) else found[0]

    def findings(self, state: State) -> Sequence[str]:
        found = _each(state["scale"]) if "scale" in state else []
        return [f"first outputs {s:.2g}: steps × {s:.2g}" if s > 1 else "" for s in found]

    def map(self, state: State) -> LinearMap:
        N, s = super().map(state), self.scale(state)
        return N if s is None else Scaled(N, square=s)


def _each(numbers: Tensor) -> list[float]:
    """The number of each member of a stack; of a layer alone its own."""
    return numbers.tolist() if numbers.ndim else [numbers.item()]


def _is_layer(leaf: Leaf) -> bool:
    return bool(leaf.sites) and (leaf.kind == "bias" or (leaf.kind == "weight" and leaf.ndim > 1))


def _outputs(block: Block) -> int:
    """A of the one observed layer that a block is; 0 where it is more than that, or none."""
    weight, *rest = block.leaves
    if weight.kind != "weight" or weight.ndim < 2 or not weight.sites or len(rest) > 1:
        return 0
    if any(leaf.kind != "bias" or leaf.module is not weight.module for leaf in rest):
        return 0
    return weight.shape[1 if weight.inputs_first else 0]
