"""Closures, and the state of a probe: where the parameters stand between the gradients of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra import vec
from precond.algebra.sharding import local
from precond.algebra.spaces import Tangent
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import Leaf
from precond.optim.engine.loop import ProbeResults
from precond.optim.engine.point import Point
from precond.optim.optimizer.closures import Gradients, version_of
from precond.optim.optimizer.passes import Buffers, Random, Recorder, random_state, restore_random_state

"""One per leaf of the optimizer; None where there is none."""


def unscaled(gradients: Sequence[Tensor | None], scale: float | Tensor | None) -> Gradients:
    """gradients/scale in float32 or wider, new tensors; the same ones for no scale."""
    if scale is None:
        return list(gradients)
    wide = [None if g is None else g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in gradients]
    there: dict[torch.device, Scalar] = {}
    together: dict[torch.device, dict[int, Tensor]] = {}
    for i, g in enumerate(wide):
        if g is None:
            continue
        if g.device not in there:
            there[g.device] = torch.as_tensor(scale, device=g.device) if isinstance(scale, Tensor) else scale
        if g.layout == torch.strided and local(g) is g:
            together.setdefault(g.device, {})[i] = g
        else:
            wide[i] = g / there[g.device]
    for device, of in together.items():
        for i, g in zip(of, torch._foreach_div(list(of.values()), there[device]), strict=True):
            wide[i] = g
    return wide


def place_gradients(leaves: Sequence[Leaf]) -> None:
    """Gradients that are divided otherwise than their parameters become divided like them: where tensor parallelism divides sequences,
    those of a normalization layer are sums over the ranks that are still to be taken. Every rank that holds a part must call it."""
    for leaf in leaves:
        if leaf.shard is None:
            continue
        g: Any = leaf.param.grad
        if g is not None and g.placements != leaf.shard.param.placements:
            leaf.param.grad = g.redistribute(placements=leaf.shard.param.placements)


def take_gradients(leaves: Sequence[Leaf]) -> Gradients:
    """Take the gradients out of ``.grad``, which is None afterwards."""
    taken: Gradients = []
    for leaf in leaves:
        g = leaf.param.grad
        # A view into a larger buffer (DDP's buckets) is overwritten by the next backward.
        taken.append(g.clone() if g is not None and g._is_view() else g)
        leaf.param.grad = None
    return taken


class Probe:
    """A step whose further gradients are being gathered.

    Attributes:
        point: the unperturbed point with the clean gradient (an empty one where it is not needed any more).
        clean: what ``.grad`` held; None where it was let go.
        evidence: what the step will know.
        moved: whether the parameters stand at p + δ.
        refused: whether a gradient held inf or NaN, so that nothing was probed.
        forwards: of the model in the clean pass, 0 where they were not counted.

    ``spare`` holds a buffer per parameter for its value while it is away; it is kept from step to step.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        modules: Sequence[nn.Module],
        point: Point,
        clean: Gradients | None,
        scale: float | Tensor | None,
        regularizer: int,
        evidence: ProbeResults,
        deltas: Sequence[Tangent],
        spare: dict[Tensor, Tensor],
        refused: bool = False,
        forwards: int = 0,
    ):
        self.leaves, self.modules = leaves, modules
        self.point, self.clean, self.scale, self.regularizer = point, clean, scale, regularizer
        self.evidence, self.refused, self.forwards = evidence, refused, forwards
        self.moved = False
        self.asked = 0
        self._deltas, self._spare = list(deltas), spare
        self._found: list[Gradients] = []
        self._saved: Vec = ()
        self._buffers: Buffers | None = None
        self._after: Random | None = None
        self._before = 0  # forwards counted when the pass began
        self._left: tuple[list[tuple[Tensor | None, int]], int] | None = None  # .grad and the clearings, when it was complete

    def move(self, recorder: Recorder | None) -> bool:
        """Go to the next point; False (with the random state as after the clean pass) where none is left."""
        if not self._deltas:
            if self._after is not None:
                restore_random_state(self._after)
            return False
        delta = self._deltas.pop(0)
        storage = self.point.storage
        for leaf, p in zip(self.point.leaves, storage, strict=True):
            if leaf.param not in self._spare:
                self._spare[leaf.param] = torch.empty_like(p, requires_grad=False)
        self._saved = tuple(self._spare[leaf.param] for leaf in self.point.leaves)
        vec.copy_(self._saved, storage)
        self._buffers = Buffers(self.modules)
        self.moved = True
        self.asked += 1
        torch.clear_autocast_cache()  # its 16-bit copies of the weights are those of the point left
        if all(p.dtype == d.dtype for p, d in zip(storage, delta.vec, strict=True)):
            delta.add_to_(storage)
        else:
            for p, value, d in zip(storage, self.point.p, delta.formed(), strict=True):
                p.copy_(value + d)
        if recorder is not None and recorder.random is not None:
            if self._after is None:
                self._after = random_state(recorder.devices)
            restore_random_state(recorder.random)
        self._before = 0 if recorder is None else recorder.forwards
        return True

    def check_pass(self, recorder: Recorder | None) -> None:
        """Raise RuntimeError where a pass at the probed point, which is over, made no gradient, or went over more than the clean pass."""
        if all(leaf.param.grad is None for leaf in self.leaves):
            raise RuntimeError(
                "probe: no parameter has a gradient at the probed point: call backward() in the loop, "
                "`while opt.probe(): loss_fn(...).backward()`, and zero_grad() not after it; the parameters are back where they were"
            )
        if recorder is not None and 0 < self.forwards < recorder.forwards - self._before:
            raise RuntimeError(
                f"probe: the model was called {recorder.forwards - self._before} times at the probed point, and {self.forwards} times in the "
                "pass before: both passes go over the same micro-batches. Where an exception left the loop, or a pass is tried again, call "
                "restore() before the next forward; the parameters are back where they were, zero_grad() is up to you"
            )

    def note_complete(self, clearings: int) -> None:
        """Remember what ``.grad`` holds when no further gradient is wanted."""
        if self._left is None:
            self._left = ([version_of(leaf.param.grad) for leaf in self.leaves], clearings)

    def check_unchanged(self) -> None:
        """Raise RuntimeError where ``.grad`` has changed since the probe was complete."""
        if self._left is not None and any(
            leaf.param.grad is not g or version_of(g)[1] != version
            for leaf, (g, version) in zip(self.leaves, self._left[0], strict=True)
        ):
            raise RuntimeError(
                "probe: this step's probe was completed already, and .grad has changed since: run all micro-batches in each pass, "
                "`backward of all; while opt.probe(): backward of all; opt.step()` (docs/migration.md, From gradient accumulation); "
                "where a batch is given up without its step, call restore() before the next"
            )

    def check_left(self, clearings: int) -> None:
        """Raise RuntimeError where the gradient at the last probed point is no more."""
        if self.refused or self._left is None:
            return
        if self._left[1] != clearings or all(leaf.param.grad is None for leaf in self.leaves):
            raise RuntimeError(
                "step: zero_grad() was called between the loop of probe() and step(), which needs the gradient found there: call "
                "zero_grad() before the step's first backward()"
            )

    def collect(self, good: Callable[[Gradients], bool]) -> None:
        """The parameters go back; the gradient found is kept, the last one in ``.grad`` until the step.

        One that is not ``good`` stays in ``.grad``, where a GradScaler sees it, and no further one is asked for.
        """
        self.back()
        if self._deltas:
            if good([leaf.param.grad for leaf in self.leaves]):
                self._found.append(unscaled(take_gradients(self.leaves), self.scale))
            else:
                self.refused = True
                self._deltas.clear()

    def back(self) -> None:
        """Put parameters and buffers back, bit for bit."""
        if self.moved:
            with torch.no_grad():
                vec.copy_(self.point.storage, self._saved)
            if self._buffers is not None:
                self._buffers.restore()
            torch.clear_autocast_cache()
        self.moved, self._saved, self._buffers = False, (), None

    def give_back(self) -> None:
        """The clean gradient into ``.grad``, where it is still known."""
        if self.clean is not None:
            for leaf, g in zip(self.leaves, self.clean, strict=True):
                leaf.param.grad = g

    def cancel(self) -> None:
        """As if it had never been."""
        self.back()
        self.give_back()
        if self._after is not None:
            restore_random_state(self._after)

    def complete(
        self, scale: float | Tensor | None, signed: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]
    ) -> ProbeResults:
        """All gradients found, as vectors of the point; the last one is taken from ``.grad``."""
        last = unscaled([leaf.param.grad for leaf in self.leaves], scale)
        place = {leaf: i for i, leaf in enumerate(self.leaves)}
        vectors = []
        for found in [*self._found, last]:
            turned = signed(found)
            aligned = [(leaf, turned[place[leaf]], p) for leaf, p in zip(self.point.leaves, self.point.p, strict=True)]
            vectors.append(tuple(torch.zeros_like(p) if g is None else leaf.local(g).to(p.dtype) for leaf, g, p in aligned))
        self.evidence.found[self.regularizer] = tuple(vectors)
        return self.evidence

    @property
    def finite(self) -> bool:
        """Whether the gradients found are free of inf and NaN."""
        return not self.refused and all(vec.all_finite(v) for found in self.evidence.found.values() for v in found)
