"""Searches spend their budget, can be replayed, and find what there is to find."""

import math

import pytest

from precond.workloads import LogUniform, Search, Trial
from precond.workloads.search import best

SPACE = LogUniform(1e-4, 10.0)


def valley(_: int, lr: float) -> float:
    """Lowest at 0.02; diverges above 1."""
    return math.nan if lr > 1 else math.log10(lr / 0.02) ** 2


@pytest.mark.parametrize("trials", [1, 2, 5, 8, 9, 20])
def test_budget_range_and_order(trials: int) -> None:
    seen: list[tuple[int, float]] = []

    def loss(number: int, lr: float) -> float:
        seen.append((number, lr))
        return valley(number, lr)

    found = Search(trials, seed=3).run(SPACE, loss)
    assert [number for number, _ in seen] == list(range(trials))
    assert [trial.lr for trial in found] == [lr for _, lr in seen]
    assert all(SPACE.low <= trial.lr <= SPACE.high for trial in found)
    assert len({trial.lr for trial in found}) == trials
    # The same losses, the same search, although the sampler draws.
    again = Search(trials, seed=3).run(SPACE, valley)
    assert repr(again) == repr(found)


def test_few_trials_are_the_middles_of_equal_parts_whatever_they_find() -> None:
    for loss in (valley, lambda number, lr: math.nan):
        rates = [trial.lr for trial in Search(5).run(SPACE, loss)]
        assert rates == [1e-4 * 10 ** (0.5 + i) for i in range(5)] or rates == pytest.approx(
            [10 ** (-3.5 + i) for i in range(5)], rel=1e-3
        )


def test_a_recommended_learning_rate_comes_first_and_costs_a_trial() -> None:
    space = LogUniform(1e-4, 10.0, recommended=0.012345678)
    assert [trial.lr for trial in Search(1).run(space, valley)] == [0.01235]
    rates = [trial.lr for trial in Search(6).run(space, valley)]
    assert rates == [0.01235, *SPACE.even(5)]
    # Of more than eight, three quarters.
    rates = [trial.lr for trial in Search(12).run(space, valley)]
    assert rates[:9] == [0.01235, *SPACE.even(8)]
    # It may lie beyond the range.
    outside = LogUniform(1e-4, 10.0, recommended=2e-6)
    assert [trial.lr for trial in Search(6).run(outside, valley)] == [2e-6, *SPACE.even(5)]
    with pytest.raises(ValueError, match="recommended learning rate: need a number > 0, got 0"):
        LogUniform(1e-4, 10.0, recommended=0.0)


def test_what_comes_after_the_even_ones_is_drawn_where_losses_were_low() -> None:
    later = [trial.lr for trial in Search(32, seed=0).run(SPACE, valley)][24:]
    assert sum(0.002 < lr < 0.2 for lr in later) >= 6  # two of five decades
    other = [trial.lr for trial in Search(32, seed=1).run(SPACE, valley)][24:]
    assert later != other


def test_the_best_is_the_lowest_that_is_finite() -> None:
    assert best((Trial(0.1, math.nan), Trial(0.2, 3.0), Trial(0.3, 2.0), Trial(0.4, math.inf))) == 0.3
    assert best((Trial(0.3, math.nan), Trial(0.2, math.nan))) == 0.2
    # All but the first are nothing but rounding.
    assert best((Trial(0.3, 2e-6), Trial(0.1, 9e-7), Trial(0.2, 1e-9), Trial(0.4, 0.0))) == 0.1


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0.1), (0.1, 0.1), (0.1, math.inf), (math.nan, 1)])
def test_ranges_that_are_none(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="need 0 < lowest < highest"):
        LogUniform(*bounds)


def test_a_search_of_nothing() -> None:
    with pytest.raises(ValueError, match="trials must be at least 1"):
        Search(0)
