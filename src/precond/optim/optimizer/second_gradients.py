"""The gradients of a step: the clean one, and those at other points that a regularizer asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra import vec
from precond.algebra.sharding import local
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf
from precond.optim.engine import loop
from precond.optim.engine.cells import Cell
from precond.optim.engine.loop import ProbeResults
from precond.optim.engine.point import Point, gather
from precond.optim.optimizer.capturing import Capturing
from precond.optim.optimizer.closures import (
    Made,
    check_closure,
    check_repeatable,
    check_scale,
    exact_gradient,
    finite_loss,
    loss_gradient,
)
from precond.optim.optimizer.graphs import out_of_graphs
from precond.optim.optimizer.interrupts import Uninterrupted
from precond.optim.optimizer.passes import Random, Recorder, random_state, restore_random_state
from precond.optim.optimizer.probing import Probe, place_gradients, take_gradients, unscaled
from precond.optim.ranks.replicas import agreed, averaged, check_joined, meet, started

_WITHOUT_DATA = (
    "A rank that has no data in a step goes forward and backward on an empty batch, x[:0], with a loss that is a sum"
)


class SecondGradients(Capturing):
    """Closures and :meth:`probe`."""

    @property
    def probes(self) -> bool:
        """Whether a step wants gradients at other points, which :meth:`probe` or a closure's further calls give."""
        return self._probing

    @property
    def replaces_gradient(self) -> bool:
        """Whether the gradient found at another point stands in the place of the clean one, as in SAM."""
        return self._probing and self._bound.choices[0].regularizers[self._gradient_based or 0].replaces_gradient

    @property
    def probing(self) -> bool:
        """Whether the parameters stand at a probed point p + δ."""
        return self._pending is not None and self._pending.moved

    @out_of_graphs
    def probe(self, grad_scale: float | Tensor | None = None) -> bool:
        """Ask for another gradient: ``loss.backward(); while opt.probe(): loss_fn(...).backward()``; then ``opt.step()``.

        Takes the gradients out of ``.grad``, sets ``.grad`` to None and moves the parameters to the next probed point. Both passes go over
        the same micro-batches. Where an exception leaves the loop and training goes on, call :meth:`restore` before the next batch.

        Args:
            grad_scale: the factor by which the losses are scaled, ``scaler.get_scale()``.

        Returns:
            True while another gradient is wanted; then False, the parameters being as before, bit for bit.

        Raises:
            TypeError, ValueError: for a scale that is no positive number.
            RuntimeError: where a pass left no gradient, or called the model more often than the pass before; and where the probe was
                complete and ``.grad`` has changed since, as in a loop of its own for each micro-batch.
        """
        check_scale(grad_scale)
        if not self._probing:
            return False
        self._check_training("probe")
        if self._pending is None:
            self._follow_groups()
        return self._next_probe(grad_scale, self._model_hooks.recorder)

    def _gradients(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """The clean pass, and the probes with the random state forked around them; the loss and the gradient's graph."""
        check_closure("step: closure", closure)
        if self.probing:
            self.restore()
        # A probe that is complete is this step's, unless the closure makes another gradient.
        pending, self._pending = self._pending, None
        before = random_state(self._devices) if self._probing else {}
        self._model_hooks.begin_closure()
        self._closing = True
        try:
            made: Made = "none"
            try:
                if self._gradient_based is not None and not self._probing:
                    found = self._exact_gradient(closure)
                    made = "anew"
                    return found
                loss, made = loss_gradient(self._bound.leaves, closure, self._clearings)
            except BaseException:
                self._pending = self._pending or pending
                self.restore()
                raise
            finally:
                self._model_hooks.end_closure(anew=made == "anew")
            if made == "none" and self._pending is None:
                self._pending = pending
            # A trainer's callback may have probed within the closure; and where it returned no loss and there is no gradient,
            # the batch is passed by.
            passed_by = loss is None and all(leaf.param.grad is None for leaf in self._bound.leaves)
            if self._pending is not None:
                self._check_probed()
            elif self._probing and not passed_by:
                check_repeatable(loss, made, self._regularizer_name)
                self._probe_by(closure, loss, before)
            return loss, None
        finally:
            self._closing = False

    def _probe_by(self, closure: Callable[[], Any], loss: Any, before: Random) -> None:
        """The second gradients by further calls of the closure."""
        after = random_state(self._devices)
        try:
            while (self.nonfinite == "propagate" or self._agreed(finite_loss(loss))) and self._next_probe(None, None):
                restore_random_state(before)
                loss_gradient(self._bound.leaves, closure, self._clearings)
        except BaseException:
            self.restore()
            raise
        finally:
            restore_random_state(after)

    def _check_company(self) -> None:
        """Raise where the other ranks, whom this one steps for, would not come to this step."""
        if (self._bound.shared or self._requests) and started():
            check_joined(self.naming.name, self.models.alive())
        if self._bound.shared and all(leaf.param.grad is None for leaf in self._bound.leaves):
            for shared in self._bound.shared:
                meet(shared.exchange.group, f"{self.naming.name}.step, where no parameter has a gradient", _WITHOUT_DATA)

    def _exact_gradient(self, closure: Callable[[], Any]) -> tuple[Any, list[Tensor | None]]:
        """The loss and the gradient's graph of this process; ``.grad`` is the mean over all, which no reducer of DDP sees."""
        with ExitStack() as stack:
            for module in self.models.alive():
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            loss, graph = exact_gradient(self._bound.leaves, closure, self._regularizer_name)
        params = [leaf.param for leaf in self._bound.leaves]
        for p, g in zip(params, averaged([p.grad for p in params], params), strict=True):
            p.grad = g
        return loss, graph

    def _watches(self, scale: float | Tensor | None) -> bool:
        """Whether inf and NaN in a gradient forbid the step."""
        return self.nonfinite != "propagate" or scale is not None

    def _good_inputs(self, point: Point) -> bool:
        """Whether what layers received forbids no step. Where it holds inf or NaN and the gradient does not, statistics alone are left out."""
        if self._model_hooks.collect(self.asking, self.nonfinite != "propagate"):
            return True
        if self.nonfinite == "raise" or not self._agreed(vec.all_finite(point.g)):
            return False
        self._model_hooks.leave_out(self._bound.cells)
        return True

    def _good(self, gradients: Sequence[Tensor | None]) -> bool:
        return self._agreed(vec.all_finite(tuple(local(g) for g in gradients if g is not None)))

    @torch.no_grad()
    def _next_probe(self, grad_scale: float | Tensor | None, recorder: Recorder | None) -> bool:
        with Uninterrupted():
            place_gradients(self._bound.sharded)
            if self._pending is None:
                self._follow_for_step()
                with self._own_precision():
                    self._pending = self._first_probe(grad_scale, 0 if recorder is None else recorder.forwards)
                self._model_hooks.pause()
            elif self._pending.moved:
                self._held(lambda pending: pending.check_pass(recorder))
                self._pending.collect(self._good if self._watches(self._pending.scale) else lambda g: True)
            else:
                self._pending.check_unchanged()
            if self._pending is None:
                return False
            if not (moved := self._pending.move(recorder)):
                self._pending.note_complete(self._clearings.count)
            return moved

    def _held(self, check: Callable[[Probe], None]) -> None:
        """Check what is under way; where the check raises, as if it had never been."""
        assert self._pending is not None
        try:
            check(self._pending)
        except RuntimeError:
            self.restore()
            raise

    def _first_probe(self, grad_scale: float | Tensor | None, forwards: int) -> Probe | None:
        """Take the clean gradient and find where else gradients are wanted; None where there is no gradient at all."""
        if all(leaf.param.grad is None for leaf in self._bound.leaves):
            return None
        modules = self.models.alive()
        if not modules and not self._warned:
            self._warned = True
            lost = self.models.names
            warn(
                f"the optimizer {'was copied or unpickled and sees no model' if lost else 'was given parameters, not a model'}: a second "
                "pass moves BatchNorm's running statistics again and, without a closure, draws other dropout masks; "
                f"{'call watch(model)' if lost else 'pass the model as params'}, or wrap the second pass in "
                "precond.frozen_statistics(model)"
            )
        k = self._gradient_based or 0
        regularizer = self._bound.choices[0].regularizers[k]
        watch = self._watches(grad_scale)
        gradients = self._given
        point = self._point(unscaled(gradients, grad_scale))
        if not self._good_inputs(point) or (watch and not self._agreed(vec.all_finite(point.g))):
            return Probe(
                self._bound.leaves, modules, point, gradients, grad_scale, k, ProbeResults(), (), self._spare, refused=True
            )
        taken = unscaled(take_gradients(self._bound.leaves), grad_scale)
        clean: list[Tensor | None] | None = taken
        point = self._point(taken)
        # With SAM nothing but the statistics asks for the clean gradient later: commit them now and let it go.
        let_go = regularizer.replaces_gradient and not watch
        observed = let_go and self.rules.statistics_from == "loss"
        if observed:
            loop.observe(point, point.g)
        states = None if observed or regularizer.space == "p" else loop.ahead(point, self.rules)
        evidence = ProbeResults(observed=observed)
        deltas = regularizer.probe(point.at(k, lambda: point.maps(states), memo=evidence.memo))
        if let_go:
            clean, point.g = None, ()
        return Probe(self._bound.leaves, modules, point, clean, grad_scale, k, evidence, deltas, self._spare, forwards=forwards)

    @property
    def _regularizer_name(self) -> str:
        return type(self._bound.choices[0].regularizers[self._gradient_based or 0]).__name__

    def _check_probed(self, before: Probe | None = None) -> None:
        """Raise where the second gradient is missing; ``before``: the probe there was when the step began."""
        pending = self._pending
        if pending is not None and pending.moved and self._next_probe(None, self._model_hooks.recorder):
            self.restore()
            raise RuntimeError(f"{self._regularizer_name} wants another gradient: call probe() until it returns False")
        if pending is not None:
            self._held(lambda it: it.check_left(self._clearings.count))
        if pending is None and before is not None:
            raise RuntimeError(
                "step: parameters or groups were changed between probe() and step() (frozen, thawed, converted, replaced, given other "
                "options): the probe is given up, parameters are where they were; change them before backward(), or after step()"
            )
        if pending is None and any(leaf.param.grad is not None for leaf in self._bound.leaves):
            how = (
                "pass a closure to step(), or call `while opt.probe(): loss_fn(...).backward()` between backward() and step()"
                if self._probing
                else "call step(LossClosure(f)), f returning the loss without backward()"
            )
            raise RuntimeError(f"{self._regularizer_name} needs a second gradient: {how}")

    @property
    def _given(self) -> list[Tensor | None]:
        """What ``.grad`` holds, of each leaf."""
        return [leaf.param.grad for leaf in self._bound.leaves]

    def _agreed(self, good: bool) -> bool:
        return agreed(good, self._bound.leaves[0].param.device)

    def _own_precision(self) -> AbstractContextManager[Any]:
        """No autocast within a step, though the user may have put one around it."""
        kind = self._bound.leaves[0].param.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def _point(self, gradients: Sequence[Tensor | None], cells: Sequence[Cell] | None = None) -> Point:
        cells = self._bound.cells if cells is None else cells
        return gather(cells, self._bound.choices, self._lr, self._signed(gradients), self._residual)

    def _signed(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of what is minimized: negated in groups that maximize."""
        if not any(group["maximize"] for group in self.param_groups):
            return gradients
        turned = [self.param_groups[leaf.group]["maximize"] for leaf in self._bound.leaves]
        return [-g if g is not None and t else g for g, t in zip(gradients, turned, strict=True)]

    def _residual(self, leaf: Leaf) -> Tensor | None:
        residual = self.state[leaf.param].get("residual") if self.rounding == "kahan" else None
        return None if residual is None else leaf.local(residual)

    def _check_settled(self, what: str) -> None:
        self._check_training(what)
        if self.probing:
            raise RuntimeError(f"{what}: the parameters stand at a probed point; finish the step or call restore() first")
