"""How work, state and bytes are divided: run on each rank by :class:`distributed.pool.Pool`, or by one process alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from precond import PreconditionedGD, auto, muon, shampoo, soap, whitening
from precond.algebra import collectives
from precond.optim.engine.asking import Asking
from precond.optim.engine.sharing import Shared
from precond.optim.optimizer import model_hooks
from precond.optim.ranks.exchange import Exchange

RECIPES: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "soap": lambda m: soap(m, eps=1e-3),
    "shampoo": lambda m: shampoo(m),
    "muon": lambda m: muon(m, arithmetic="full"),
    "auto": lambda m: auto(m),
    "whitening": lambda m: whitening(m),
}


def layers(n: int, width: int, wrap: str) -> nn.Module:
    """Square layers one after the other, wrapped where a group is initialized and the process is not to work ``"alone"``."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(n)))
    if wrap == "alone" or not dist.is_initialized():
        return model
    if wrap == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _backward(model: nn.Module, k: int, width: int, ranks: Sequence[int]) -> None:
    """Of the joint batch of some ranks, of 32 samples each."""
    x = torch.cat([torch.randn(32, width, generator=torch.Generator().manual_seed(1000 * k + r)) for r in ranks])
    model(x).square().mean().backward()


def _ready(recipe: str, wrap: str, n: int, width: int, steps: int) -> Iterator[Any]:
    """The optimizer of some layers, before each of some steps, with the gradients of a rank's batch; alone of all ranks'."""
    model = layers(n, width, wrap)
    optimizer = RECIPES[recipe](model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for k in range(steps):
        optimizer.zero_grad()
        _backward(model, k, width, range(world) if wrap == "alone" else [rank])
        yield optimizer


def seconds(recipe: str, wrap: str = "ddp", n: int = 16, width: int = 256, steps: int = 24) -> dict[str, float]:
    """Of processors in ``step()``, after a first one: of this process, whose threads also move what is sent, and of this thread alone.

    Wrapped ``"alone"`` it does all the work of the ranks: it has the samples of all of them.

    Of the thread's, those for the others' ``statistics`` of inputs, and for the ``exchange`` of gradients, steps and parameters: what it puts
    together and takes apart, and its part of the collectives.
    """
    spent: Counter[str] = Counter()
    # Alone also means without the others' inputs.
    heard = mock.patch.object(model_hooks, "distributed", lambda: False) if wrap == "alone" else nullcontext()
    with (
        heard,
        _timed(spent, {model_hooks: "synchronized", Shared: "wanted"}, "statistics"),
        _timed(spent, {Exchange: "collect"}, "exchange"),
        _timed(spent, {Exchange: "deliver", Shared: "spread"}, "exchange"),
    ):
        for k, optimizer in enumerate(_ready(recipe, wrap, n, width, steps)):
            if k == 1:
                spent.clear()
            start = time.process_time(), time.thread_time()
            optimizer.step()
            if k:
                spent["process"] += time.process_time() - start[0]
                spent["thread"] += time.thread_time() - start[1]
    return dict(spent)


@contextmanager
def _timed(spent: Counter[str], functions: Mapping[Any, str], what: str) -> Iterator[None]:
    """Count the seconds of this thread in some functions, once where one calls another."""
    inside: list[str] = []

    def timing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            inside.append(what)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    spent[what] += time.thread_time() - start

        return call

    with ExitStack() as patches:
        for where, name in functions.items():
            patches.enter_context(mock.patch.object(where, name, timing(getattr(where, name))))
        yield


_ROOTS = ("linalg_eigh", "_linalg_eigh", "linalg_qr", "geqrf", "ormqr", "linalg_cholesky_ex", "cholesky", "_linalg_svd")


class _Work(torch.utils._python_dispatch.TorchDispatchMode):
    """Multiplications of matrices, by their operations, and decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.roots = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            a, b = tensors[-2:]
            self.products += 2 * a.numel() * b.shape[-1]
        elif name in _ROOTS:
            self.roots += tensors[0].numel() * tensors[0].shape[-1]
        return out


def operations(recipe: str, wrap: str = "ddp", n: int = 16, width: int = 32, steps: int = 10) -> int:
    """Of products and decompositions of matrices in ``step()``, by this process."""
    total = 0
    for optimizer in _ready(recipe, wrap, n, width, steps):
        with _Work() as work:
            optimizer.step()
        total += work.products + work.roots
    return total


def numbers(recipe: str, wrap: str = "ddp", n: int = 16, width: int = 32) -> int:
    """Of all state that this process keeps after a step."""
    for optimizer in _ready(recipe, wrap, n, width, 1):
        optimizer.step()
    return sum(local(t).numel() for s in optimizer.state.values() for t in s.values())


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


CALLS = {
    "all_reduce": lambda tensor, *a, **k: tensor,
    "all_gather_single": lambda out, tensor, *a, **k: tensor,
    "all_to_all_single": lambda out, tensor, *a, **k: tensor,
    "broadcast": lambda tensor, *a, **k: tensor,
}


@contextmanager
def _heard(note: Callable[[str, str, Sequence[Any]], None]) -> Iterator[None]:
    """Note each collective: what it is about, or its name where the library says nothing; its name; its arguments."""
    originals = {name: getattr(dist, name) for name in CALLS}
    said: list[str] = []

    @contextmanager
    def named(what: str, *args: Any) -> Iterator[None]:
        said.append(what)
        yield
        said.pop()

    def heard(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(said[-1] if said else name, name, args)
            return originals[name](*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(mock.patch.object(dist, name, heard(name)))
        patches.enter_context(mock.patch.object(collectives, "_named", named))
        yield


@contextmanager
def counted_bytes() -> Iterator[Counter[str]]:
    """What this rank gives to collectives, by what it is; what the library has no name for, by the collective's.

    What it gives to all ranks alike counts once, by whichever collective they take it.
    """
    given: Counter[str] = Counter()
    shared = collectives.share

    def note(what: str, name: str, args: Sequence[Any]) -> None:
        t = CALLS[name](*args)
        given[what] += t.numel() * t.element_size()

    def once(parts: Sequence[Tensor], sizes: Sequence[int], what: str, *more: Any) -> list[Tensor]:
        before, out = Counter(given), shared(parts, sizes, what, *more)
        given.clear()
        given.update(before)
        given[what] += sum(t.numel() * t.element_size() for t in parts)
        return out

    with _heard(note), mock.patch.object(collectives, "share", once):
        yield given


BY_NECESSITY = {"steps", "gradients and steps", "statistics of inputs"}
"""What ranks must tell each other of blocks that have owners, whatever else is spared."""


def of_collectives(recipe: str, wrap: str = "ddp", n: int = 16, width: int = 256, steps: int = 24) -> dict[str, float]:
    """Seconds of processors, of this process, of a bare program that sends as many bytes as ``step()`` must, after a first one.

    By the same calls, from memory where the numbers lie side by side to memory where they are left: ``together``, one after the other; and
    ``apart``, with products of matrices between them for as long as the thread of a step works there, whose seconds are not counted.
    """
    made: list[tuple[float, list[int], list[int]]] = []
    worked = 0.0  # by the thread in steps, since what was made last

    def note(what: str, name: str, args: Sequence[Any]) -> None:
        nonlocal worked
        if what in BY_NECESSITY:
            now = time.thread_time()
            made.append((worked + now, args[2], args[3]))
            worked = -now

    for k, optimizer in enumerate(_ready(recipe, wrap, n, width, steps)):
        with _heard(note) if k else nullcontext():
            worked -= time.thread_time()
            optimizer.step()
            worked = worked + time.thread_time() if k else 0.0
    most = max(max(sum(takes), sum(gives)) for _, takes, gives in made)
    out, sent = torch.zeros(most), torch.zeros(most)
    factor, product = torch.zeros(64, 64), torch.empty(64, 64)
    found = {}
    for how in ("together", "apart"):
        dist.barrier()
        start, apart = time.process_time(), 0.0
        for work, takes, gives in made:
            begin = time.thread_time()
            while how == "apart" and time.thread_time() < begin + work:
                torch.mm(factor, factor, out=product)
            apart += time.thread_time() - begin
            dist.all_to_all_single(out[: sum(takes)], sent[: sum(gives)], takes, gives)
        found[how] = time.process_time() - start - apart
    return found


def shared_by_all(through_sockets: bool) -> list[list[float]]:
    """Of each rank r a number, r times."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with mock.patch.object(collectives, "_through_sockets", lambda device: through_sockets):
        every = collectives.share([torch.full((1,), 7.0 * rank)] * rank or [torch.empty(0)], range(size), "numbers")
    return [t.tolist() for t in every]


EVERY: Mapping[int, Sequence[int]] = {}
"""In every step the same."""


ABOUT_INPUTS = {"statistics of inputs", "how many inputs it saw", "what is to be observed"}


def unequal(sizes: Sequence[int], parts: int = 1, others: Mapping[int, Sequence[int]] = EVERY) -> list[Tensor]:
    """Whitening, in float64, on batches of which each rank has so many samples, in micro-batches; all in one process where no group is.

    Args:
        others: other sizes, by steps.
    """
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    model: nn.Module = DistributedDataParallel(plain) if dist.is_initialized() else plain
    optimizer = whitening(model, lr=0.01, eps=1e-3)
    world = dist.get_world_size() if dist.is_initialized() else 1
    for k in range(6):
        now = list(others.get(k, sizes))
        x = torch.randn(sum(now), 16, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        mine = x.split(now)[dist.get_rank()] if dist.is_initialized() else x
        optimizer.zero_grad()
        for part in mine.tensor_split(parts):
            (world * model(part).square().sum() / sum(now)).backward()
        optimizer.step()
    return [p.detach() for p in plain.parameters()]


def calls(recipe: str, wrap: str, told: str, n: int = 8, width: int = 32, steps: int = 14) -> tuple[Counter[str], list[Tensor]]:
    """How often ranks exchange what in steps after the third, and their parameters at the end.

    Args:
        told: ``"along"`` with steps what is to be observed for the next, or ``"apart"``.
    """
    made: Counter[str] = Counter()
    apart = mock.patch.object(Asking, "along", lambda asking, deliver: deliver(None)[0]) if told == "apart" else nullcontext()
    with apart:
        for k, optimizer in enumerate(_ready(recipe, wrap, n, width, steps)):
            with _heard(lambda what, name, args, k=k: made.update([what] * (k > 2))):
                optimizer.step()
            kept = [
                mean.untyped_storage().nbytes() for mean in optimizer._model_hooks.observer.wanted.values() if mean is not None
            ]
            assert max(kept, default=0) <= 4 * n * (width + 1), "means known before keep what was sent with them"
    return made, [local(p.detach()).clone() for group in optimizer.param_groups for p in group["params"]]


def bytes_per_step(recipe: str, wrap: str, n: int = 8, width: int = 32, steps: int = 4) -> tuple[list[dict[str, int]], int]:
    """What this rank gives in each step, and the bytes of all gradients."""
    out = []
    for optimizer in _ready(recipe, wrap, n, width, steps):
        with counted_bytes() as given:
            optimizer.step()
        out.append(dict(given))
    return out, sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
