"""Threads, forks, copies, interrupts, the end of an optimizer, and many steps: nothing is lost, shared or left half done."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from peers.recipes import RECIPES, closure, flat, loss_of, make, net, train
from precond import SAM, GradientNorm, PreconditionedGD
from precond.optim.optimizer.interrupts import Uninterrupted

ROOT = Path(__file__).parents[2]
VARIANTS = [
    *[(recipe, {}) for recipe in RECIPES],
    *[(recipe, {"regularizers": [SAM(0.01)]}) for recipe in ("adamw", "whitening", "auto")],
    ("adamw", {"regularizers": [GradientNorm(1e-3)]}),
    ("adamw", {"nonfinite": "skip", "max_norm": 1.0}),
    ("adamw", {"engine": "loop"}),
]
each = pytest.mark.parametrize(("recipe", "options"), VARIANTS, ids=str)


def started(recipe: str, options: dict, steps: int = 6) -> tuple[nn.Module, PreconditionedGD]:
    model = net()
    optimizer = make(recipe, model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def ends(recipe: str, options: dict) -> torch.Tensor:
    """The parameters after six steps and six more."""
    model, optimizer = started(recipe, options)
    train(model, optimizer, 6, start=6)
    return flat(model)


# --- threads and processes --------------------------------------------------------------------------------------------------


@each
def test_optimizers_in_threads_do_not_disturb_each_other(recipe, options):
    """Three at once, each driven by another thread than its maker."""
    runs = [started(recipe, options) for _ in range(3)]
    failed: list[BaseException] = []

    def go(model, optimizer):
        try:
            train(model, optimizer, 6, start=6)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=go, args=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    expected = ends(recipe, options)
    assert all(torch.equal(flat(model), expected) for model, _ in runs)


class Forwards(Dataset):
    """Whose examples are made by the model, in the loader's processes."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(torch.full((1, 5), float(i))).detach()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("recipe", ["adamw", "bnp", "whitening", "auto"])
def test_forks_of_a_loader_leave_live_hooks_alone(recipe):
    model, optimizer = started(recipe, {})
    assert len(list(DataLoader(Forwards(model), batch_size=2, num_workers=1, multiprocessing_context="fork"))) == 2
    train(model, optimizer, 6, start=6)
    assert torch.equal(flat(model), ends(recipe, {}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@each
def test_a_forked_child_goes_on_as_its_parent(recipe, options):
    model, optimizer = started(recipe, options)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no exception may leave here: two test runs would go on
        said: object = "nothing"
        try:
            train(model, optimizer, 6, start=6)
            said = flat(model).tolist()
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writing, pickle.dumps(said))
            os._exit(0)
    os.waitpid(child, 0)
    found = pickle.loads(os.read(reading, 1 << 16))
    os.close(reading)
    os.close(writing)
    train(model, optimizer, 6, start=6)
    assert found == flat(model).tolist()


def test_pickles_go_on_in_a_process_of_their_own():
    """All recipes in one spawned process, which knows nothing but the pickle."""
    runs = {f"{r}, {o}": started(r, o) for r, o in VARIANTS}
    code = (
        "import pickle, sys, torch; from peers.recipes import train, flat; torch.set_num_threads(1)\n"
        "runs = pickle.load(sys.stdin.buffer)\n"
        "for model, optimizer in runs.values(): optimizer.watch(model); train(model, optimizer, 6, start=6)\n"
        "sys.stdout.buffer.write(pickle.dumps({k: flat(m).tolist() for k, (m, _) in runs.items()}))"
    )
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(runs), capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(done.stdout) == {f"{r}, {o}": ends(r, o).tolist() for r, o in VARIANTS}


# --- interrupts -------------------------------------------------------------------------------------------------------------


class Interrupt:
    """Sends SIGINT at the n-th line that the library executes."""

    def __init__(self, at: int = 0):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        if event == "call" and f"{os.sep}precond{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def contents(model, optimizer):
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# SAM with statistics of the clean gradient commits these at the probe, before its second closure: see docs/decisions.md.
WHOLE = [(r, o) for r, o in VARIANTS if not ("regularizers" in o and r == "auto")]


@pytest.mark.parametrize(("recipe", "options"), WHOLE, ids=str)
def test_ctrl_c_leaves_what_was_before_the_step_or_what_is_after_it(recipe, options):
    model, optimizer = started(recipe, options, 3)
    kept = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    before = contents(model, optimizer)
    run = closure(model, optimizer, 50)
    with Interrupt() as counted:
        optimizer.step(run)
    after = contents(model, optimizer)
    found = []
    for k in range(12):
        model.load_state_dict(kept[1])
        optimizer.load_state_dict(kept[0])
        with pytest.raises(KeyboardInterrupt), Interrupt(at=1 + k * (counted.lines - 2) // 11):
            optimizer.step(run)
        now = contents(model, optimizer)
        assert same(now, before) or same(now, after), k
        found.append(same(now, after))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not found[0] and found[-1]
    train(model, optimizer, 1)


def test_a_second_ctrl_c_is_not_held_back():
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            done.append(1)
    assert len(done) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- copies and ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, pickle.dumps, lambda o: o.state_dict()])
@pytest.mark.parametrize("recipe", ["adamw", "bnp", "auto"])
def test_nothing_is_copied_at_a_probed_point(recipe, how):
    model, optimizer = started(recipe, {"regularizers": [GradientNorm(1e-3)]})
    loss_of(model, 6).backward()
    before = flat(model)
    while optimizer.probe():
        with pytest.raises(RuntimeError, match="finish the step or call restore"):
            how(optimizer)
        loss_of(model, 6).backward()
    assert torch.equal(flat(model), before)
    how(optimizer)  # between the last gradient and the step it is where it was, and stays so
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_hooks_go_with_their_optimizer_and_models_without_it():
    """All recipes at once: a collection of garbage looks at all that the tests have made."""
    models, optimizers, gone, lost = {}, {}, {}, {}
    for recipe, options in VARIANTS:
        name = f"{recipe}, {options}"
        models[name], optimizer = started(recipe, options, 2)
        gone[name] = weakref.ref(optimizer)
        model, optimizers[name] = started(recipe, options, 2)
        lost[name] = weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert not [name for name, ref in gone.items() if ref() is not None]
    assert not [name for name, ref in lost.items() if ref() is not None]
    for name, model in models.items():
        assert not any(hooks for m in model.modules() for kind, hooks in vars(m).items() if kind.endswith("_hooks")), name


def test_nothing_grows_in_hundreds_of_steps():
    """The script that takes 20,000 of each recipe, with 40."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "endurance.py", "--steps", "40"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert all(recipe in done.stdout for recipe in RECIPES)
