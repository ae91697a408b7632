"""The one optimizer: preconditioned gradient descent with regularizers in p or in z."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond import checks, contracts, vec
from precond.arguments import fitted, number
from precond.averages import WeightAverage
from precond.blocks import Leaf
from precond.engine import fused, loop
from precond.engine.cells import Cell, Choice, count_on_host, count_step, uncounted
from precond.engine.fused import Kernel
from precond.engine.loop import Evidence, Rules
from precond.engine.point import Point, gather
from precond.engine.sharing import Shared
from precond.engine.verdict import Verdict, over
from precond.interrupts import Uninterrupted
from precond.maps import LinearMap
from precond.momentum import Momentum
from precond.optimizer import serialization
from precond.optimizer.averaging import Averaged
from precond.optimizer.binding import Binding, bind, choices_of
from precond.optimizer.compatibility import check_precision, check_same, check_shared, listed, validate
from precond.optimizer.explanation import Explanation, explain
from precond.optimizer.fusing import alike, divided, kernels_of
from precond.optimizer.imitation import hand_through
from precond.optimizer.listening import Listening
from precond.optimizer.looking import map_in_force, measure
from precond.optimizer.naming import Naming
from precond.optimizer.parameters import Owners, Params, in_place, to_groups
from precond.optimizer.passes import Random, Recorder, random_state, restore_random_state
from precond.optimizer.probing import (
    Clearings,
    Probe,
    check_repeatable,
    exact_gradient,
    finite_loss,
    loss_gradient,
    take_gradients,
    unscaled,
)
from precond.optimizer.record import Record
from precond.preconditioners import Preconditioner
from precond.preconditioners.stacked import Stacked
from precond.regularizers import Regularizer
from precond.replicas import agreed, averaged, largest
from precond.sharding import local
from precond.vec import Scalar, Vec, is_captured


class PreconditionedGD(torch.optim.Optimizer):
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
        max_norm: clip the assembled gradient to this norm, in ``norm_space``; None: do not. (In p, where nothing probes, the
            statistics see the clipped gradient, as after ``clip_grad_norm_``.)
        norm_space: ``"z"`` (√(aᵀMa)) or ``"p"`` (‖a‖).
        nonfinite: inf or NaN in a gradient or the loss: ``"propagate"`` as torch.optim does, ``"raise"``
            FloatingPointError, or ``"skip"`` the step; with the last two nothing at all has changed.
        engine: ``"auto"``, ``"loop"`` (the readable reference), or ``"fused"`` (an error where no fused kernel fits).
        rounding: of 16-bit parameters: ``"nearest"`` as torch.optim, or ``"kahan"``, which carries what rounding lost in one
            more 16-bit number per parameter, so that small updates add up. State is float32 in any case.
        average: None, or an average of the weights, such as :class:`~precond.EMA`, at which ``with optimizer.averaged():`` evaluates.
        capturable: on accelerators, steps may be captured in a CUDA graph: the device counts them, and all that formulas make of the
            count stays there. On processors it does nothing. Not for what observes inputs or asks for second gradients, which read
            counts of samples and random states on the host. See :attr:`program`.

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
        hand_through(cls, PreconditionedGD)

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
        choice = Choice(
            preconditioner, momentum, fitted(name, "regularizers", listed(name, regularizers), Iterable[Regularizer])
        )
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
        self._dealt: dict[Tensor, int] = {}  # which rank owns which parameters' blocks
        self._requests, self._timeless = preconditioner.requests, preconditioner.timeless
        if capturable:
            self._check_capturable()
        self._forget()
        modules: list[nn.Module] = []
        groups = to_groups(params, modules)
        self.owners = Owners(modules)
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
        self._bind()
        check_precision(self._bound.leaves, choice, rounding)
        check_same(name, self._bound.leaves, self._bound.cells, self._bound.options)
        if (
            self._gradient_based is not None
            and not self._probing
            and any(leaf.shard is not None for leaf in self._bound.leaves)
        ):
            raise ValueError(
                f"{self._regularizer_name}(method='exact') differentiates twice, which FSDP's sharded parameters do not allow; "
                "use method='forward' or 'central'"
            )
        self._listen()
        if engine == "fused" and not self._fused_everywhere():
            raise ValueError(f"{name}: engine='fused' has no kernel for this configuration; use engine='auto' or 'loop'")

    # --- parameters, strategies, state ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what is derived from groups and state; it is made again when needed."""
        self._bound = Binding()
        self._kernels_of: tuple[list[Kernel | None] | None] | None = None
        self._pending: Probe | None = None
        self._consolidated: dict[str, Any] | None = None
        self._spare: dict[Tensor, Tensor] = {}
        self._clearings = Clearings()
        self._closing = self._evaluating = self._told = False
        self._averaged: Averaged | None = None
        self._listening = Listening(self._requests)
        self._warned = False
        self.last = Record(self)

    def _bind(self) -> None:
        """Make cells and state for the parameters that want gradients, keeping the state that exists."""
        self.adopt(self.bound_to(self.param_groups, self.state), self.state)

    @property
    def cells(self) -> Sequence[Cell]:
        """What is stepped jointly, with the strategies in force and their state."""
        return self._bound.cells

    @property
    def frozen(self) -> set[Tensor]:
        """The parameters that wanted no gradients in the last step."""
        return self._bound.frozen

    @property
    def shared(self) -> list[Shared]:
        """What ranks step for each other."""
        return self._bound.shared

    def bound_to(
        self,
        groups: Sequence[Mapping[str, Any]],
        existing: Mapping[Tensor, dict[str, Any]],
        frozen: set[Tensor] | None = None,
    ) -> Binding:
        """What groups come to, with the state that exists; nothing of the optimizer's own changes."""
        clean = self.rules.statistics_from == "loss"

        def there(leaf: Leaf) -> torch.device | None:
            device, asked = leaf.param.device, groups[leaf.group].get("capturable") or self._unread
            return device if asked and device.type not in ("cpu", "meta") else None

        return bind(
            groups,
            self.owners,
            self.naming,
            self.observes,
            self.rounding,
            self.rules.plainly,
            clean,
            existing,
            frozen,
            self._dealt,
            there,
            self.average,
        )

    @property
    def _unread(self) -> bool:
        """Whether a step may be skipped without the host's knowing: accelerators count their steps then.

        Where the number of a step decides what it does, and where it takes statistics of inputs, whose samples the host counts, second
        gradients, an average of the weights, or where ranks step for each other, the host must know.
        """
        skips = self.nonfinite == "skip" or (self._told and self.nonfinite == "propagate")
        return (
            skips
            and self._timeless
            and self._gradient_based is None
            and not self._requests
            and self.average is None
            and not self._dealt
        )

    def adopt(self, bound: Binding, state: defaultdict[Tensor, Any]) -> None:
        """Take a binding and its state as the optimizer's own."""
        self._consolidated = None
        self.state = state
        for leaf, key, tensor in bound.entries:
            self.state[leaf.param][self.naming.outside(key)] = tensor
        self._bound, self._kernels_of, self._pending = bound, None, None
        self._averaged = None if self.average is None else Averaged.of(self.average, bound.entries)

    def _follow_groups(self) -> None:
        """Follow groups and model: numbers may have changed, parameters been frozen, thawed, converted, moved, or replaced."""
        for group in self.param_groups:
            self.naming.cycle(group)
        match self._bound.follow(self.param_groups, self.naming):
            case "broken":
                with Uninterrupted():
                    before = self._bound
                    changed = not all(map(in_place, before.leaves))
                    if changed:
                        self._follow_model()
                    check_precision(
                        self.owners.leaves(self.param_groups), choices_of(self.param_groups, self.naming)[0], self.rounding
                    )
                    self._bind()
                    self._spare.clear()
                    if changed:
                        self._listen()
                    self._listening.want(self._bound.cells)
                    kept = {(leaf.param, key) for leaf, key, _ in self._bound.entries}
                    for leaf, key, _ in before.entries:  # the state of what is frozen waits
                        state = self.state.get(leaf.param)
                        gone = (leaf.param, key) not in kept and key not in serialization.OPTIONAL
                        if state is not None and leaf.param.requires_grad and gone:
                            state.pop(self.naming.outside(key), None)
            case "renumbered":
                self._kernels_of = None
        self._settle()

    def _settle(self) -> None:
        """Bind anew where members of a stack must part."""
        if self._bound.divided:
            self._bind()

    def _follow_model(self) -> None:
        """Parameters that stand in the place of others take over their state."""
        new = self.owners.moved(self._bound.leaves)
        for group in self.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
        for p, q in new.items():
            if p in self.state:
                self.state[q] = self.state.pop(p)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``"params"`` may be a module. State is made at once."""
        if not isinstance(param_group, dict):
            raise TypeError(f"add_param_group: expected a dict with 'params', got {type(param_group).__name__}")
        checks.learning_rate(self.naming.name, param_group.get("lr", 0.0))
        if not self._bound.leaves:  # called by torch.optim.Optimizer's constructor, on groups that are parsed already
            super().add_param_group(param_group)
            return
        modules = self.owners.alive()
        known = len(modules)
        (group,) = to_groups([param_group], modules, self.param_groups, self.owners.names)
        super().add_param_group(group)
        if "momentum" not in self.naming.defaults:
            group.pop("momentum", None)  # of the defaults, for schedulers alone
        try:
            check_precision(self.owners.leaves([group]), choices_of(self.param_groups, self.naming)[-1], self.rounding)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.owners.add(modules[known:])
        self._bind()
        self._listen()

    def _lr(self, leaf: Leaf) -> Scalar:
        lr = self.param_groups[leaf.group]["lr"]
        scale = self._bound.choices[leaf.group].preconditioner.lr_scale(leaf)
        return lr if scale == 1 else lr * scale

    def _listen(self) -> None:
        """Put the hooks on the model that second passes and input statistics need."""
        recorded = self._devices if self._probing else None
        self._listening.begin(self.owners, recorded, self._bound.cells, self._before_forward)

    def _before_forward(self) -> None:
        """What is frozen, thawed or converted between steps is followed before inputs are observed, as after a resume."""
        if self._pending is None and self._bound.converted(self.param_groups):
            self._follow_groups()

    def watch(self, model: nn.Module) -> None:
        """Observe a model again, whose parameters these are: after the optimizer was copied or unpickled.

        Raises:
            ValueError: where a parameter of the optimizer is not one of the model's.
        """
        theirs = set(model.parameters())
        if alien := [leaf.name for leaf in self.owners.leaves(self.param_groups) if leaf.param not in theirs]:
            raise ValueError(f"watch: {alien[0]!r} is not a parameter of this model; copy model and optimizer together")
        self.owners = Owners([model])
        self._bind()
        self._listen()

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. What layers received in forwards whose gradients are cleared does not count."""
        with nullcontext() if self._closing else self._listening.clearing():
            super().zero_grad(set_to_none)
        self._clearings.count += 1

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling, and skipping after an overflow, to :meth:`step`.

        Second gradients need that, and replicas, which must agree on a skip, and what is captured, since the scaler would wait for the
        device. Trainers refuse to clip the gradients of an optimizer that says so; no scaler is at work while a closure runs.
        """
        shared = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in self.owners.alive())
        unread = any(group.get("capturable") for group in self.param_groups)
        divided = any(leaf.shard is not None for leaf in self._bound.leaves)
        return not self._closing and (self._probing or shared or divided or unread)

    @property
    def observes(self) -> bool:
        """Whether it observes the inputs of layers."""
        return bool(self._requests)

    def unobserved(self) -> AbstractContextManager[None]:
        """Forwards inside are another optimizer's: this one neither observes layer inputs there nor notes the random state.

        A generator's loss runs through the discriminator, and the discriminator's data come from the generator. Without this,
        each optimizer's statistics are of both.

        Example:
            >>> import torch, precond
            >>> G, D = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
            >>> of_G, of_D = precond.bnp(G), precond.bnp(D)
            >>> z, real = torch.randn(8, 2), torch.randn(8, 2)
            >>> for _ in range(2):
            ...     of_D.zero_grad()
            ...     with of_G.unobserved():
            ...         fake = G(z).detach()
            ...     (D(fake) - D(real)).mean().backward()
            ...     of_D.step()
            ...     of_G.zero_grad()
            ...     with of_D.unobserved():
            ...         (-D(G(z))).mean().backward()
            ...     of_G.step()
            >>> of_D.state[D.weight]["count"].item(), of_G.state[G.weight]["count"].item()
            (32.0, 16.0)
        """
        return self._listening.away()

    # --- the step ------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # under torch.compile the graph breaks here: a step reads its numbers and looks at its model
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
        self._consolidated = None
        self._follow_groups()
        if not self._told and getattr(self, "found_inf", None) is not None:
            self._told = True
            if self._unread:
                self._bind()  # from now on devices count, which alone know of skips
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
            if self._pending is None:
                self._settle()
        elif self._gradient_based is not None:
            self._check_probed()
        before = [] if self._averaged is None else self._averaged.steps()
        with Uninterrupted():
            try:
                counting = uncounted(self._bound.cells) if captured else nullcontext()
                with torch.no_grad(), self._own_precision(), counting:
                    if not self._fuse(loss):
                        self._finish(loss, graph)
                    if self._averaged is not None:
                        self._averaged.fold(before)
                    if self.naming.settle is not None and (settled := self.naming.settle(self)):
                        for group in self.param_groups:
                            group.update(settled)
                        self._follow_groups()
            finally:
                self._listening.again(self._bound.cells)
        return loss

    def _gradients(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """The clean pass, and the probes with the random state forked around them; the loss and the gradient's graph."""
        if self.probing:
            self.restore()
        # A probe that is complete is this step's, unless the closure makes another gradient.
        pending, self._pending = self._pending, None
        before = random_state(self._devices) if self._probing else {}
        self._listening.begin_closure()
        self._closing = True
        try:
            if self._gradient_based is not None and not self._probing:
                found = self._exact_gradient(closure)
                self._listening.end_closure(anew=True)
                return found
            try:
                loss, made = loss_gradient(self._bound.leaves, closure, self._clearings)
            except BaseException:
                self._pending = self._pending or pending
                self.restore()
                raise
            self._listening.end_closure(anew=made == "anew")
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

    def _exact_gradient(self, closure: Callable[[], Any]) -> tuple[Any, list[Tensor | None]]:
        """The loss and the gradient's graph of this process; ``.grad`` is the mean over all, which no reducer of DDP sees."""
        with ExitStack() as stack:
            for module in self.owners.alive():
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            loss, graph = exact_gradient(self._bound.leaves, closure, self._regularizer_name)
        params = [leaf.param for leaf in self._bound.leaves]
        for p, g in zip(params, averaged([p.grad for p in params], params), strict=True):
            p.grad = g
        return loss, graph

    def _own_precision(self) -> AbstractContextManager[Any]:
        """No autocast within a step, though the user may have put one around it."""
        kind = self._bound.leaves[0].param.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def _watches(self, scale: float | Tensor | None) -> bool:
        """Whether inf and NaN in a gradient forbid the step."""
        return self.nonfinite != "propagate" or scale is not None

    def _good(self, gradients: Sequence[Tensor | None]) -> bool:
        return self._agreed(vec.all_finite(tuple(local(g) for g in gradients if g is not None)))

    def _agreed(self, good: bool) -> bool:
        return agreed(good, self._bound.leaves[0].param.device)

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

    @torch._disable_dynamo
    def probe(self, grad_scale: float | Tensor | None = None) -> bool:
        """Ask for another gradient: ``loss.backward(); while opt.probe(): loss_fn(...).backward()``; then ``opt.step()``.

        Takes the gradients out of ``.grad``, sets ``.grad`` to None and moves the parameters to the next probed point.

        Args:
            grad_scale: the factor by which the losses are scaled, ``scaler.get_scale()``.

        Returns:
            True while another gradient is wanted; then False, the parameters being as before, bit for bit.
        """
        if not self._probing:
            return False
        self._check_training("probe")
        if self._pending is None:
            self._follow_groups()
        return self._next_probe(grad_scale, self._listening.recorder)

    @torch.no_grad()
    def _next_probe(self, grad_scale: float | Tensor | None, recorder: Recorder | None) -> bool:
        with Uninterrupted():
            if self._pending is None:
                self._settle()
                with self._own_precision():
                    self._pending = self._first_probe(grad_scale)
                self._listening.pause()
            elif self._pending.moved:
                self._pending.collect(self._good if self._watches(self._pending.scale) else lambda g: True)
            return self._pending is not None and self._pending.move(recorder)

    def _first_probe(self, grad_scale: float | Tensor | None) -> Probe | None:
        """Take the clean gradient and find where else gradients are wanted; None where there is no gradient at all."""
        if all(leaf.param.grad is None for leaf in self._bound.leaves):
            return None
        modules = self.owners.alive()
        if not modules and not self._warned:
            self._warned = True
            warnings.warn(
                "the optimizer was given parameters, not a model: a second pass moves BatchNorm's running statistics again "
                "and, without a closure, draws other dropout masks; pass the model as params, or wrap the second pass in "
                "precond.frozen_statistics(model)",
                stacklevel=7,
            )
        k = self._gradient_based or 0
        regularizer = self._bound.choices[0].regularizers[k]
        watch = self._watches(grad_scale)
        gradients = self._given
        point = self._point(unscaled(gradients, grad_scale))
        if not self._listening.collect(self._bound.cells, self.nonfinite != "propagate") or (
            watch and not self._agreed(vec.all_finite(point.g))
        ):
            return Probe(
                self._bound.leaves, modules, point, gradients, grad_scale, k, Evidence(), (), self._spare, refused=True
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
        evidence = Evidence(observed=observed)
        deltas = regularizer.probe(point.at(k, lambda: point.maps(states), memo=evidence.memo))
        if let_go:
            clean, point.g = None, ()
        return Probe(self._bound.leaves, modules, point, clean, grad_scale, k, evidence, deltas, self._spare)

    def restore(self) -> None:
        """Forget a probe that was not followed by its step (after an exception, say): parameters, gradients, random state."""
        if self._pending is not None:
            with Uninterrupted():
                pending, self._pending = self._pending, None
                pending.cancel()
                self._listening.resume()

    @property
    def _devices(self) -> set[torch.device]:
        return {leaf.param.device for leaf in self._bound.leaves}

    @property
    def _regularizer_name(self) -> str:
        return type(self._bound.choices[0].regularizers[self._gradient_based or 0]).__name__

    def _check_probed(self) -> None:
        pending = self._pending
        if pending is not None and pending.moved and self._next_probe(None, self._listening.recorder):
            self.restore()
            raise RuntimeError(f"{self._regularizer_name} wants another gradient: call probe() until it returns False")
        if pending is None and any(leaf.param.grad is not None for leaf in self._bound.leaves):
            how = (
                "pass a closure to step(), or call `while opt.probe(): loss_fn(...).backward()` between backward() and step()"
                if self._probing
                else "call step(LossClosure(f)), f returning the loss without backward()"
            )
            raise RuntimeError(f"{self._regularizer_name} needs a second gradient: {how}")

    def _kernels(self) -> list[Kernel | None] | None:
        """The fused kernel of each cell, or None where it has none; None altogether where they are not to be used."""
        if self._kernels_of is None:
            fuses = self.engine != "loop"
            bound = self._bound
            self._kernels_of = (kernels_of(bound.cells, bound.choices, self.rules, self._gradient_based) if fuses else None,)
        return self._kernels_of[0]

    def _fused_everywhere(self) -> bool:
        """Whether no cell takes a step by its map alone."""
        kernels = self._kernels()
        cells = zip(kernels or (), self._bound.cells, strict=False)
        return bool(kernels) and all(k is not None or isinstance(cell.preconditioner, Stacked) for k, cell in cells)

    def _fuse(self, loss: Any) -> bool:
        """Take a step without second gradients by fused kernels, and by the reference engine where a block has none.

        False where that is not the step, nothing having changed.
        """
        kernels = self._kernels()
        if kernels is None or self._gradient_based is not None:
            return False
        unread = self._is_unread()
        if not unread and getattr(self, "found_inf", None) is not None:
            return False
        if not self._listening.collect(self._bound.cells, self.nonfinite != "propagate"):
            return False
        scale = getattr(self, "grad_scale", None)
        gradients = None if scale is None else unscaled(self._given, scale)
        work, rest = divided(kernels, self._bound.cells, self._lr, self.param_groups, gradients)
        if rest and not work:
            return False
        point = self._point(self._given if gradients is None else gradients, rest) if rest else None
        found = (
            (*(x for _, _, g in work for x in g), *(() if point is None else point.g)) if self.nonfinite != "propagate" else ()
        )
        verdict = self._verdict(found, loss) if unread else None
        if found and verdict is None and not self._agreed(vec.all_finite(found) and (loss is None or finite_loss(loss))):
            return False
        for kernel, cell, aligned in work:
            leaf, p = cell.block.leaves[0], cell.block.all_tensors
            count_step(cell.state, verdict)
            found_inf = () if verdict is None else (verdict.found_inf(p[0].device),)
            kernel(cell, p, aligned, self._lr(leaf), self.param_groups[leaf.group]["maximize"], *found_inf)
        if point is not None:
            loop.step(point, self.rules, Evidence(), verdict=verdict)
            self._write_back(point, verdict)
        self.last = Record(self, loss, skipped=verdict or False, scale=scale)
        return True

    def _check_capturable(self) -> None:
        """Refuse to promise what a CUDA graph cannot repeat."""
        whys = {
            "observes the inputs of layers": bool(self._requests),
            "asks for second gradients": self._gradient_based is not None,
            "keeps an average of the weights": self.average is not None,
            "looks at every gradient, nonfinite='raise'": self.nonfinite == "raise",
        }
        if why := next((what for what, found in whys.items() if found), None):
            raise ValueError(
                f"{self.naming.name}: capturable=True: it {why}, of which the host must know; leave capturable out"
            )

    def _check_capture(self) -> None:
        """Refuse what a CUDA graph would not repeat."""
        if missing := [leaf.name for leaf in self._bound.leaves if not self.param_groups[leaf.group].get("capturable")]:
            raise RuntimeError(
                f"{self.naming.name}: a CUDA graph of its step is captured, but the group of {missing[0]!r} is not capturable: make "
                "it with capturable=True"
            )
        if not all("clock" in cell.state for cell in self._bound.cells):
            raise RuntimeError(
                f"{self.naming.name}: a CUDA graph of its step is captured, but ranks step for each other, and the host counts their "
                "steps; leave the step out of the graph"
            )

    @property
    def program(self) -> Hashable:
        """What the number of the next step decides about it, as a key: steps of one program launch the same, and one CUDA graph serves them.

        None, always, where nothing is decided: ``sgd``, ``adam``, ``adamw``, ``rmsprop``, ``adagrad``, ``muon``. ``soap`` and
        ``shampoo`` have as many programs as their period has different steps, once the first period is over. Where a
        method says nothing of it, each step is a program of its own.
        """
        self._follow_groups()
        cells = [cell for cell in self._bound.cells if cell.handled and not cell.preconditioner.timeless]
        return tuple(cell.preconditioner.program(cell.block, cell.state.steps[0] + 1) for cell in cells) or None

    def replayed(self) -> None:
        """Tell the host that a CUDA graph has repeated a captured step: :attr:`program` is then that of the next one."""
        for cell in self._bound.cells:
            if any(leaf.param.grad is not None for leaf in cell.leaves):
                count_on_host(cell.state)

    @property
    def _given(self) -> list[Tensor | None]:
        """What ``.grad`` holds, of each leaf."""
        return [leaf.param.grad for leaf in self._bound.leaves]

    def _is_unread(self) -> bool:
        """Whether inf and NaN are to decide about this step without the host's knowing."""
        asked = getattr(self, "found_inf", None) is not None or self.nonfinite == "skip"
        return asked and self._unread and all("clock" in cell.state for cell in self._bound.cells)

    def _verdict(self, gradients: Vec, loss: Any) -> Verdict:
        """Whether the step is taken, which no host reads: the scaler's finding, and that of the gradients and the loss given."""
        device = self._bound.leaves[0].param.device
        bad = vec.nonfinite(gradients).to(device) if gradients else torch.zeros((), device=device)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            bad = bad + found_inf.to(device)
        if self.nonfinite == "skip" and loss is not None:
            bad = bad + (1 - torch.as_tensor(loss, device=device).detach().isfinite().float().reshape(()))
        return Verdict(largest(bad))

    def _fuse_probed(self, point: Point, evidence: Evidence) -> bool:
        """The same with the gradient that a probing regularizer has made; False where no kernels compute that."""
        kernels = self._kernels()
        if kernels is None or not evidence.found or point.cells != self._bound.cells:
            return False
        if None in kernels or not all(alike(cell, self._lr, self.param_groups) for cell in point.cells):
            return False
        ((k, found),) = evidence.found.items()
        at = point.at(k, point.maps, found=found, memo=evidence.memo)
        a = loop.assemble(point.g, [point.choices[0].regularizers[k].term(at)])
        for cell in point.cells:
            count_step(cell.state)
        for kernel, (cell, span) in zip(kernels, point.spans, strict=True):
            p = cell.block.all_tensors
            assert kernel is not None
            kernel(cell, p, fused.aligned(a[span], p), self._lr(cell.block.leaves[0]), False)
        return True

    def _finish(self, loss: Any, graph: list[Tensor | None] | None) -> None:
        """Take the step by the reference engine, or skip it."""
        pending, self._pending = self._pending, None
        scale = getattr(self, "grad_scale", None)
        good_inputs = pending is not None or self._listening.collect(self._bound.cells, self.nonfinite != "propagate")
        good_products = True
        if pending is None:
            point = self._point(unscaled(self._given, scale))
            evidence = Evidence(hessian=None if graph is None else self._hessian(point, graph))
            if graph is not None and self.nonfinite != "propagate":
                good_products = self._products(point, evidence)
        else:
            if not hasattr(self, "grad_scale"):  # not called by a GradScaler: the scale is the one that probe() was told
                scale = pending.scale
            point, evidence = pending.point, pending.evidence
            if not pending.refused:
                evidence = pending.complete(scale, self._signed)
        count = 1 + (pending.asked if pending is not None else 0)
        verdict = self._verdict(point.g if self.nonfinite == "skip" else (), loss) if self._is_unread() else None
        if verdict is None and self._skip(point, pending, loss, good_inputs, good_products):
            self.last = Record(self, loss, gradients=count, skipped=True, scale=scale)
        elif point.cells:
            length = None
            if not self._fuse_probed(point, evidence):
                # Of a second gradient nothing is left from which the step could be made again.
                lengths = loop.step(point, self.rules, evidence, measured=self._gradient_based is not None, verdict=verdict)
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

    def _point(self, gradients: Sequence[Tensor | None], cells: Sequence[Cell] | None = None) -> Point:
        cells = self._bound.cells if cells is None else cells
        return gather(cells, self._bound.choices, self._lr, self._signed(gradients), self._residual)

    def _signed(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of what is minimized: negated in groups that maximize."""
        if not any(group["maximize"] for group in self.param_groups):
            return gradients
        turned = [self.param_groups[leaf.group]["maximize"] for leaf in self._bound.leaves]
        return [-g if g is not None and t else g for g, t in zip(gradients, turned, strict=True)]

    def _hessian(self, point: Point, graph: Sequence[Tensor | None]) -> Callable[[Vec], Vec]:
        """v ↦ H v in the order of the point, H of what is minimized, from the graph of the gradient of each leaf."""
        place = {leaf: i for i, leaf in enumerate(self._bound.leaves)}
        product = point.hessian([graph[place[leaf]] for leaf in point.leaves])
        signs = [-1.0 if self.param_groups[leaf.group]["maximize"] else 1.0 for leaf in point.leaves]

        def hessian(v: Vec) -> Vec:
            mine = product(v)
            return vec.scale(tuple(t for t in averaged(mine, mine) if t is not None), signs)

        return hessian

    def _products(self, point: Point, evidence: Evidence) -> bool:
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

    def _residual(self, leaf: Leaf) -> Tensor | None:
        residual = self.state[leaf.param].get("residual") if self.rounding == "kahan" else None
        return None if residual is None else leaf.local(residual)

    def _write_back(self, point: Point, verdict: Verdict | None = None) -> None:
        """Round the float32 values of 16-bit parameters into them, and keep what rounding lost where that is asked for."""
        narrow = [(leaf, p) for leaf, p in zip(point.leaves, point.p, strict=True) if p.dtype != leaf.param.dtype]
        residuals = [self._residual(leaf) for leaf, _ in narrow]
        with over(verdict, [*(leaf.tensor.detach() for leaf, _ in narrow), *(r for r in residuals if r is not None)]):
            for (leaf, p), residual in zip(narrow, residuals, strict=True):
                leaf.tensor.copy_(p)
                if residual is not None:
                    residual.copy_(p - leaf.tensor)

    # --- looking ---------------------------------------------------------------------------------------------------------

    def map(self, params: Iterable[Tensor] | None = None) -> LinearMap:
        """The P in force, aligned to ``params`` (default: all parameters in order).

        Frozen parameters, and those that have had no gradient yet (with what is stepped jointly with them), are left as they are,
        P = I: nothing has moved them, and what their first gradient will make of P is not known.

        Raises:
            RuntimeError: before the first step, where all statistics are empty.
            ValueError: where a block is asked for in part, or a parameter is not this optimizer's.
        """
        self._follow_groups()
        self._bound.reckon()
        return map_in_force(self._bound.leaves, self._bound.cells, params)

    def explain(self) -> Explanation:
        """Which preconditioner acts on which parameter, and which parameters it takes jointly; ``print`` it."""
        self._follow_groups()
        choices = [choice.preconditioner for choice in self._bound.choices]
        return explain(self._bound.leaves, self._bound.blocks, choices, self._listening.unobserved)

    def measure(self, name: str, scale: float | Tensor | None, length: Callable[[], Tensor] | None) -> Tensor | float:
        """A number of the last step, from gradients and state as they are now: see :class:`precond.optimizer.record.Record`."""
        point = self._point(unscaled(self._given, scale))
        return measure(point, name, self._gradient_based, length)

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

    def _check_training(self, what: str) -> None:
        if self._evaluating:
            raise RuntimeError(f"{what}: the parameters stand at their average; leave `with optimizer.averaged():` first")

    # --- saving ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; torch-named recipes use torch's names, and torch's class of that name loads it.

        Where ranks step parameters for each other (docs/distributed.md) every rank must call it, since owners send their state; or
        :meth:`consolidate_state_dict` before.

        Raises:
            RuntimeError: where ranks own state and the others do not come.
        """
        self._check_settled("state_dict")
        if self._consolidated is not None:
            return self._consolidated
        return serialization.started(serialization.whole(super().state_dict(), self), self)

    def consolidate_state_dict(self) -> None:
        """Put the state of all owners together, so that until the next step a rank may call :meth:`state_dict` alone; every rank calls this.

        What is for a single process, or has no owners, needs it not. (The name is that of torch's ZeroRedundancyOptimizer.)
        """
        if self.shared:
            self._consolidated = None
            self._consolidated = self.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state dict, or torch's of the recipe's name; all or nothing. State keeps its dtype.

        Raises:
            ValueError: where it does not fit; the message names the parameter. Parameters are matched by name where both
                sides know names (a warning says what did not match), else by position.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.restore()
        with Uninterrupted():
            serialization.load(self, state_dict)
            self._listening.again(self._bound.cells)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_settled(self, what: str) -> None:
        self._check_training(what)
        if self.probing:
            raise RuntimeError(f"{what}: the parameters stand at a probed point; finish the step or call restore() first")

    def __getstate__(self) -> dict[str, Any]:
        self._check_settled("copying or pickling the optimizer")
        # An LR scheduler puts a `step` on the instance that calls this very optimizer's.
        derived = {
            "step", "last", "_bound", "_averaged", "_evaluating", "_kernels_of", "_pending", "_spare", "_clearings", "_closing",
            "_listening", "_warned", "_consolidated",
        }  # fmt: skip
        state = {k: v for k, v in self.__dict__.items() if k not in derived and "hook" not in k}
        return {**state, "owners": Owners(known=self.owners.leaves(self.param_groups))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if not self._requests and not self._dealt:
            self._bind()

    def close(self) -> None:
        """Remove the hooks on the model: before ``torch.jit.script``, or ``torch.compile(fullgraph=True)`` of training forwards.

        :meth:`watch` puts them on again: a recipe that observes inputs needs that before its next step. The optimizer's end
        removes them too.
        """
        self._listening.close()
