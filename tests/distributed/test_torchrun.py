"""A script started with torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from distributed.launching import torchrun
from distributed.pool import Pool, program
from distributed.training import Setting, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun(Path(__file__).with_name("train_script.py"), 2, folder, [str(folder)])
    return folder


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_ranks_end_alike_and_where_one_process_ends(folder, wrap):
    alone = train(Setting("BNP @ RMS", (7, 5)))
    first, second = (torch.load(folder / f"{wrap}{rank}.pt") for rank in range(2))
    for name, p in alone["params"].items():
        assert torch.equal(first["params"][name], second["params"][name])
        torch.testing.assert_close(first["params"][name], p, rtol=1e-6, atol=1e-8)


def programs() -> list[tuple[str, int, str]]:
    """(name, processes, code) of the complete programs in the documentation."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n# torchrun --nproc-per-node=(\d) (\w+)\.py\n(.*?)```", text, re.S)
    return [(name, int(n), code) for n, name, code in blocks]


@pytest.mark.parametrize(("name", "processes", "code"), programs(), ids=[name for name, *_ in programs()])
def test_programs_of_the_documentation(tmp_path, name, processes, code):
    """In forks: torchrun itself, which imports torch once more in each process, has the script above."""
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    pool, store = Pool(tmp_path, processes), TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        pool.run(program, script, store.port)
    finally:
        pool.stop()


def test_there_are_programs():
    assert [name for name, *_ in programs()] == ["ddp", "fsdp", "tensors"]
