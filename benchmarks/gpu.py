"""What a GPU says: the contract's tests on it, and the time and memory of a training step of a GPT of 124 M with every recipe.

python benchmarks/gpu.py --out gpu.json [--budget 470] [--device cuda] [--size 124M] [--only muon,soap] [--modes eager]

Batch 8 × 1024, bfloat16 autocast; each optimizer eager, captured as a CUDA graph, and compiled. The results are in the file from the
first row on, whatever comes after: an entrant that fails or hangs is a row with its error, and what the budget does not reach is
listed. Without a GPU it runs a small model on the CPU, which says only that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_rows import ENTRANTS, MODES, SIZES, Size, serve
from harness import table

from precond.lab.workloads import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ["tests/contract"]
CONTRACT_SHARE, ROW_SECONDS = 0.35, 60.0  # of the budget; of one row, compilation included


def write(path: Path, results: dict[str, Any]) -> None:
    """Whoever reads the file in the meantime finds the rows before."""
    write_atomically(path, json.dumps(results, indent=1))


def contract(device: str, paths: list[str], seconds: float) -> dict[str, Any]:
    """Run the tests there; how many passed, and which failed."""
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    parallel = ["-n", str(workers)] if device != "cpu" else ["-n", "0"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        *parallel,
        "--device",
        device,
        *paths,
    ]
    start = time.monotonic()
    # A group of its own, so that workers end with it.
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    error = None
    try:
        output, _ = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, 9)
        output, _ = running.communicate()
        error = f"stopped after {seconds:.0f} s"
    lines = output.splitlines()
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", lines[-1] if lines else "")
    }
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if not counts and error is None:
        error = f"pytest ended with {running.returncode}: {' '.join(lines[-3:])[:300]}"
    return {**counts, "failures": failed[:100], "error": error, "seconds": round(time.monotonic() - start, 1)}


class Worker:
    """The process that has the GPU; another takes its place where it crashes or hangs."""

    def __init__(self, size: Size, device: str, backend: str):
        self.arguments = (size, device, backend)
        self._process: Any = None

    def row(self, name: str, mode: str, seconds: float) -> dict[str, Any]:
        if self._process is None:
            context = mp.get_context("spawn")
            self._pipe, there = context.Pipe()
            self._process = context.Process(target=serve, args=(there, *self.arguments), daemon=False)
            self._process.start()
            there.close()
        start = time.monotonic()
        try:
            self._pipe.send((name, mode))
            if not self._pipe.poll(seconds):
                raise TimeoutError(f"no result within {seconds:.0f} s")
            found = self._pipe.recv()
        except (EOFError, OSError) as error:  # TimeoutError is one
            self.stop()
            found = {"error": str(error) or "the process died"}
        if "CUDA error" in found.get("error", ""):  # its context is lost
            self.stop()
        return {"optimizer": name, "mode": mode, **found, "seconds": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["optimizer"], row["mode"]]
    if "error" in row:
        return [*head, "", "", "", "", row["error"][:110]]
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
    remark = "" if row["finite"] else "inf or NaN"
    return [*head, f"{row['ms']:.1f}", f"{row['step_ms']:.2f}", f"{row['step_ms_worst']:.2f}", peak, remark]


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for all")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, default="124M" if gpu else "small")
    parser.add_argument("--only", help=f"of {', '.join(ENTRANTS)}; separated by semicolons")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--backend", default="inductor" if gpu else "eager", help="of torch.compile")
    parser.add_argument("--tests", nargs="*", default=CONTRACT, help="what pytest runs; nothing: no tests")
    options = parser.parse_args()
    names = [n.strip() for n in options.only.split(";")] if options.only else list(ENTRANTS)
    modes = options.modes.split(",")
    if unknown := [*(set(names) - set(ENTRANTS)), *(set(modes) - set(MODES))]:
        parser.error(f"not known: {', '.join(unknown)}")
    end = time.monotonic() + options.budget
    device_name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    results: dict[str, Any] = {
        "torch": torch.__version__, "device": device_name, "size": vars(SIZES[options.size]), "contract": None, "rows": [], "unreached": []
    }  # fmt: skip
    write(options.out, results)
    if options.tests:
        results["contract"] = contract(options.device, options.tests, CONTRACT_SHARE * options.budget)
        write(options.out, results)
        print(json.dumps({k: v for k, v in results["contract"].items() if k != "failures"}), flush=True)
        print(*results["contract"]["failures"][:20], sep="\n", flush=True)
    worker = Worker(SIZES[options.size], options.device, options.backend)
    try:
        for name, mode in ((n, m) for m in modes for n in names):
            left = end - time.monotonic()
            if left < 5:
                results["unreached"].append(f"{name}, {mode}")
                continue
            results["rows"].append(worker.row(name, mode, min(ROW_SECONDS, left)))
            write(options.out, results)
            print(" | ".join(cells(results["rows"][-1])), flush=True)
    finally:
        worker.stop()
        write(options.out, results)
    head = ["optimizer", "mode", "ms", "step() ms", "worst", "peak MiB", ""]
    print(table([head, *map(cells, results["rows"])]))
    if results["unreached"]:
        print(f"The budget of {options.budget:.0f} s did not reach {'; '.join(results['unreached'])}.")


if __name__ == "__main__":
    main()
