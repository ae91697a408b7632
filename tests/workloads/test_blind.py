"""The sets of the pool that were written blind: what holds for each of their tasks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from precond.lab.workloads import Plan, peers, train
from precond.lab.workloads.entrant import Peer
from precond.lab.workloads.pool import BLIND, CONFIRMATION, FINAL, HELD_OUT, POOL, SEALED
from precond.lab.workloads.pool.blind.readers import MultiQueryGPT
from precond.lab.workloads.pool.confirmation.networks import GroupedLlama, WordGPT
from precond.lab.workloads.pool.final.readers import DilatedLM, PostNormGPT
from precond.lab.workloads.pool.held_out.networks import ParallelGPT, TuneLlama
from precond.lab.workloads.pool.sealed.texts import RecurrentLM

MEMBERS = {member.name: member for member in POOL}
WRITTEN_BLIND = CONFIRMATION + HELD_OUT + SEALED + FINAL + BLIND
TEXTS = ("Llama with grouped queries, names", "GPT with parallel branches, comments", "gated linear recurrences, docstrings")
"""Whose characters are not all met in the training part."""


@pytest.mark.parametrize("name", WRITTEN_BLIND)
def test_data_are_the_same_each_time_finite_and_their_parts_apart(name: str) -> None:
    make = MEMBERS[name].workload
    found, again = make(), make.__wrapped__()  # type: ignore[attr-defined]  # what is behind the cache
    assert list(found.parts) == ["train", "validation", "test"]
    seen: list[set[bytes]] = []
    for part, other in zip(found.parts.values(), again.parts.values(), strict=True):
        assert torch.equal(part.inputs, other.inputs) and torch.equal(part.targets, other.targets)
        assert part.inputs.isfinite().all() and len(part) >= 150
        seen.append({row.numpy().tobytes() for row in torch.cat([part.inputs.flatten(1), part.targets.view(len(part), -1)], 1)})
    # Sequences over few signs may come twice, and seldom do.
    assert all(len(a & b) <= 0.02 * len(b) for a, b in itertools.combinations(seen, 2))
    train = found.parts["train"]
    if found.loss_fn is F.cross_entropy and name not in TEXTS:
        with torch.no_grad():
            classes = found.make().eval()(train.inputs[:2]).shape[1]
        assert train.targets.min() == 0 and train.targets.max() == classes - 1
    # Curves are told to 2.5 % of a training by examples enough, and searches are judged by others.
    assert 2 * found.evaluated <= len(train)


@pytest.mark.parametrize("name", HELD_OUT + SEALED + FINAL + BLIND)
def test_adamw_has_losses_to_reach(name: str) -> None:
    """They fall from the first evaluation on, but the first of them has not seen it all."""
    plan = Plan(4e-3, 24, 11, "cosine", 1, 4)
    outcome, _ = train(MEMBERS[name].workload(), Peer("torch AdamW", peers.adamw, "torch-adamw"), plan)
    for losses in (outcome.curve.train_loss, outcome.curve.validation_loss):
        assert all(map(math.isfinite, losses))
        assert min(losses) < 0.999 * losses[0] and losses[1] > 1.001 * min(losses)


def test_transformers_of_text_look_back_alone() -> None:
    torch.manual_seed(0)
    for model in (
        WordGPT(11, 8, 16, 2, 2),
        GroupedLlama(11, 8, 16, 2, 4, 2),
        ParallelGPT(11, 8, 16, 2, 2),
        TuneLlama(11, 8, 16, 2, 2),
        RecurrentLM(11, 16, 2),
        PostNormGPT(11, 8, 16, 2, 2),
        DilatedLM(11, 16, 2),
        MultiQueryGPT(11, 8, 16, 2, 2),
    ):
        tokens = torch.randint(11, (2, 8))
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 1) % 11
        before, after = model(tokens), model(changed)
        assert before.shape == (2, 11, 8)
        assert torch.allclose(before[..., :5], after[..., :5], atol=1e-6) and not torch.allclose(
            before[..., 5:], after[..., 5:]
        )
