"""The device guard without which autograd refuses tensors that say ``cuda``: compiled once, kept outside the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


class Unavailable(RuntimeError):
    """No pretended device can be made here; the message says why."""


def guard() -> Path:
    """The compiled guard of this torch, from the cache or built now.

    Raises:
        Unavailable: where there is no C++ compiler, or it fails.
    """
    if torch.cuda.is_available():
        raise Unavailable("a real CUDA device is here: nothing is to be pretended")
    named = hashlib.sha256(f"{torch.__version__} {torch.__file__}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precond-tests"
    built = folder / f"guard-{named}.so"
    if not built.exists():
        _build(built)
    return built


def _build(target: Path) -> None:
    """Compile to a temporary name and rename, so that several processes may build at once."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++, clang++, or CXX in the environment)")
    root = Path(torch.__file__).parent
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *flags, f"-I{root / 'include'}", str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise Unavailable(f"{compiler} could not build the device guard: {done.stderr.strip()[-400:]}")
            os.replace(made, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the device guard could not be built: {error}") from error
