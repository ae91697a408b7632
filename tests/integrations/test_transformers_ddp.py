"""Hugging Face's Trainer in two processes: replicas end alike, work on matrices is divided, and a checkpoint resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.launching import in_two_processes

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
pytest.importorskip("accelerate", reason="Accelerate is not installed: make integrations")

from integrations.ddp_script import JOINT, RESUMED, TWIN, joint, kept, trainer
from integrations.test_transformers import inside

EACH = list(dict.fromkeys([*TWIN, *RESUMED, "muon", "whitening"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_two_processes(Path(__file__).with_name("ddp_script.py"), tmp_path_factory.mktemp("trainer"), EACH)


@pytest.mark.parametrize("recipe", RESUMED)
def test_two_processes(folder, tmp_path, recipe):
    first, second = (torch.load(folder / f"{recipe}{rank}.pt") for rank in range(2))
    for name, p in first["params"].items():
        assert torch.equal(p, second["params"][name]), name
        assert torch.equal(p, first["resumed"][name]), name
        assert torch.equal(p, second["resumed"][name]), name
    if recipe in ("auto", "soap"):
        alone = trainer(tmp_path, recipe, max_steps=1)
        alone.train()
        whole = kept(inside(alone))
        assert max(first["kept"], second["kept"]) < 0.75 * whole <= 0.75 * (first["kept"] + second["kept"])


@pytest.mark.parametrize("kind", list(JOINT)[1:])
@pytest.mark.parametrize("recipe", EACH)
def test_two_processes_end_where_one_ends_on_the_joint_batch(folder, tmp_path, recipe, kind):
    found, alone = torch.load(folder / f"{recipe}0.pt")[kind], joint(tmp_path, kind, recipe, 1)
    for name, p in alone.items():
        # float64; the sums of two processes are of another order
        torch.testing.assert_close(found[name], p, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_losses_of_a_classifier_are_doubled_whatever_the_optimizer(folder, tmp_path):
    """The Trainer's own doing, as docs/trainers/transformers.md says: torch's AdamW ends elsewhere too, and at the same place."""
    kind = "a classifier, as set"
    ours, theirs = (torch.load(folder / f"{name}0.pt")[kind] for name in ("adamw", "torch's AdamW"))
    alone = joint(tmp_path, kind, "torch's AdamW", 1)
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-10)
    assert max((theirs[name] - p).abs().max() for name, p in alone.items()) > 1e-3
