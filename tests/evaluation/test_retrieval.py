"""Which examples are chosen: the most similar in their order, or any by the seed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from emu2_jax.evaluation.retrieval import hashed, most_similar, normalised, random_examples


def test_the_nearest_by_angle_come_first_and_ties_in_the_order_of_the_support() -> None:
    support = normalised(np.array([[0, 1], [5, 0.1], [1, 1], [-1, 0], [10, 0.2], [2, 2]]))
    query = normalised(np.array([[3.0, 0]]))
    assert most_similar(query, support, 6, [None])[0].tolist() == [1, 4, 2, 5, 0, 3]
    assert most_similar(query, support, 3, [None])[0].tolist() == [1, 4, 2]  # 2 and 5 tie, at the cut
    assert most_similar(query, support, 3, [4])[0].tolist() == [1, 2, 5]  # never itself


def test_as_sorting_all_similarities() -> None:
    rng = np.random.default_rng(0)
    queries, support = (normalised(rng.normal(size=(count, 5)).round(1)) for count in (20, 200))
    found = most_similar(queries, support, 16, [None] * 20)
    for row, chosen in zip(queries @ support.T, found, strict=True):
        assert chosen.tolist() == sorted(range(200), key=lambda i: (-row[i], i))[:16]


def test_random_examples_are_fixed_by_the_seed_and_the_query() -> None:
    first = random_examples(3, "0007/1", 50, 8, None)
    assert len(set(first.tolist())) == 8
    np.testing.assert_array_equal(first, random_examples(3, "0007/1", 50, 8, None))
    assert (first != random_examples(4, "0007/1", 50, 8, None)).any()
    assert (first != random_examples(3, "0007/2", 50, 8, None)).any()
    np.testing.assert_array_equal(first[:3], random_examples(3, "0007/1", 50, 3, None))  # nested
    assert sorted(random_examples(3, "0007/1", 5, 4, 2).tolist()) == [0, 1, 3, 4]  # all but itself


def test_the_choice_is_that_of_another_process() -> None:
    imported = "from emu2_jax.evaluation.retrieval import hashed, random_examples"
    script = f"{imported}; print(hashed('a', 1), *random_examples(0, 'q', 99, 4, 7))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert [int(number) for number in told] == [hashed("a", 1), *random_examples(0, "q", 99, 4, 7).tolist()]


def test_a_feature_of_length_0_is_like_nothing() -> None:
    assert normalised(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
