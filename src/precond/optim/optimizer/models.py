"""Which modules hold which parameters, by what names; and whether they still do."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from precond.algebra.sharding import Shard, parts_of
from precond.algebra.warning import warn
from precond.optim.blocks import Leaf, with_scores
from precond.optim.blocks.turns import turns
from precond.optim.inputs import Site, Survey, survey
from precond.optim.inputs.kinds import inputs_first
from precond.optim.inputs.paths import unwrapped_layers, unwrapped_name
from precond.optim.inputs.roles import kind_of

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


Location = tuple[dict[str, nn.Module | None], str, nn.Module]
"""The children of a module, what it calls one of them, and that one."""


def in_place(leaf: Leaf) -> bool:
    """Whether a leaf's module, where one is known, still holds its parameter. (Between passes FSDP2 puts others there.)"""
    return leaf.module is None or leaf.module._parameters.get(leaf.attribute) is leaf.param or leaf.shard is not None


def _below(above: str, path: str) -> str:
    return f"{above}.{path}".strip(".")


class Models:
    """Which module owns a parameter, for the modules that were given; holds them weakly.

    Of one that has gone, a container made to name a group say, what it held is known as long as the model has it.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), known: Iterable[Leaf] = ()):
        self._given: list[
            weakref.WeakKeyDictionary[nn.Module, str]
        ] = []  # of each: itself and what it holds, with their paths in it
        self.add(modules)
        # What is known of parameters whose module is not known any more.
        self._known = {leaf.param: (leaf.layer, leaf.kind, leaf.inputs_first) for leaf in known}
        # Whose place another layer, or none, has taken: told once.
        self.lost: set[Tensor] = set()
        self._paths: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], str]] = weakref.WeakKeyDictionary()
        self._held: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Know further modules."""
        self._given += [weakref.WeakKeyDictionary({m: path for path, m in root.named_modules()}) for root in modules]
        self._survey: Survey | None = None

    def moved(self, leaves: Iterable[Leaf], besides: Collection[Tensor] = ()) -> dict[Tensor, Tensor]:
        """Parameter → the one that now stands where it stood, of the leaves that their modules do not hold any more.

        ``to_empty`` and ``load_state_dict(assign=True)`` replace parameters; parametrizations move them, or make others of them. A user may
        put another layer in the place of one. What is stepped already, tied since or moved there, and what is to be stepped ``besides``,
        takes no other's place.

        Raises:
            RuntimeError: where a parameter has gone, or what stands in its module is another thing.

        Warns:
            UserWarning: where another layer, or none, is in the place of one, and has no such parameter, or one that is stepped already.
        """
        self._survey = None
        leaves = list(leaves)
        taken = {leaf.param for leaf in leaves}.union(besides)
        out, lost = self._of_other_layers(leaves, taken)
        gone = [leaf for leaf in leaves if not in_place(leaf) and leaf.param not in out and leaf not in lost]
        held = {p for m in self.alive() for p in m.parameters()} if gone else set()
        for leaf in gone:
            if leaf.param in held:
                continue  # moved within the model, as by a parametrization of one tensor
            assert leaf.module is not None
            new = leaf.module._parameters.get(leaf.attribute)
            if new in taken:
                lost.append(leaf)
                continue
            if new is None or new.shape != leaf.shape or Shard.of(new) is not None:
                raise RuntimeError(
                    f"{leaf.name!r} is no parameter of the model any more, which was changed (weight_norm, a parametrization, "
                    "fully_shard, another layer) after the optimizer was made: make the optimizer after such changes"
                )
            out[leaf.param] = new
            taken.add(new)
        self.lost.update(leaf.param for leaf in lost)
        if lost:
            are = "is no longer the parameter" if len(lost) == 1 else "are no longer the parameters"
            warn(
                f"{', '.join(repr(leaf.name) for leaf in lost)} of the model {are} that the optimizer steps: another layer or parameter, "
                "or none, was put there, and of what it holds only that is trained which the optimizer has already; make the optimizer "
                "after such changes, or give it the new parameters by add_param_group"
            )
        return out

    def _of_other_layers(self, leaves: Iterable[Leaf], taken: set[Tensor]) -> tuple[dict[Tensor, Tensor], list[Leaf]]:
        """Of the leaves whose modules are in their models no more: parameter → the one of the module in that place, which joins those that
        are taken; the leaves without one."""
        out: dict[Tensor, Tensor] = {}
        lost: list[Leaf] = []
        held = {root: set(root.modules()) for root in self.alive()}
        for leaf in leaves:
            ref, path = self._paths.get(leaf.module, (None, "")) if leaf.module is not None else (None, "")
            root = None if ref is None else ref()
            if root is None or leaf.module in held[root]:
                continue
            new = None
            with suppress(AttributeError):
                new = root.get_submodule(path)._parameters.get(leaf.attribute)
            if new is leaf.param or any(leaf.param is p for p in root.parameters()):
                continue  # the other layer has it
            if new is None or new in taken or new.shape != leaf.shape or Shard.of(new) is not None:
                lost.append(leaf)
            else:
                out[leaf.param] = new
                taken.add(new)
        return out, lost

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Modules hold what :meth:`leaves` found there, while a forward of ``torch.func.functional_call`` has others in the places."""
        lent: list[tuple[dict[str, Any], str, Tensor]] = []
        for module, params in self._held.items():
            places: dict[str, Any] = module._parameters
            for name, param in params.items():
                there = places.get(name)
                if there is not None and there is not param and Shard.of(param) is Shard.of(there) is None:
                    lent.append((places, name, there))
                    places[name] = param
        try:
            yield
        finally:
            for places, name, there in lent:
                places[name] = there

    def locations(self, leaves: Iterable[Leaf]) -> list[Location]:
        """Where the modules are that own leaves, and those around them."""
        found: dict[tuple[int, str], Location] = {}
        for owner in {leaf.module for leaf in leaves if leaf.module is not None}:
            ref, path = self._paths.get(owner, (None, ""))
            module = None if ref is None else ref()
            for name in path.split(".") if path else ():
                if module is None:
                    break
                child = module._modules.get(name)
                if child is not None:
                    found[id(module), name] = (module._modules, name, child)
                module = child
        return list(found.values())

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied, and the modules of a copied optimizer are not these.
        return {"_known": self._known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    @property
    def names(self) -> bool:
        """Whether names of parameters are a model's, not a user's."""
        return bool(self._given or self._known)

    def called(self) -> dict[Tensor, str]:
        """Parameter → its name in the first of the modules that has it."""
        parts = self._parts()
        out: dict[Tensor, str] = {}
        for _, above, root in self._roots():
            for name, there in root.named_parameters():
                out.setdefault(parts.get(there, there), unwrapped_name(_below(above, name)))
        return out

    def alive(self) -> list[nn.Module]:
        """The modules that still exist; in the place of one that does not what it held."""
        return [root for _, _, root in self._roots()]

    def _roots(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Those, each with the number of the module that was given and the path in that."""
        for number, given in enumerate(self._given):
            above = None
            for module, path in given.items():
                if above is None or not path.startswith(above):
                    yield number, path, module
                    above = path and f"{path}."
                if not path:
                    break

    def _named(self) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
        """All modules, each with its name, what still exists of the module that was given and holds it, and its path in that."""
        for number, above, root in self._roots():
            prefix, there = f"{number}:" if number else "", list(root.named_modules())
            names = unwrapped_layers([(_below(above, path), module) for path, module in there])
            for (name, module), (path, _) in zip(names, there, strict=True):
                yield prefix + name, module, root, path

    def replicas(self) -> dict[Tensor, Any]:
        """Of the parameters that DistributedDataParallel keeps alike, the group of processes that hold copies."""
        out: dict[Tensor, Any] = {}
        for module in (
            m for root in self.alive() for m in root.modules() if isinstance(m, nn.parallel.DistributedDataParallel)
        ):
            for name, param in module.module.named_parameters():
                if name not in module.parameters_to_ignore:
                    out.setdefault(param, module.process_group)
        return out

    def survey(self) -> Survey:
        """Where the inputs of the modules' layers can be observed; made once."""
        if self._survey is None:
            self._survey = survey((name, module) for name, module, _, _ in self._named()).of(self._parts())
        return self._survey

    def _parts(self) -> dict[Tensor, Tensor]:
        """What stands in the modules → the parameter, where these are not the same."""
        return parts_of(m for root in self.alive() for m in root.modules())

    def leaves(self, param_groups: Sequence[Mapping[str, Any]], observed: bool = False) -> list[Leaf]:
        """The leaves of parameter groups in order; where inputs are ``observed``, with the sites of their layers."""
        owner: dict[Tensor, tuple[str, nn.Module, str]] = {}
        others: dict[Tensor, list[str]] = {}
        parts = self._parts()
        for called, holder, root, place in self._named():
            self._paths[holder] = weakref.ref(root), place
            self._held[holder] = dict(holder.named_parameters(recurse=False))
            for its_name, there in self._held[holder].items():
                own = parts.get(there, there)
                if owner.setdefault(own, (called, holder, its_name))[1] is not holder:
                    others.setdefault(own, []).append(called)
        sites: dict[Tensor, list[Site]] = {}
        for site in self.survey().sites if observed else ():
            for param in (site.weight, site.bias):
                if param is not None:
                    sites.setdefault(param, []).append(site)
        replicas = self.replicas()
        leaves: list[Leaf] = []
        turn = iter(turns([p for group in param_groups for p in group["params"]]))
        for k, group in enumerate(param_groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for name, param in zip(names, group["params"], strict=True):
                path, module, attribute = owner.get(param, (None, None, ""))
                name = name or (f"param_{len(leaves)}" if path is None else f"{path}.{attribute}".lstrip("."))
                layer = path if path is not None else name.rpartition(".")[0] or name
                kind = kind_of(attribute or name, param, module)
                turned = module is not None and inputs_first(module, param)
                if param in self.lost:
                    layer = name  # that of what was around it has another parameter now
                elif module is None and param in self._known:
                    layer, kind, turned = self._known[param]
                seen = tuple(sites.get(param, ()))
                more = next(turn), replicas.get(param), tuple(others.get(param, ()))
                leaves.append(Leaf(name, param, kind, layer, module, k, seen, turned, attribute, *more))
        return with_scores(leaves)
