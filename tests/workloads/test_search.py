"""Searches spend their budget, can be replayed, and find what there is to find."""

import itertools
import math
from collections.abc import Callable

import pytest

from precond.lab.workloads import LogUniform, Search, Trial
from precond.lab.workloads.search import best

SPACE = LogUniform(1e-4, 10.0)


def valley(_: int, lr: float) -> Trial:
    """Lowest at 0.02; diverges above 1."""
    return Trial(lr, math.nan if lr > 1 else math.log10(lr / 0.02) ** 2)


@pytest.mark.parametrize("trials", [1, 2, 5, 8, 9, 20])
def test_budget_range_and_order(trials: int) -> None:
    seen: list[tuple[int, float]] = []

    def tried(number: int, lr: float) -> Trial:
        seen.append((number, lr))
        return valley(number, lr)

    found = Search(trials, seed=3).run(SPACE, tried)
    assert [number for number, _ in seen] == list(range(trials))
    assert [trial.lr for trial in found] == [lr for _, lr in seen]
    assert all(SPACE.low <= trial.lr <= SPACE.high for trial in found)
    assert len({trial.lr for trial in found}) == trials
    # The same losses, the same search, although the sampler draws.
    again = Search(trials, seed=3).run(SPACE, valley)
    assert repr(again) == repr(found)


def test_few_trials_are_the_middles_of_equal_parts_whatever_they_find() -> None:
    for tried in (valley, lambda number, lr: Trial(lr, math.nan)):
        rates = [trial.lr for trial in Search(5).run(SPACE, tried)]
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


def steps(_: int, lr: float) -> Trial:
    """The fewest at 0.02, the lowest loss elsewhere; losses count far from it, where nothing is reached."""
    far = math.log10(lr / 0.02) ** 2
    return Trial(lr, 1 + far, round(100 + 100 * far)) if far < 2 else Trial(lr, 0.5)


@pytest.mark.parametrize("tried", [valley, steps])
def test_what_comes_after_the_even_ones_is_drawn_where_trials_were_good(tried: Callable[[int, float], Trial]) -> None:
    later = [trial.lr for trial in Search(32, seed=0).run(SPACE, tried)][24:]
    assert sum(0.002 < lr < 0.2 for lr in later) >= 6  # two of five decades
    other = [trial.lr for trial in Search(32, seed=1).run(SPACE, valley)][24:]
    assert later != other


def test_the_best_is_the_lowest_that_is_finite() -> None:
    assert best((Trial(0.1, math.nan), Trial(0.2, 3.0), Trial(0.3, 2.0), Trial(0.4, math.inf))) == 0.3
    assert best((Trial(0.3, math.nan), Trial(0.2, math.nan))) == 0.2


def test_the_best_reaches_the_goal_in_the_fewest_steps() -> None:
    slow, fast, lower = Trial(0.1, 0.1, 40), Trial(0.2, 0.3, 20), Trial(0.3, 0.2, 20)
    never, none = Trial(0.4, 0.05), Trial(0.5, math.nan, 0)
    for trials in itertools.permutations((slow, fast, lower, never, none)):
        assert best(trials) == 0.3
    assert best((slow, never, none)) == 0.1
    assert best((never, none, Trial(0.6, 0.04))) == 0.6
    assert best((slow, Trial(0.7, 9.0, 0))) == 0.7  # it began there


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0.1), (0.1, 0.1), (0.1, math.inf), (math.nan, 1)])
def test_ranges_that_are_none(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="need 0 < lowest < highest"):
        LogUniform(*bounds)


def test_a_search_of_nothing() -> None:
    with pytest.raises(ValueError, match="trials must be at least 1"):
        Search(0)


@pytest.mark.parametrize(("best_at", "more"), [(1e-6, [1e-5, 1e-6]), (3e3, [100.0, 1000.0]), (1.0, []), (20.0, [100.0])])
def test_a_search_goes_on_beyond_an_end_while_the_best_lies_there(best_at: float, more: list[float]) -> None:
    def tried(_: int, lr: float) -> Trial:
        return Trial(lr, 1 + math.log10(lr / best_at) ** 2)

    space = LogUniform(10**-4.5, 10**1.5)  # six decades and six trials: 1e-4 to 10
    search = Search(6, beyond=2)
    rates = [trial.lr for trial in search.run(space, tried)]
    assert rates == pytest.approx([*(10.0 ** (i - 4) for i in range(6)), *more], rel=1e-3)
    assert len(rates) <= search.most == 8
    nothing = Search(6, beyond=2).run(space, lambda _, lr: Trial(lr, math.nan))
    assert len(nothing) == 6
