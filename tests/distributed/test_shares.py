"""Work on matrices is divided among ranks: who does what, who keeps what, what is sent; and the result is that of one process."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed import saving, shares
from distributed.pool import Pool
from distributed.training import Setting, train
from precond.algebra.memory import Memory

torch.set_num_threads(1)
PARTS = {2: (7, 5), 3: (4, 4, 4), 4: (4, 3, 2, 3)}


def check(found: list, alone: dict, within: float = 1e-10) -> None:
    """Every rank ends alike bit for bit, and where one process ends: sums of a batch in parts are rounded differently."""
    for kind in ("params", "state"):
        for name, t in alone[kind].items():
            for one in found:
                assert torch.equal(one[kind][name], found[0][kind][name]), f"{name} differs between ranks"
            largest = t.abs().max() if t.numel() else 0.0
            assert (found[0][kind][name] - t).abs().le(within * (1 + largest)).all(), name


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp, copies of parts"])
@pytest.mark.parametrize(
    "optimizer", ["muon", "shampoo", "soap", "soap, SAM", "kfac", "whitening", "auto", "auto, loop", "auto, SAM"]
)
def test_four_ranks_are_one_process(four, optimizer, wrap):
    check(four.run(train, Setting(optimizer, PARTS[4], wrap=wrap)), train(Setting(optimizer, PARTS[4])))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp, copies of parts"])
def test_what_auto_measures_is_known_to_all(four, wrap):
    """It is measured by owners, after the seventh step, and decides for everyone; layers then may have other owners."""
    setting = Setting("auto, white", PARTS[4], steps=12)
    check(four.run(train, replace(setting, wrap=wrap)), train(setting))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_halves_of_a_batch_are_the_batch(ranks, wrap):
    setting = Setting("auto, SAM", (8, 4), wrap=wrap, how="probe", parts=2)
    check(ranks.run(train, setting), train(setting))


# --- division ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", shares.RECIPES)
def test_products_and_state_are_divided(ranks, four, recipe, wrap):
    """Sixteen layers over two and four ranks: a half and a quarter."""
    for counts in (shares.operations, shares.numbers):
        alone, more = counts(recipe), 1.1
        for pool in (ranks, four):
            for part in pool.run(counts, recipe, wrap):
                assert part <= more * alone / pool.world


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_bare_program_sends_in_less_time_than_steps_take(ranks, wrap):
    """The floors of ``benchmarks/sharing.py``; the least of three, since others may be at work on the machine."""
    steps = ranks.run(shares.seconds, "whitening", wrap, 8, 64, 6)
    bare = [ranks.run(shares.of_collectives, "whitening", wrap, 8, 64, 6) for _ in range(3)]
    for rank, spent in enumerate(steps):
        for how in ("together", "apart"):
            assert 0 < min(every[rank][how] for every in bare) < spent["process"]


@pytest.mark.parametrize("through_sockets", [True, False])
def test_what_each_rank_has_is_shared_by_all(three, through_sockets):
    every = [[], [7.0], [14.0, 14.0]]
    for rank, found in enumerate(three.run(shares.shared_by_all, through_sockets)):
        assert found == [[] if r == rank else numbers for r, numbers in enumerate(every)]


@pytest.mark.parametrize("recipe", shares.RECIPES)
def test_bytes_that_a_rank_gives(ranks, four, recipe):
    """To others: its part of gradients and the steps of what it owns, once each; statistics of inputs once, as triangles."""
    n, width = 8, 32
    for pool in (ranks, four):
        for steps, total in pool.run(shares.bytes_per_step, recipe, "fsdp", n, width):
            part = total / pool.world * (1 - 1 / pool.world)
            moved = 2.1 * part
            triangles = n * 4 * (width * (width + 1) / 2 + 2 * width) if recipe in ("auto", "whitening") else 0
            told = n * 8 * (width + 3) if triangles else 0  # means known before, counts
            for k, given in enumerate(steps):
                looks = recipe in ("auto", "whitening") and k == 0  # at parameters: how long they are at first
                assert given.get("who looks at parameters", 0) <= looks * 4 * n
                assert set(given) <= {"gradients and steps", "who looks at parameters", *shares.ABOUT_INPUTS}
                assert sum(given.values()) <= moved + triangles * (1 - 1 / pool.world) + told + looks * (part + 4 * n)


@pytest.mark.parametrize("recipe", ["whitening", "auto"])
def test_statistics_of_inputs_are_a_quarter_of_all_to_everyone(ranks, four, recipe):
    """Of full matrices, means and deviations in float64."""
    n, width = 8, 64
    everyone = n * 8 * (width**2 + 2 * width + 2)
    for pool in (ranks, four):
        for steps, _ in pool.run(shares.bytes_per_step, recipe, "ddp", n, width):
            about = [sum(given.get(what, 0) for what in shares.ABOUT_INPUTS) for given in steps]
            assert 0 < max(about) <= everyone / 4


@pytest.mark.parametrize("recipe", ["whitening", "auto"])
def test_samples_are_sent_where_they_are_fewer_than_half_the_features(ranks, four, recipe):
    """And keep steps that observe within 2.2 / world of the gradients: each rank has 32 samples."""
    n, width = 8, 256
    for pool in (ranks, four):
        for steps, total in pool.run(shares.bytes_per_step, recipe, "ddp", n, width):
            about = max(sum(given.get(what, 0) for what in shares.ABOUT_INPUTS) for given in steps)
            told = n * 8 * (width + 4)  # means known before, counts
            assert 0 < about <= n * 4 * (32 + 2) * width * (1 - 1 / pool.world) + told
            assert max(sum(given.values()) for given in steps) <= 2.2 * total / pool.world


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sizes", [(3, 5), (3, 20), (20, 3), (0, 4), (4, 0), (20, 30)], ids=str)
def test_samples_of_some_ranks_and_covariances_of_others(ranks, sizes, parts):
    alone = shares.unequal(sizes)
    first, second = ranks.run(shares.unequal, sizes, parts)
    for p, q, r in zip(alone, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(3, 5), (20, 30)], ids=str)
@pytest.mark.parametrize(
    "others", [{3: (5, 3)}, {3: (20, 3)}, {4: (8, 0)}, {2: (0, 4), 4: (0, 4)}, {3: (7, 9), 4: (2, 2)}], ids=str
)
def test_a_rank_sends_another_number_of_samples_than_it_used_to(ranks, sizes, others):
    """Ranks expect of each other what they sent the last two times, and learn with it where that is not so."""
    alone = shares.unequal(sizes, 1, others)
    first, second = ranks.run(shares.unequal, sizes, 1, others)
    for p, q, r in zip(alone, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", ["whitening", "auto"])
def test_what_is_told_goes_with_what_is_sent_anyway(ranks, recipe, wrap):
    """What is to be observed with steps, numbers of samples with statistics; bit for bit as if it were told by calls of its own."""
    along, apart = (ranks.run(shares.calls, recipe, wrap, told) for told in ("along", "apart"))
    for (made, params), (others, same) in zip(along, apart, strict=True):
        assert others["what is to be observed"] > 3 and not made["what is to be observed"]
        assert made["statistics of inputs"] > 3 and made["how many inputs it saw"] <= 1
        for p, q in zip(params, same, strict=True):
            assert torch.equal(p, q)


def test_memory_for_one_purpose_at_a_time():
    memory, like = Memory(), torch.empty(0)
    first, other = memory.numbers("sent", 4, like), memory.numbers("received", 4, like)
    assert first.data_ptr() != other.data_ptr()
    assert memory.numbers("sent", 3, like).data_ptr() == first.data_ptr()
    assert memory.numbers("sent", 5, like).shape == (5,) and memory.numbers("sent", 2, like.double()).dtype == torch.float64
    other.fill_(1.0)
    square, row = memory.zeros("received", (torch.ones(1, 3), torch.ones(1)))
    assert square.tolist() == [[0.0] * 3] and row.tolist() == [0.0] and other.tolist() == [0.0] * 4


def test_the_calculation_for_more_gpus_runs(monkeypatch, capsys):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("muon", "soap", "auto"))]
    assert len(rows) == 24
    for recipe in ("muon", "soap", "auto"):  # what a rank sends falls with their number
        sent = [float(row[2]) for row in rows if row[0] == recipe]
        assert sent == sorted(sent, reverse=True)


# --- saving -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("optimizer", "wrap"), [("soap", "fsdp"), ("auto", "fsdp"), ("auto", "ddp"), ("soap, average", "fsdp")]
)
def test_what_four_ranks_saved_is_resumed_by_four_three_two_and_one(ranks, three, four, tmp_path, optimizer, wrap, flat):
    """In the midst of a period of roots: at the same number of ranks bit for bit what a run without the break gives."""
    path = str(tmp_path / "saved")
    setting = lambda n: Setting(optimizer, (12 // n,) * n, wrap=wrap, steps=3)  # noqa: E731
    on: dict[int, Pool] = {2: ranks, 3: three, 4: four}
    first = four.run(saving.trained, setting(4), path, flat)[0]
    for n in (4, 2, 3) if not flat else (4, 2):
        check(on[n].run(saving.resumed, setting(n), path, flat), first, within=0.0 if n == 4 else 1e-10)
    check([saving.resumed(setting(1), path, flat)], first)


@pytest.mark.parametrize(("optimizer", "wrap"), [("soap", "ddp"), ("auto", "ddp"), ("kfac", "fsdp")])
def test_resuming_from_the_state_dict(ranks, optimizer, wrap):
    for first, twin in ranks.run(saving.resumed_from_state_dict, Setting(optimizer, wrap=wrap, steps=3)):
        check([twin], first, within=0.0)


@pytest.mark.parametrize(("optimizer", "wrap"), [("soap", "fsdp"), ("auto", "ddp"), ("adamw", "fsdp")])
def test_training_goes_on_while_it_is_saved(ranks, tmp_path, optimizer, wrap):
    for first, twin in ranks.run(saving.meanwhile, Setting(optimizer, wrap=wrap, steps=3), str(tmp_path / "saved")):
        check([twin], first, within=0.0)


@pytest.mark.parametrize(
    ("optimizer", "wrap", "offload"),
    [("soap", "fsdp", True), ("auto", "fsdp", False), ("kfac", "ddp", True), ("adamw", "fsdp", True)],
)
def test_what_rank_0_has_read_is_sent_to_all(ranks, optimizer, wrap, offload):
    for first, twin in ranks.run(saving.from_rank_0, Setting(optimizer, wrap=wrap, steps=3), offload):
        check([twin], first, within=0.0)


@pytest.mark.parametrize("consolidated", [True, False])
def test_a_rank_that_asks_for_state_alone_gets_it_or_an_error_soon(ranks, consolidated):
    found = ranks.run(saving.by_one_alone, Setting("soap", PARTS[2], wrap="ddp"), consolidated)
    expected = (
        "the same" if consolidated else "state_dict: 1 of 2 ranks called it within 0.5 s. Ranks keep the state of what they own"
    )
    assert expected in found[0]
    assert found[1] == "nothing asked"


@pytest.mark.parametrize("recipe", ["soap", "shampoo", "muon", "whitening"])
def test_all_ranks_are_told_what_one_process_would_keep_of_layers_alike(ranks, recipe):
    alone = saving.of_layers_alike(recipe)
    for found in ranks.run(saving.of_layers_alike, recipe):
        assert found["state"].keys() == alone["state"].keys()
        for name, t in alone["state"].items():
            torch.testing.assert_close(found["state"][name], t, rtol=1e-6, atol=1e-9)
