"""The inputs of layers for anybody: observed between two steps of whatever optimizer, and handed out parameter by parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from precond.algebra.maps import Layout
from precond.algebra.sharding import Shard, local
from precond.optim.inputs.hooks import remove
from precond.optim.inputs.moments import Kind, Moments, Request, outer
from precond.optim.inputs.observer import Observer
from precond.optim.inputs.paths import unwrapped_layers
from precond.optim.inputs.sites import Site, survey
from precond.optim.inputs.sync import check_alike, synchronized
from precond.optim.ranks.replicas import distributed

Wanted = Request | Kind
"""A request, or the kind of one."""


@dataclass(frozen=True, eq=False)
class Inputs:
    r"""What the rows of a weight met: h, (groups, N, n), reduced to its moments. Rows of one group see the same inputs.

    Attributes:
        name: of the weight in its model.
        weight: the parameter itself.
        bias: the one that is added to its products, or None.
        moments: count, mean, and covariance or variance.
        layout: how the weight is seen as (groups, rows, n).
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    moments: Moments
    layout: Layout

    @property
    def count(self) -> Tensor:
        """N, the number of samples, over positions, (groups,), on the host."""
        return self.moments.count

    @property
    def mean(self) -> Tensor:
        """μ, (groups, n)."""
        return self.moments.mean

    @property
    def variance(self) -> Tensor:
        """σ², biased, (groups, n)."""
        return self.moments.variance

    @property
    def covariance(self) -> Tensor:
        """E[(h − μ)(h − μ)ᵀ], (groups, n, n), where a covariance was asked for.

        Raises:
            ValueError: where only moments were asked for.
        """
        if self.moments.spread.ndim == self.moments.mean.ndim:
            raise ValueError(f'{self.name}: only moments were asked for; ask observe() for "covariance"')
        return self.moments.spread

    @property
    def gram(self) -> Tensor:
        """E[hhᵀ], (groups, n, n), where a covariance was asked for; times N it is XᵀX."""
        return self.covariance + outer(self.mean, self.covariance)

    @property
    def extended_gram(self) -> Tensor:
        """E[ĥĥᵀ], ĥ = [1; h], (groups, n + 1, n + 1): with its bias a row's Hessian is this times the curvature of the loss in its output."""
        one = self.mean.new_ones(len(self.mean), 1, 1)
        above = torch.cat([one, self.mean[:, None]], 2)
        return torch.cat([above, torch.cat([self.mean[:, :, None], self.gram], 2)], 1)

    def rows(self, of_weight: Tensor) -> Tensor:
        """The weight, or a gradient of it, as matrices (groups, rows, n), whose last dimension the inputs are multiplied with.

        Of a weight that is divided among processes (FSDP2), the rows that this process holds, which is what a product from the right needs.

        Raises:
            ValueError: where processes hold parts of rows.
        """
        return self._held().view(local(of_weight))

    def weight_of(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: a tensor of the weight's shape, or of the part of it that this process holds."""
        return self._held().back(rows, local(self.weight))

    def held(self, statistic: Tensor) -> Tensor:
        """A statistic (groups, …), of the groups that :meth:`rows` has: all of them where this process holds the whole weight."""
        return self._held().mine(statistic)

    def _held(self) -> Layout:
        shard = Shard.of(self.weight)
        if shard is None:
            return self.layout
        dim = self.layout.output_dim
        held = None if dim is None else shard.span(dim)
        if held is None:
            raise ValueError(
                f"{self.name}: processes hold parts of its rows, which no process can multiply alone; divide it by rows"
            )
        return self.layout.part(held, self.weight.shape)


class Observation:
    """Layers' inputs between two steps: what :func:`observe` returns, a context manager that ends with :meth:`close`.

    A forward counts where its module trains and gradients are on; micro-batches add up, a forward that activation checkpointing repeats
    counts once. What is kept are sums, no inputs. Parameters are keys as they are in ``optimizer.state``.

    Args:
        model: whose layers are watched.
        requests: what is wanted of them.
        params: weights that are wanted; None: all.
        synchronize: whether processes put together what they saw.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(1, 1)
        >>> with precond.optim.inputs.observe(model, "moments") as observation:
        ...     _ = model(torch.tensor([[1.0], [3.0]]))
        ...     for inputs in observation:
        ...         print(inputs.name, inputs.mean.item(), inputs.variance.item())
        weight 2.0 1.0
    """

    def __init__(self, model: nn.Module, requests: tuple[Request, ...], params: tuple[Tensor, ...] | None, synchronize: bool):
        found = survey(unwrapped_layers(list(model.named_modules())))
        wanted = None if params is None else {id(p) for p in params}
        sites = [s for s in found.sites if wanted is None or id(s.weight) in wanted]
        self.requests = requests
        self._passed = {p: passed.why for passed in found.passed_by for p in passed.params if wanted is None or id(p) in wanted}
        for p in params or ():
            if p not in self._passed and all(s.weight is not p for s in sites):
                self._passed[p] = "is no weight of a layer of a kind that is known (precond.register_layer)"
        self._synchronize = synchronize
        self._observer = Observer(sites, requests)
        self._observer.wanted = {(s.name, r): None for s in sites for r in requests if s.answers(r)}
        self._handles: list[Any] = []
        if synchronize and distributed():
            check_alike(self._observer)

    @property
    def enabled(self) -> bool:
        """Whether forwards are observed; set it to False for steps that are not to be, which then cost nothing but a look at it."""
        return self._observer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._observer.enabled = value

    @property
    def weights(self) -> Mapping[Tensor, str]:
        """Whose inputs are observed, with their names."""
        return {site.weight: site.name for site in self._observer.sites}

    @property
    def unobserved(self) -> Mapping[Tensor, str]:
        """Parameters whose inputs are not, and why: by their kind, or since :meth:`clear` because a call could not be read or was none."""
        unread = {s.weight: self._observer.unread[s.name] for s in self._observer.sites if s.name in self._observer.unread}
        return {**self._passed, **unread}

    def collect(self, request: Wanted | None = None) -> dict[Tensor, Inputs]:
        """What was seen since :meth:`clear`, of all processes together and the same on each; a layer that none has called is absent.

        Where several processes train, all of them call it, at the same place of a step.

        Args:
            request: which one, where several were asked for.
        """
        chosen = self._chosen(request)
        together = self._synchronize and distributed()
        seen = synchronized(self._observer).seen if together else self._observer.collect()
        keys = ((site, (site.name, chosen)) for site in self._observer.sites)
        return {site.weight: self._of(site, chosen, seen[key]) for site, key in keys if key in seen}

    def clear(self) -> None:
        """Forget it, after a step or instead of one; the next forwards are the next step's."""
        self._observer.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self._observer.close()
        remove(self._handles)
        self._handles = []

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Inputs]:
        """What :meth:`collect` gives, one after the other."""
        return iter(self.collect().values())

    def _chosen(self, request: Wanted | None) -> Request:
        if request is None and len(self.requests) == 1:
            return self.requests[0]
        chosen = None if request is None else _request(request)
        if chosen not in self.requests:
            raise ValueError(
                f"Observation.collect: request must be one of {', '.join(map(str, self.requests))}, got {request!r}"
            )
        return chosen

    def _of(self, site: Site, request: Request, moments: Moments) -> Inputs:
        return Inputs(site.name, site.weight, site.bias, moments, site.layout(request))

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        of = weakref.ref(self)

        def after(*_: Any) -> None:
            if (mine := of()) is not None:
                mine.clear()

        self._handles.append(optimizer.register_step_post_hook(after))


def observe(
    model: nn.Module,
    requests: Wanted | Iterable[Wanted] = "covariance",
    *,
    params: Iterable[Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    synchronize: bool = True,
) -> Observation:
    r"""Observe what the layers of a model receive while it trains, for an optimizer of any kind: E[h], and E[hhᵀ] or the variances.

    A weight W that is multiplied by inputs h has gradients G = E[δhᵀ]; G(E[hhᵀ])⁻¹ is FOOF's step, K-FAC's right side, and what Newton-Muon
    orthogonalizes. Linear layers, convolutions (patches), attention, recurrent layers, experts and what
    :func:`precond.register_layer` knows are seen by forward pre-hooks; nothing in the model, its outputs or its gradients changes.

    - *Several processes*: :meth:`Observation.collect` adds (N, Σh, Σhhᵀ) over all of them, in one call for all layers, weighted by count.
    - *Divided parameters* (FSDP2): forwards see whole weights and their inputs as ever; :meth:`Inputs.rows` gives the rows that are held here.
    - *torch.compile*: call it before the first compiled forward, with the model or the compiled one; a training forward breaks the graph at
      each observed layer.
    - *Activation checkpointing*: repeated forwards count once.
    - *Mixed precision*: 16-bit inputs are summed in float32.

    Args:
        model: whose layers are watched; it is kept alive by nobody here.
        requests: ``"covariance"`` (mean and n×n matrix), ``"moments"`` (mean and variances), a :class:`Request`, or several of them.
        params: weights that are wanted; None: all.
        optimizer: after each of whose steps what was seen is forgotten; without it call :meth:`Observation.clear`.
        synchronize: whether processes put together what they saw.

    Returns:
        A handle, which has to be kept: with it the hooks go.

    Raises:
        ValueError: for parameters that are not the model's, or an unknown kind.
        TypeError: for a model wrapped by FSDP1, whose flat parameters have no inputs.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with observe(model) as inputs:
        ...     model(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        ...     seen = inputs.collect()[model.weight]
        >>> seen.gram[0].tolist(), seen.count.tolist()
        ([[5.0, 7.0], [7.0, 10.0]], [2.0])

    References:
        Benzing (2022), Gradient descent on neurons and its link to approximate second-order optimization; Martens & Grosse (2015).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"observe: model must be an nn.Module, got {type(model).__name__}")
    single = isinstance(requests, str | Request)
    wanted = tuple(dict.fromkeys(map(_request, [requests] if single else requests)))  # type: ignore[arg-type]
    if not wanted:
        raise ValueError('observe: requests is empty; ask for "covariance" or "moments"')
    chosen = None if params is None else tuple(params)
    own = {id(p) for p in model.parameters()}
    if chosen is not None and (alien := [tuple(p.shape) for p in chosen if id(p) not in own]):
        raise ValueError(
            f"observe: params has a tensor of shape {alien[0]} that is no parameter of the model; give model.parameters() of it"
        )
    handle = Observation(model, wanted, chosen, synchronize)
    if optimizer is not None:
        handle._follow(optimizer)
    return handle


def _request(wanted: Wanted) -> Request:
    if isinstance(wanted, Request):
        return wanted
    if wanted not in get_args(Kind):
        raise ValueError(f"observe: requests must be a Request or one of {', '.join(get_args(Kind))}, got {wanted!r}")
    return Request(wanted, "patch" if wanted == "covariance" else "channel")
