r"""What each layer receives on an objective's data, reduced to a triangular factor of its extended inputs.

With H_e = [e, H], one row [1, hᵀ] per input, H_e = Q R gives RᵀR = H_eᵀH_e: singular values of R are those of H_e, without
squaring them, and the rows of R below the first are those of the centered inputs, without subtracting means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.streaming import InputStatistics, Stream, layer_of
from precond.optim.inputs import Request, Site, survey
from precond.optim.inputs.hooks import remove

_PATCH = Request(conv="patch")


def gather(
    objective: Objective, samples: int, max_inputs: int, layers: int | None = None
) -> tuple[list[InputStatistics], list[str]]:
    """Forward all batches of an objective once; and which weights are not diagnosed, with the reasons.

    Memory: of the first batch up to all inputs of the layers, then ``samples`` of each, in the inputs' own precision; of each layer a
    triangle in float64.

    Args:
        objective: whose layers with a parameter in ``objective.params`` are watched.
        samples: inputs per layer of which R is made; beyond, about as many are drawn, each as probably, the same ones every time.
        max_inputs: layers with more inputs are passed by.
        layers: at most so many; of stacks some at equal distances.
    """
    found = survey(objective.model.named_modules())
    trained = {id(p) for p in objective.originals}
    sites = [site for site in found.sites if id(site.weight) in trained]
    others = [passed for passed in found.passed_by if any(id(p) in trained for p in passed.params)]
    notes = [f"{passed.name or 'the model'} {passed.why}; its inputs are not diagnosed" for passed in others]
    wide = {site: n for site in sites if (n := site.layout(_PATCH).inputs(site.weight.shape)) > max_inputs}
    notes += [
        f"{site.name} has {n} inputs, more than max_inputs={max_inputs}; they are not diagnosed" for site, n in wide.items()
    ]
    sites = [site for site in sites if site not in wide]
    chosen = _spread_over_kinds(sites, layers)
    if left := len(sites) - len(chosen):
        examples = ", ".join(layer_of(site) for site in [site for site in sites if site not in chosen][:3])
        notes.append(
            f"{left} layers like others at other depths ({examples}{', …' if left > 3 else ''}) were left out by layers={layers}"
        )
    sites = list(chosen)
    streams = {site: Stream(site, samples, objective) for site in sites}
    handles = []
    for site in sites:
        for tap, weight in site.taps:
            hook = partial(streams[site].see, tap, weight)
            handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
    outputs, losses = _Outputs(objective.model, sites), list[Tensor]()
    handles += outputs.handles
    try:
        for index in range(len(objective.batches)):
            with objective.measuring(index):
                # With gradients on: attention's fast path calls no layers, and where inputs come from is read from the graph.
                losses.append(objective.evaluate(index).loss.detach())
            outputs.clear()
            for stream in streams.values():
                stream.end(index)
    finally:
        remove(handles)
    for site in sites:
        if why := streams[site].unread or ("" if streams[site].count else "was not called as a layer"):
            what = "some of its inputs" if streams[site].count else "its inputs"
            notes.append(f"{site.name} {why}; {what} are not diagnosed")
    biases = {site: site.bias is not None and id(site.bias) in trained for site in sites}
    seen = [site for site in sites if streams[site].count]
    made = [streams[site].gathered(biases[site], site in outputs.recentered, site in outputs.rescaled) for site in seen]
    for index, loss in enumerate(losses):
        if not loss.isfinite():
            raise ValueError(
                f"diagnose: the loss of batch {index} is {loss.item()}; look for divergence (a checkpoint before, a lower learning rate) or "
                "at the data and the loss function"
            )
    return [replace(seen, alike=chosen[seen.site][0], share=chosen[seen.site][1]) for seen in made], notes


def _spread_over_kinds(sites: Sequence[Site], most: int | None) -> dict[Site, tuple[tuple[Tensor, ...], float]]:
    """At most so many sites, the first and others at equal distances of each kind; with the weights each stands for, and their number."""
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(re.sub(r"\d+", "#", site.name), []).append(site)
    if most is None or len(sites) <= most:
        return {site: ((), 1.0) for site in sites}
    # Every kind is seen once, as far as it goes; then the largest ones get more.
    order = sorted(kinds.values(), key=len)
    room, shown = most, dict[Site, tuple[tuple[Tensor, ...], float]]()
    for k, members in enumerate(order):
        count = min(len(members), max(room // (len(order) - k), 0))
        room -= count
        if not count:
            continue
        at = sorted({round(i * (len(members) - 1) / max(count - 1, 1)) for i in range(count)})
        left = [s for i, s in enumerate(members) if i not in at]
        others = tuple(p for s in left for p in (s.weight, *(() if s.bias is None else (s.bias,))))
        for n, i in enumerate(at):
            shown[members[i]] = (others if n == 0 else (), len(members) / len(at))
    return {site: shown[site] for site in sites if site in shown}


_RECENTER = nn.modules.batchnorm._NormBase
_RESCALE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class _Outputs:
    """Which sites' outputs a normalization takes as they are; and one that subtracts their mean over the batch or the image."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]):
        self.recentered, self.rescaled = set[Site](), set[Site]()
        self._made: dict[int, tuple[Tensor, Site]] = {}  # the tensor, lest another has its number
        self.handles = [tap.module.register_forward_hook(partial(self._note, site)) for site in sites for tap, _ in site.taps]
        norms = [m for m in model.modules() if isinstance(m, (_RECENTER, *_RESCALE))]
        self.handles += [m.register_forward_pre_hook(self._take) for m in norms]

    def _note(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._made[id(output)] = output, site

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in self._made:
            site = self._made[id(args[0])][1]
            self.rescaled.add(site)
            if isinstance(module, _RECENTER):
                self.recentered.add(site)

    def clear(self) -> None:
        """The forward is over."""
        self._made.clear()
