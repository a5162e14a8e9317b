from __future__ import annotations

import collections

import numpy as np
import pytest

from data_pipelines.order import EpochOrder, Schedule, shuffled, stream_seed, uniforms


def _whole(seed: int, size: int) -> np.ndarray:
    return shuffled(seed, size, np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4096, 4097, 70_000])
def test_shuffled_holds_every_number_once(size: int) -> None:
    assert np.array_equal(np.sort(_whole(7, size)), np.arange(size))
    assert size < 4 or not np.array_equal(_whole(7, size), _whole(8, size))
    places = np.array([size - 1, 0, size // 2])
    assert np.array_equal(shuffled(7, size, places), _whole(7, size)[places])


def test_draws_are_fixed_for_ever() -> None:
    # A change of these numbers changes what every resumed run reads.
    assert stream_seed(0, "pairs", 1) == 2608680225657610696
    assert _whole(0, 8).tolist() == [0, 3, 5, 7, 6, 2, 1, 4]
    assert shuffled(0, 10**6, np.arange(5)).tolist() == [682628, 947341, 50167, 379221, 956068]
    assert uniforms(1, np.arange(2)).tolist() == [0.3381666012719897, 0.5665615751722809]


def test_neighbouring_seeds_and_epochs_are_unrelated() -> None:
    orders = {(s, e): _whole(stream_seed(s, "a", e), 500) for s in range(3) for e in range(3)}
    for one in orders:
        for other in orders:
            if one < other:
                assert np.mean(orders[one] == orders[other]) < 0.02


def test_every_order_is_as_likely_as_another() -> None:
    counts = collections.Counter(tuple(_whole(stream_seed(seed, "orders"), 3)) for seed in range(3000))
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5  # chi-squared, 5 degrees, p = 0.001


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "window", "run"), [(1000, 64, 8), (1003, 64, 8), (5, 64, 8), (7, 3, 2), (1, 4, 2)])
def test_windows_hold_every_number_once(size: int, window: int, run: int) -> None:
    order = EpochOrder(3, size, window, run)
    whole = order.samples(0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    pieces = [order.samples(first, min(first + 17, size)) for first in range(0, size, 17)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_a_window_reads_from_few_places() -> None:
    whole = EpochOrder(3, 4096, window=256, run=32).samples(0, 4096)
    runs = [len({int(sample) // 32 for sample in whole[first : first + 256]}) for first in range(0, 4096, 256)]
    assert max(runs) <= 16  # eight runs, each of which may lie across two blocks of 32
    order = [int(sample) // 32 for sample in whole]
    assert len(set(order[:256])) > 4 and order[:256] != sorted(order[:256])
    assert len({int(s) // 32 for s in EpochOrder(3, 4096).samples(0, 256)}) > 100


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
