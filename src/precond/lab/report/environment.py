"""What a result depends on beside its settings."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Of Python, torch, precond, and what searches learning rates."""
    try:
        own = version("precond")
    except PackageNotFoundError:
        own = "not installed"
    found = {"python": platform.python_version(), "torch": torch.__version__, "precond": own}
    with suppress(PackageNotFoundError):
        found["optuna"] = version("optuna")
    return found


def machine(device: str) -> dict[str, str]:
    """Processor, cores, threads in use, and the accelerator where one is used."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    # On Linux, platform.processor() is empty or the name of the architecture.
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
