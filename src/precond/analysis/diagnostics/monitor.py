r"""Measurements while training runs, which do not change the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec
from precond.algebra.warning import warn
from precond.analysis.curvature import Objective, hessian
from precond.analysis.curvature.isolation import forked_random
from precond.analysis.diagnostics.online import TopEigenpair, kappa_of_moments, top_eigenpair
from precond.analysis.diagnostics.preconditioner import preconditioner_of, step_size
from precond.analysis.diagnostics.recording import record_inputs, wait_for, widened_copy
from precond.analysis.diagnostics.registry import registered
from precond.analysis.diagnostics.sinks import Sink, as_sink
from precond.analysis.diagnostics.stability import stable_factor
from precond.analysis.diagnostics.streaming import layer_of
from precond.optim.inputs import Moments, Site, survey
from precond.optim.inputs.hooks import remove
from precond.optim.optimizer import PreconditionedGD

_COLD = 10  # products of the first measurement, which has no vector to start from


class Monitor:
    r"""Measures every few steps of an optimizer, and hands the numbers to sinks.

    Measured on the objective's data, after the step:

    - ``loss``, L(p); ``grad_norm``, ‖g‖, g = ∇L; ``grad_norm_z``, ‖Pᵀg‖ = √(gᵀMg); ``alignment``, gᵀMg/(‖g‖‖Mg‖), the cosine of
      gradient and preconditioned gradient;
    - ``lambda_max``, of PᵀHP, a lower bound from a few products that start where the last measurement ended, and
      ``lambda_max_error``, its residual; ``lr``, ``lr_limit``, 2/λ_max times what momentum makes of it (:func:`stable_factor`), and
      ``lr_ratio``, their quotient, above 1 where steps grow along the steepest direction; NaN where that is not known;
    - ``update_ratio``, |Δp|/|p| of the step;
    - ``inputs/<layer>``, κ of the mean of ĥĥᵀ with covariances dropped: what means and scales do to the layer.

    The run is what it would be without, bit for bit: parameters, ``.grad``, buffers, modes, random numbers, statistics. A sink or a
    measurement that fails is reported by one warning, and training goes on; a sink that failed is called again next time.

    Args:
        objective: small, for example one batch: a measurement costs about as much as ten training steps on it.
        every: steps between two measurements; ``"auto"``: as often as ``budget`` allows, the first one at once.
        sinks: paths (JSONL), SummaryWriters, or functions of (metrics, step).
        budget: with ``"auto"``, the share of the training time that measurements may take.
        products: with PᵀHP, per measurement.

    Raises:
        TypeError, ValueError: for numbers out of range, or something that is no sink.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))])
        >>> optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.25), []
        >>> with Monitor(objective, every=1, sinks=[lambda metrics, step: rows.append((step, metrics))]).attach(optimizer):
        ...     model.weight.grad = torch.ones(1, 2); optimizer.step()
        >>> step, metrics = rows[0]
        >>> step, round(metrics["lambda_max"], 5), round(metrics["lr_ratio"], 5)  # H = diag(0.5, 2)
        (1, 2.0, 0.25)
    """

    def __init__(
        self,
        objective: Objective,
        every: int | Literal["auto"] = "auto",
        sinks: Iterable[Any] = (),
        *,
        budget: float = 0.05,
        products: int = 3,
    ):
        if not isinstance(objective, Objective):
            raise TypeError(
                f"Monitor: objective must be an Objective, got {type(objective).__name__}; Objective(model, loss_fn, data)"
            )
        if every != "auto" and not (isinstance(every, int) and every >= 1):
            raise ValueError(f"Monitor: every must be a whole number of steps >= 1 or 'auto', got {every!r}")
        if not isinstance(products, int) or products < 1:
            raise ValueError(f"Monitor: products must be a whole number >= 1, got {products!r}")
        checks.positive("Monitor", budget=budget)
        if isinstance(sinks, str) or callable(sinks) or not isinstance(sinks, Iterable):
            raise TypeError(f"Monitor: sinks must be a list of sinks, got {type(sinks).__name__}; put it in a list")
        self.objective, self.every, self.budget, self.products = objective, every, budget, products
        self.sinks: list[Sink] = [as_sink(sink) for sink in sinks]
        self.last: dict[str, float] = {}
        self.step = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._warned: set[str] = set()
        self._vector: Vec | None = None
        self._before: Vec | None = None
        self._due = False
        self._train_seconds = self._own_seconds = self._cost = 0.0
        self._began: float | None = None

    # --- attaching -----------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> Monitor:
        """Measure at steps of an optimizer from now on; returns the monitor, which is a context manager too.

        Raises:
            TypeError: for an optimizer whose P is not known.
            ValueError: where the objective's parameters are not the optimizer's.
            RuntimeError: where it is attached already.
        """
        if self._optimizer is not None:
            raise RuntimeError("Monitor: it is attached already; call detach() first, or make another one")
        step_size(optimizer, self.objective)
        if not isinstance(optimizer, PreconditionedGD):
            registered(optimizer)
        self._optimizer, self._began = optimizer, None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def detach(self) -> None:
        """Measure no more; sinks stay open."""
        remove(self._handles)
        self._handles, self._optimizer, self._before, self._began = [], None, None, None

    def close(self) -> None:
        """Detach, and close the sinks that can be closed."""
        self.detach()
        for sink in self.sinks:
            if callable(close := getattr(sink, "close", None)):
                close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- state -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps counted, the vector that the next measurement starts from, and the time spent so far."""
        return {
            "step": self.step,
            "vector": None if self._vector is None else [t.clone() for t in self._vector],
            "train_seconds": self._train_seconds,
            "own_seconds": self._own_seconds,
            "cost": self._cost,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the monitor that gave the state.

        Raises:
            ValueError: where it belongs to other parameters.
        """
        vector = state["vector"]
        shapes = [tuple(p.shape) for p in self.objective.params]
        if vector is not None and [tuple(t.shape) for t in vector] != shapes:
            raise ValueError("Monitor: the state belongs to parameters of other shapes; load that of the same objective")
        self.step = int(state["step"])
        self._vector = (
            None if vector is None else tuple(t.to(widened_copy(p)) for t, p in zip(vector, self._parameters(), strict=True))
        )
        self._train_seconds, self._own_seconds, self._cost = (
            float(state[name]) for name in ("train_seconds", "own_seconds", "cost")
        )
        self._began = None

    # --- hooks -----------------------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        if self.every != "auto":
            return self.step % self.every == 0
        return self._cost == 0 or self._own_seconds + self._cost <= self.budget * self._train_seconds

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        self._due = self._is_due()
        if self._due:
            self._before = vec.map_(Tensor.clone, self._parameters())

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._due:
            wait_for(self.objective.device)
        now = time.perf_counter()
        if self._began is not None:
            self._train_seconds += now - self._began
        if self._due:
            with forked_random([self.objective.device], None):
                self.last = self.measure()
                for number, sink in enumerate(self.sinks):
                    self._guarded(f"sink {number} ({type(sink).__name__})", partial(sink, dict(self.last), self.step))
            self._due, self._before = False, None
            self._cost = time.perf_counter() - now
            self._own_seconds += self._cost
        self._began = time.perf_counter()

    def _guarded(self, what: str, f: Any) -> Any:
        """f(), or None where it fails, with one warning per thing that fails."""
        try:
            return f()
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                warn(f"Monitor: {what} failed at step {self.step}, training goes on: {type(error).__name__}: {error}")
            return None

    # --- measuring ---------------------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """The numbers as they are now, by name; a measurement that fails is left out.

        Raises:
            RuntimeError: before :meth:`attach`.
        """
        if self._optimizer is None:
            raise RuntimeError("Monitor: it is not attached to an optimizer; call attach(optimizer) first")
        metrics: dict[str, float] = {}
        if self._before is not None:
            p = self._parameters()
            metrics["update_ratio"] = float(vec.norm(vec.sub(p, self._before)) / vec.norm(p))
        metrics["lr"] = step_size(self._optimizer, self.objective)
        found = self._guarded("the forward and backward pass", self._pass)
        P: LinearMap | None = self._guarded("P", partial(preconditioner_of, self._optimizer, self.objective))
        if found is not None:
            loss, g, kappas = found
            metrics |= {"loss": loss, "grad_norm": float(vec.norm(g)), **kappas}
            if P is not None:
                Mg = P.gram(g)
                square = float(vec.dot(g, Mg))
                lengths = metrics["grad_norm"] * float(vec.norm(Mg))
                metrics["grad_norm_z"] = max(square, 0.0) ** 0.5
                metrics["alignment"] = square / lengths if lengths > 0 else math.nan
        if P is not None:
            top: TopEigenpair | None = self._guarded("λ_max", partial(self._top, P))
            if top is not None:
                limit = 2 * stable_factor(self._optimizer) / top.value if top.value > 0 else math.inf
                metrics |= {
                    "lambda_max": top.value,
                    "lambda_max_error": top.residual,
                    "lr_limit": limit,
                    "lr_ratio": metrics["lr"] / limit,
                }
        return metrics

    def _parameters(self) -> Vec:
        return vec.map_(Tensor.detach, self.objective.params)

    def _top(self, P: LinearMap) -> TopEigenpair:
        cold = self._vector is None
        if self._vector is None:
            generator = torch.Generator().manual_seed(0)
            self._vector = vec.map_(lambda p: torch.randn(p.shape, generator=generator).to(widened_copy(p)), self._parameters())
        top = top_eigenpair(
            P.T @ hessian(self.objective) @ P, self._vector, max(self.products, _COLD) if cold else self.products
        )
        if not math.isfinite(top.value):
            self._vector = None
            raise ValueError(f"λ_max is {top.value}")
        self._vector = top.vector
        return top

    def _pass(self) -> tuple[float, Vec, dict[str, float]]:
        """L, ∇L and κ of what layers receive, in one pass."""
        objective = self.objective
        trained = {id(p) for p in objective.originals}
        sites = [site for site in survey(objective.model.named_modules()).sites if id(site.weight) in trained]
        seen: dict[Site, Moments] = {}
        handles = [
            tap.module.register_forward_pre_hook(partial(record_inputs, seen, site, tap, weight), with_kwargs=True)
            for site in sites
            for tap, weight in site.taps
        ]
        loss, g = 0.0, vec.map_(widened_copy, vec.zeros_like(self._parameters()))
        try:
            for index, weight in enumerate(objective.weights):
                with objective.measuring(index):
                    part = weight * objective.evaluate(index).loss
                    loss += part.item()
                    g = vec.add(g, torch.autograd.grad(part, objective.params, allow_unused=True, materialize_grads=True))
        finally:
            remove(handles)
        biased = {site: site.bias is not None and id(site.bias) in trained for site in seen}
        kappas = {f"inputs/{layer_of(site)}": kappa_of_moments(m, biased[site]) for site, m in seen.items()}
        return loss, g, kappas
