from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipelines.planning import START, Anchor, RowLimits, RowPlan, SampleOrder

_LIMITS = RowLimits(length=100, image_slots=6, pool=32)


def _sizes(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.integers(1, 4, count)
    return 10 * images + rng.integers(1, 30, count), images


def _plan(count: int, block_samples: int = 100, **settings: object) -> RowPlan:
    lengths, images = _sizes(count)
    return RowPlan(  # type: ignore[misc]
        "a",
        0,
        count,
        lambda samples, seed: (lengths[samples], images[samples]),
        _LIMITS,
        block_samples=block_samples,
        **settings,
    )


def _rows(plan: RowPlan, first: int, last: int) -> list[tuple[int, int, list[int]]]:
    located = [plan.locate(row) for row in range(first, last)]
    return [(row.epoch, row.order_seed, row.samples.tolist()) for row in located]


@pytest.mark.parametrize("settings", [{}, {"shuffle_window": 64, "shuffle_run": 8}])
def test_epochs_hold_every_sample_once_in_rows_that_fit(settings: dict[str, int]) -> None:
    plan, (lengths, images) = _plan(1037, **settings), _sizes(1037)
    rows = _rows(plan, 0, 1100)
    for epoch in (0, 1):
        of_epoch = [samples for row_epoch, _, samples in rows if row_epoch == epoch]
        assert sorted(itertools.chain.from_iterable(of_epoch)) == list(range(1037))
        assert all(lengths[row].sum() <= 100 and images[row].sum() <= 6 for row in of_epoch)
    assert len({(epoch, seed) for epoch, seed, _ in rows}) == len({epoch for epoch, _, _ in rows}) >= 3
    assert [samples for epoch, _, samples in rows if epoch == 0][:3] != [s for e, _, s in rows if e == 1][:3]


def test_any_row_can_be_found_from_the_anchor_before_it() -> None:
    whole = _plan(500)
    rows = _rows(whole, 0, 700)
    for row in (0, 1, 33, 150, 299, 460):
        anchor = whole.anchor(row)
        assert anchor.first_row <= row < anchor.first_row + 70
        assert _rows(_plan(500, anchor=anchor), row, row + 200) == rows[row : row + 200]
    with pytest.raises(ValueError, match=r"source 'a': row 3 lies before row \d+, where it resumed"):
        _plan(500, anchor=whole.anchor(299)).locate(3)


def test_an_anchor_plans_no_more_than_its_block() -> None:
    measured: list[int] = []
    lengths, images = _sizes(10_000)

    def measure(samples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        measured.append(len(samples))
        return lengths[samples], images[samples]

    plan = RowPlan("a", 0, 10_000, measure, _LIMITS, block_samples=500, anchor=Anchor(7, 12, 123_456))
    assert plan.locate(123_456).epoch == 7
    assert sum(measured) == 500


def test_threads_that_ask_in_any_order_get_the_same_rows() -> None:
    rows = _rows(_plan(500), 0, 400)
    shared = _plan(500)
    order = np.random.default_rng(0).permutation(400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: _rows(shared, row, row + 1)[0], order))
    assert found == [rows[row] for row in order]


def test_a_million_samples_are_in_one_epoch_once() -> None:
    count = 1_000_000
    lengths = np.random.default_rng(0).choice([50, 60, 70], count)  # a row takes one or two
    plan = RowPlan("a", 0, count, lambda s, _: (lengths[s], np.ones_like(s)), RowLimits(120, 2, 4))
    rows: list[np.ndarray] = []
    while (row := plan.locate(len(rows))).epoch == 0:
        rows.append(row.samples)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(count))
    far = RowPlan("a", 0, count, lambda s, _: (lengths[s], np.ones_like(s)), RowLimits(120, 2, 4))
    far.restart(plan.anchor(len(rows) - 1))
    assert np.array_equal(far.locate(len(rows) - 1).samples, rows[-1])


@pytest.mark.parametrize("settings", [{}, {"shuffle_window": 64, "shuffle_run": 8}])
def test_sample_order_goes_through_epochs_and_goes_on_from_anchors(settings: dict[str, int]) -> None:
    order = SampleOrder("a", 0, 5000, **settings)
    numbers = [order.locate(number) for number in range(12_000)]
    for epoch in (0, 1):
        assert sorted(sample for at, sample in numbers if at == epoch) == list(range(5000))
    anchor = order.anchor(7000)
    assert (order.anchor(0), anchor) == (START, Anchor(1, 0, 5000))
    other = SampleOrder("a", 0, 5000, **settings)
    other.restart(anchor)
    assert [other.locate(number) for number in range(7000, 7100)] == numbers[7000:7100]
    other.restart(Anchor(4, 0, 7000))
    assert other.locate(7000)[0] == 4 and other.anchor(12_001) == Anchor(5, 0, 12_000)
