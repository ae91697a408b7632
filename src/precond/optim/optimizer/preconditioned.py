"""The one optimizer: preconditioned gradient descent with regularizers in p or in z."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond.algebra import checks
from precond.algebra.maps import LinearMap
from precond.algebra.vec import is_captured
from precond.optim.averages import WeightAverage
from precond.optim.checking import contracts
from precond.optim.checking.arguments import fitted, number
from precond.optim.engine.cells import Choice
from precond.optim.engine.counting import uncounted
from precond.optim.engine.loop import Rules
from precond.optim.engine.shared_state import Ownership
from precond.optim.momentum import Momentum
from precond.optim.optimizer.compatibility import (
    check_acting,
    check_in_place,
    check_patterns,
    check_precision,
    check_same,
    check_shared,
    listed,
    validate,
)
from precond.optim.optimizer.delegation import delegate
from precond.optim.optimizer.explanation import Explanation, explain
from precond.optim.optimizer.graphs import out_of_graphs
from precond.optim.optimizer.inspection import map_in_force
from precond.optim.optimizer.interrupts import Uninterrupted
from precond.optim.optimizer.models import Models
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.parameters import Params, to_groups
from precond.optim.optimizer.probing import place_gradients
from precond.optim.optimizer.saving import Saving
from precond.optim.preconditioners import Preconditioner
from precond.optim.regularizers import Regularizer


class PreconditionedGD(Saving):
    r"""p ← p − α(M · momentum(g + c) + d) with M = P Pᵀ, cotangents c and tangents d of the regularizers.

    Args:
        params: a module (best: its second passes are then protected), parameters, named parameters, or groups of any of
            these; a group may override every number of the configuration by its name (``"lr"``, ``"rms.decay"``,
            ``"l2.lam"``, …: the keys of ``param_groups``).
        lr: α ≥ 0, a number or a tensor of one element.
        preconditioner: statistics → P.
        regularizers: penalties; at most one may need a second gradient.
        momentum: None, or an average of cotangents or tangents.
        statistics_from: ``"loss"``: P is built from the clean gradient (where that vanishes, and the gradient of a penalty in p does
            not, the step is as long as 1/ε: recipes therefore take one of the other two); ``"total"``: from the regularized one,
            allowed where no regularizer's cotangent depends on P; ``"lagged"``: likewise, and where one does, it is taken with the
            P before the step (for SAM and gradient norms in z).
        max_norm: clip the gradient that is descended to this norm, in ``norm_space``; None: do not. With a second gradient that is the one
            found at the other point. In p the statistics see it clipped too, as after ``clip_grad_norm_``, unless they are made of the
            clean gradient and another is descended (``statistics_from="loss"`` with SAM).
        norm_space: ``"z"`` (√(aᵀMa)), the default here, or ``"p"`` (‖a‖), that of recipes.
        nonfinite: inf or NaN in a gradient or the loss: ``"propagate"`` as torch.optim does, but for layers' inputs that hold it and are
            observed on a processor, ``"raise"`` FloatingPointError, or ``"skip"`` the step; with these nothing at all has changed.
        engine: ``"auto"``, ``"loop"`` (the readable reference), or ``"fused"`` (an error where no fused kernel fits).
        rounding: of 16-bit parameters: ``"nearest"`` as torch.optim, or ``"kahan"``, which carries what rounding lost in one
            more 16-bit number per parameter, so that small updates add up. State is float32 in any case.
        average: None, or an average of the weights, such as :class:`~precond.EMA`, at which ``with optimizer.averaged():`` evaluates.
        capturable: on accelerators, steps may be captured in a CUDA graph: the device counts them, and all that formulas make of the
            count stays there. On processors it does nothing. Not for what observes inputs or asks for second gradients, which read
            counts of samples and random states on the host. See :attr:`program`.
        naming: of a recipe: how it calls its numbers and its state; None: by the names of this class.

    Raises:
        TypeError, ValueError: for parameters and options that cannot work; the message names the remedy.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([2.0]))
        >>> opt = precond.PreconditionedGD([p], lr=0.1, preconditioner=precond.Fixed(), regularizers=[precond.L2(0.5)])
        >>> p.grad = torch.tensor([1.0]); _ = opt.step(); p.item()  # 2 − 0.1(1 + 2·0.5·2)
        1.7000000476837158

    References:
        Ye, eqs. (4), (5), (9)–(12).
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        delegate(cls, PreconditionedGD)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        preconditioner: Preconditioner,
        regularizers: Iterable[Regularizer] = (),
        momentum: Momentum | None = None,
        statistics_from: Literal["loss", "total", "lagged"] = "loss",
        max_norm: float | None = None,
        norm_space: Literal["z", "p"] = "z",
        nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        engine: Literal["auto", "loop", "fused"] = "auto",
        rounding: Literal["nearest", "kahan"] = "nearest",
        capturable: bool = False,
        average: WeightAverage | None = None,
        naming: Naming | None = None,
    ):
        name = "PreconditionedGD" if naming is None else naming.name
        regularizers = fitted(name, "regularizers", listed(name, regularizers), Iterable[Regularizer])
        choice = Choice(preconditioner, momentum, tuple(regularizers))
        naming = Naming.generic(choice) if naming is None else naming
        self.naming = replace(naming, defaults={**naming.defaults, "capturable": capturable})
        lr = number(name, "lr", lr)
        checks.learning_rate(name, lr)
        checks.one_of(name, "statistics_from", statistics_from, ("loss", "total", "lagged"))
        checks.one_of(name, "norm_space", norm_space, ("z", "p"))
        checks.one_of(name, "nonfinite", nonfinite, ("propagate", "raise", "skip"))
        checks.one_of(name, "engine", engine, ("auto", "loop", "fused"))
        checks.one_of(name, "rounding", rounding, ("nearest", "kahan"))
        if average is not None:
            contracts.instance(name, "average", average, WeightAverage, "None or one, such as precond.EMA(0.999)")
        if max_norm is not None:
            max_norm = number(name, "max_norm", max_norm)
            checks.positive(name, max_norm=max_norm)
        validate(name, choice, statistics_from)
        self.rules = Rules(statistics_from, max_norm, norm_space, engine == "loop")
        self.nonfinite, self.engine, self.rounding, self.average = nonfinite, engine, rounding, average
        self._gradient_based = next((k for k, r in enumerate(choice.regularizers) if r.probes or r.exact), None)
        self._probing = self._gradient_based is not None and choice.regularizers[self._gradient_based].probes
        self._owners: dict[Tensor, int] = {}  # which rank owns which parameters' blocks
        self._owned: Ownership = {}
        self._requests, self._timeless = preconditioner.requests, preconditioner.timeless
        if capturable:
            self._check_capturable()
        self._forget()
        modules: list[nn.Module] = []
        groups = to_groups(params, modules)
        self.models = Models(modules)
        if self._requests and not modules:
            raise TypeError(
                f"{name} observes the inputs of layers: pass the model itself as params, not model.parameters(); groups may "
                "hold modules, as [{'params': model.head, 'lr': 0.1}], and precond.integrations has the model for trainers that "
                f"make the groups themselves. The inputs are asked for by {preconditioner!r}"
            )
        check_shared(name, modules, preconditioner)
        super().__init__(groups, {"lr": lr, "maximize": False, **self.naming.defaults})
        if momentum is not None and "betas" not in self.defaults:
            # OneCycleLR and CyclicLR look for it here, and write it into the groups.
            self.defaults.setdefault("momentum", momentum.beta)
        check_in_place(name, (p for group in self.param_groups for p in group["params"]))
        self._bind()
        check_precision(self._bound.leaves, choice, rounding)
        check_acting(self._bound.cells, choice)
        check_same(name, self._bound.leaves, self._bound.cells, self._bound.options)
        if self._gradient_based is not None and not self._probing and self._bound.sharded:
            raise ValueError(
                f"{self._regularizer_name}(method='exact') differentiates twice, which FSDP's sharded parameters do not allow; "
                "use method='forward' or 'central'"
            )
        check_patterns(name, self._bound.leaves, self._bound.choices)
        self._listen()
        if engine == "fused" and not self._fused_everywhere():
            raise ValueError(f"{name}: engine='fused' has no kernel for this configuration; use engine='auto' or 'loop'")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping after an overflow, to :meth:`step`.

        Second gradients need that, and replicas, which must agree on a skip, and what is captured, since the scaler would wait for the
        device. Trainers refuse to clip the gradients of an optimizer that says so; no scaler is at work while a closure runs.
        """
        shared = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in self.models.alive())
        captured = any(group.get("capturable") for group in self.param_groups)
        return not self._closing and (self._probing or shared or captured or bool(self._bound.sharded))

    @out_of_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: the standard kind (zero_grad, forward, backward, return the loss) or a :class:`LossClosure`. Without
                one, and after one that changes no gradient, those in ``.grad`` are used, and a probing regularizer needs
                :meth:`probe` before.

        Returns:
            What the closure returned at the unperturbed parameters; None without a closure.

        Raises:
            RuntimeError: where a second gradient is needed and was not probed: the closure called no backward, or it added to
                gradients of other batches, which a second call would not repeat.
            TypeError, ValueError: for a closure that returns no scalar. None will do where no second gradient is needed.
            FloatingPointError: for inf or NaN with ``nonfinite="raise"``.
        """
        self._check_training("step")
        self._consolidated, probed = None, self._pending
        self._follow_groups()
        if not self._scaled and getattr(self, "found_inf", None) is not None:
            self._scaled = True
            if self._may_skip_on_device:  # from now on devices count, which alone know of skips
                self._go_by(self.bound_to(self.param_groups, self.state))
        first = self._bound.leaves[0].param
        captured = is_captured(first)
        if captured:
            self._check_capture()
        if first.is_meta and first.grad is None:
            raise RuntimeError(
                f"{self.naming.name}: its parameters are on the meta device: give them memory before the optimizer is made "
                "(model.to_empty(device=...)), or pass the model as params, whose new parameters it then follows"
            )
        loss, graph = None, None
        if closure is not None:
            loss, graph = self._gradients(closure)
        elif self._gradient_based is not None:
            self._check_probed(probed)
        if self._pending is None:
            self._follow_for_step()
        self._check_company()
        place_gradients(self._bound.sharded)
        before = [] if self._averaged is None else self._averaged.steps()
        with Uninterrupted():
            try:
                counting = uncounted(self._bound.cells) if captured else nullcontext()
                with torch.no_grad(), self._own_precision(), counting:
                    if not self._step_by_kernels(loss):
                        self._step_by_loop(loss, graph)
                    if self._averaged is not None:
                        self._averaged.fold(before)
                    if self.naming.settle is not None and (settled := self.naming.settle(self)):
                        for group in self.param_groups:
                            group.update(settled)
                        self._follow_groups()
                        self._commit()
            finally:
                self._model_hooks.again(self.asking)
        return loss

    def map(self, params: Iterable[Tensor] | None = None) -> LinearMap:
        """The P in force, aligned to ``params`` (default: all parameters in order).

        After a step it is the next one's, but for what the next gradient adds to the statistics: roots and bases that were renewed behind the
        last step are the new ones, of which that step knew nothing.

        Frozen parameters, and those that have had no gradient yet (with what is stepped jointly with them), are left as they are,
        P = I: nothing has moved them, and what their first gradient will make of P is not known.

        Raises:
            RuntimeError: before the first step, where all statistics are empty.
            ValueError: where a block is asked for in part, or a parameter is not this optimizer's.
        """
        self._follow_groups()
        self._bound.read_counts()
        return map_in_force(self._bound.leaves, self._bound.cells, params)

    def explain(self) -> Explanation:
        """Which preconditioner acts on which parameter, and which parameters it takes jointly; ``print`` it."""
        self._follow_groups()
        choices = [choice.preconditioner for choice in self._bound.choices]
        return explain(self._bound.leaves, self._bound.blocks, choices, self._model_hooks.unobserved, self._bound.joint.absent)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model at the average of its weights: ``with optimizer.averaged(): evaluate(model)``, or save what is to be used.

        Afterwards the parameters are where they were, bit for bit, also after an exception. The average is part of the state dict, so that a
        resumed training goes on with it. Normalization layers keep the running statistics of the weights that were trained:
        ``torch.optim.swa_utils.update_bn`` makes those of the average.

        Raises:
            RuntimeError: where no average is kept, at a probed point, or within another such block.

        Example:
            >>> import torch, precond
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> optimizer = precond.sgd(model, lr=1.0, average=precond.TailMean(start=2))
            >>> torch.nn.init.zeros_(model.weight).grad = torch.tensor([[-1.0]])
            >>> for _ in range(3):
            ...     _ = optimizer.step()
            >>> with optimizer.averaged():
            ...     model.weight.item()
            2.5
            >>> model.weight.item()
            3.0
        """
        if self.average is None:
            raise RuntimeError(f"averaged: {self.naming.name} keeps no average of the weights; pass average=precond.EMA(0.999)")
        self._check_settled("averaged")
        self._follow_groups()
        assert self._averaged is not None
        with self._averaged.evaluated():
            self._evaluating = True
            try:
                yield
            finally:
                self._evaluating = False
