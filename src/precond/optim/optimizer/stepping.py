"""Taking a step of the gradients that are there: by kernels where these compute it, by the engine's loop else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from precond.algebra import vec
from precond.algebra.vec import Vec
from precond.optim.engine import fused, loop
from precond.optim.engine.kernels.entrywise import Kernel
from precond.optim.engine.kernels.layer import Task, count_and_take
from precond.optim.engine.loop import ProbeResults
from precond.optim.engine.point import Point
from precond.optim.engine.verdict import Verdict, over
from precond.optim.optimizer.averaging import Averaged
from precond.optim.optimizer.binding import Binding
from precond.optim.optimizer.closures import Clearings, finite_loss
from precond.optim.optimizer.fusing import alike, divided, kernels_of
from precond.optim.optimizer.inspection import measure
from precond.optim.optimizer.model_hooks import ModelHooks
from precond.optim.optimizer.probing import Probe, unscaled
from precond.optim.optimizer.record import Record
from precond.optim.optimizer.second_gradients import SecondGradients
from precond.optim.preconditioners.stacked import Stacked
from precond.optim.ranks.replicas import averaged


class Stepping(SecondGradients):
    """Kernels where there are, else ``engine/loop.py``; what is not finite; :attr:`last`."""

    last: Record

    def _kernels(self) -> list[Kernel | None] | None:
        """The fused kernel of each cell stepped here, or None where it has none; None altogether where they are not to be used."""
        if self._kernels_of is None:
            fuses = self.engine != "loop"
            bound = self._bound
            self._kernels_of = (kernels_of(bound.here, bound.choices, self.rules, self._gradient_based) if fuses else None,)
        return self._kernels_of[0]

    def _fused_everywhere(self) -> bool:
        """Whether no cell takes a step by its map alone."""
        kernels = self._kernels()
        cells = zip(kernels or (), self._bound.here, strict=False)
        return (
            bool(kernels)
            and not self._bound.shared
            and all(isinstance(cell.preconditioner, Stacked) or not isinstance(k, fused.Taken | None) for k, cell in cells)
        )

    def _step_by_kernels(self, loss: Any) -> bool:
        """Take a step without second gradients by fused kernels, and by the reference engine where a block has none.

        False where that is not the step, nothing having changed.
        """
        kernels = self._kernels()
        if kernels is None or self._gradient_based is not None:
            return False
        on_device = self._skips_on_device()
        if not on_device and getattr(self, "found_inf", None) is not None:
            return False
        if not self._model_hooks.collect(self.asking, self.nonfinite != "propagate"):
            return False
        scale = getattr(self, "grad_scale", None)
        given = unscaled(self._given, scale)
        work, rest = divided(kernels, self._bound.here, self._lr, self.param_groups, given)
        in_place = self._bound.in_place
        if rest and not work and not in_place:
            return False
        point = self._point(given, rest) if rest else None
        # Of what ranks share each looks at what it steps, and has a vote also where that is nothing.
        looks = self.nonfinite != "propagate"
        found: Vec = (*(x for *_, g in work for x in g), *(() if point is None else point.g)) if looks else ()
        verdict = self._verdict(found, loss) if on_device else None
        votes = looks and verdict is None and bool(found or in_place)
        if votes and not self._agreed(vec.all_finite(found) and (loss is None or finite_loss(loss))):
            return False
        tasks = []
        for kernel, cell, p, g in work:
            leaf = cell.block.leaves[0]
            found_inf = () if verdict is None else (verdict.found_inf(p[0].device),)
            tasks.append(Task(kernel, cell, p, g, self._lr(leaf), self.param_groups[leaf.group]["maximize"], found_inf))
        count_and_take(tasks, verdict)
        if point is not None:
            loop.step(point, self.rules, ProbeResults(), verdict=verdict)
            self._write_back(point, verdict)
        for shared in in_place:
            shared.spread([given[i] is not None for i in shared.index])
        self.last = Record(self, loss, skipped=verdict or False, scale=scale)
        return True

    def _step_probed_by_kernels(self, point: Point, evidence: ProbeResults) -> bool:
        """The same with the gradient that a probing regularizer has made; False where no kernels compute that."""
        kernels = self._kernels()
        if kernels is None or not evidence.found or self._bound.in_place or point.cells != self._bound.cells:
            return False
        if None in kernels or not all(alike(cell, self._lr, self.param_groups) for cell in point.cells):
            return False
        ((k, found),) = evidence.found.items()
        at = point.at(k, point.maps, found=found, memo=evidence.memo)
        a = loop.assemble(point.g, [point.choices[0].regularizers[k].term(at)])
        tasks = []
        for kernel, (cell, span) in zip(kernels, point.spans, strict=True):
            p = cell.block.all_tensors
            laid_out = fused.aligned(a[span], p)
            assert laid_out is not None
            tasks.append(Task(kernel, cell, p, laid_out, self._lr(cell.block.leaves[0]), False))
        count_and_take(tasks)
        return True

    def _step_by_loop(self, loss: Any, graph: list[Tensor | None] | None) -> None:
        """Take the step by the reference engine, or skip it."""
        pending, self._pending = self._pending, None
        scale = getattr(self, "grad_scale", None)
        good_inputs = good_products = True
        if pending is None:
            point = self._point(unscaled(self._given, scale))
            good_inputs = self._good_inputs(point)
            evidence = ProbeResults(hessian=None if graph is None else self._hessian(point, graph))
            if graph is not None and self.nonfinite != "propagate":
                good_products = self._products(point, evidence)
        else:
            if not hasattr(self, "grad_scale"):  # not called by a GradScaler: the scale is the one that probe() was told
                scale = pending.scale
            point, evidence = pending.point, pending.evidence
            if not pending.refused:
                evidence = pending.complete(scale, self._signed)
        count = 1 + (pending.asked if pending is not None else 0)
        verdict = self._verdict(point.g if self.nonfinite == "skip" else (), loss) if self._skips_on_device() else None
        if verdict is None and self._skip(point, pending, loss, good_inputs, good_products):
            self.last = Record(self, loss, gradients=count, skipped=True, scale=scale)
        elif point.cells:
            length = None
            if not self._step_probed_by_kernels(point, evidence):
                # Of a second gradient, and of the bound of a clipped one, nothing is left from which the step could be made again.
                measured = self._gradient_based is not None or self.rules.max_norm is not None
                lengths = loop.step(point, self.rules, evidence, measured=measured, verdict=verdict)
                self._write_back(point, verdict)
                # Of each tensor what this process holds; put together when it is asked for.
                length = partial(point.sums.norm, tuple(lengths)) if lengths else None
            self.last = Record(
                self,
                loss,
                gradients=count,
                skipped=verdict or False,
                scale=None if pending is not None else scale,
                length=length,
            )
        if pending is not None:
            pending.give_back()

    def _skip(self, point: Point, pending: Probe | None, loss: Any, good_inputs: bool, good_products: bool) -> bool:
        """Whether inf or NaN forbid the step; raises where that was asked for."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not self._agreed(not found_inf.item()):
            return True
        if self.nonfinite == "propagate":
            return not good_inputs or (pending is not None and pending.refused)
        good = (
            good_inputs
            and good_products
            and vec.all_finite(point.g)
            and (pending is None or pending.finite)
            and (loss is None or finite_loss(loss))
        )
        good = self._agreed(good)
        if not good and self.nonfinite == "raise":
            if pending is not None:
                pending.give_back()
            names = [leaf.name for leaf, g in zip(point.leaves, point.g, strict=False) if not g.isfinite().all()]
            second = "the loss or a second derivative" if pending is None else "the loss or a probed gradient"
            other = second if good_inputs else "what a layer receives"
            where = f"the gradient of {', '.join(names[:3])}" if names else other
            raise FloatingPointError(
                f"{where} holds inf or NaN: nothing was changed; lower the learning rate, clip, or pass nonfinite='skip'"
            )
        return not good

    def _hessian(self, point: Point, graph: Sequence[Tensor | None]) -> Callable[[Vec], Vec]:
        """v ↦ H v in the order of the point, H of what is minimized, from the graph of the gradient of each leaf."""
        place = {leaf: i for i, leaf in enumerate(self._bound.leaves)}
        product = point.hessian([graph[place[leaf]] for leaf in point.leaves])
        signs = [-1.0 if self.param_groups[leaf.group]["maximize"] else 1.0 for leaf in point.leaves]

        def hessian(v: Vec) -> Vec:
            mine = product(v)
            return vec.scale(tuple(t for t in averaged(mine, mine) if t is not None), signs)

        return hessian

    def _products(self, point: Point, evidence: ProbeResults) -> bool:
        """Take the product with the Hessian ahead of the step, which then finds it known; False where it holds inf or NaN."""
        known: list[Vec] = []
        hessian = evidence.hessian
        assert hessian is not None

        def once(v: Vec) -> Vec:
            if not known:
                known.append(hessian(v))
            return known[0]

        evidence.hessian = once
        k = self._gradient_based or 0
        at = point.at(k, lambda: point.maps(loop.ahead(point, self.rules)), hessian=once)
        point.choices[0].regularizers[k].term(at)
        return all(vec.all_finite(v) for v in known)

    def _write_back(self, point: Point, verdict: Verdict | None = None) -> None:
        """Round the float32 values of 16-bit parameters into them, and keep what rounding lost where that is asked for."""
        narrow = [(leaf, p) for leaf, p in zip(point.leaves, point.p, strict=True) if p.dtype != leaf.param.dtype]
        residuals = [self._residual(leaf) for leaf, _ in narrow]
        with over(verdict, [*(leaf.tensor.detach() for leaf, _ in narrow), *(r for r in residuals if r is not None)]):
            for (leaf, p), residual in zip(narrow, residuals, strict=True):
                leaf.tensor.copy_(p)
                if residual is not None:
                    residual.copy_(p - leaf.tensor)

    def measure(self, name: str, scale: float | Tensor | None, length: Callable[[], Tensor] | None) -> Tensor | float:
        """A number of the last step, from gradients and state as they are now: see :class:`precond.optim.optimizer.record.Record`."""
        point = self._point(unscaled(self._given, scale))
        return measure(point, name, self._gradient_based, length)

    def _forget(self) -> None:
        """Drop what is derived from groups and state; it is made again when needed."""
        self._bound = self._stepped = Binding()
        self._versions: list[int] = []
        self._kernels_of: tuple[list[Kernel | None] | None] | None = None
        self._pending: Probe | None = None
        self._consolidated: dict[str, Any] | None = None
        self._spare: dict[Tensor, Tensor] = {}
        self._clearings = Clearings()
        self._closing = self._evaluating = self._scaled = False
        self._averaged: Averaged | None = None
        self._model_hooks = ModelHooks(self._requests)
        self._warned = False
        self.last = Record(self)
