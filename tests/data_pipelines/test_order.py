from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.order import Schedule, permutation, stream_seed, uniforms


def test_permutation_holds_every_number_once() -> None:
    assert np.array_equal(np.sort(permutation(7, 1000)), np.arange(1000))
    assert not np.array_equal(permutation(7, 1000), permutation(8, 1000))


def test_draws_are_fixed_for_ever() -> None:
    # A change of these numbers changes what every resumed run reads.
    assert stream_seed(0, "pairs", 1) == 2608680225657610696
    assert permutation(0, 8).tolist() == [0, 3, 5, 7, 6, 2, 1, 4]
    assert uniforms(1, np.arange(2)).tolist() == [0.3381666012719897, 0.5665615751722809]


def test_neighbouring_seeds_and_epochs_are_unrelated() -> None:
    orders = {(s, e): permutation(stream_seed(s, "a", e), 500) for s in range(3) for e in range(3)}
    for one in orders:
        for other in orders:
            if one < other:
                assert np.mean(orders[one] == orders[other]) < 0.02


def test_uniforms_are_uniform() -> None:
    draws = uniforms(stream_seed(0, "x"), np.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(counts - 10_000).max() < 500  # five standard deviations


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ([1.0], [0, 0, 0, 0]),
        ([1.0, 1.0], [0, 1, 0, 1]),
        ([2.0, 1.0], [0, 1, 0, 0, 1, 0]),
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1]),
    ],
)
def test_turns_of_small_schedules(weights: list[float], turns: list[int]) -> None:
    schedule = Schedule(weights)
    assert [schedule.source(t) for t in range(len(turns))] == turns


@pytest.mark.parametrize(
    "weights",
    [[0.6, 0.3, 0.1], [12800, 6400, 3200, 800], [0.5, 0.49, 0.01], [0.34, 0.33, 0.32, 0.01], [1 / 3, 1.0, 0.1]],
)
def test_every_source_gets_its_share_within_one_turn(weights: list[float]) -> None:
    schedule = Schedule(weights)
    shares = np.array(weights) / sum(weights)
    had = np.zeros(len(weights), int)
    for turn in range(3000):
        assert [schedule.turns_before(turn, i) for i in range(len(weights))] == had.tolist()
        assert np.abs(had - turn * shares).max() < 1 + 3000 / 2**16
        had[schedule.source(turn)] += 1
    far = 10**12
    assert sum(schedule.turns_before(far, i) for i in range(len(weights))) == far
