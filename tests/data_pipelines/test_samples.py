from __future__ import annotations

import pytest

from data_pipelines.index import BadSample
from data_pipelines.kinds import decode_text
from data_pipelines.samples import SampleCounts
from emu2_jax.errors import DataError


def test_text_loses_white_space_at_its_ends_only() -> None:
    assert decode_text(b" a  cat\n") == "a  cat"


_BAD = BadSample("damaged_image", "a.tar", "7", 512, "truncated")


def test_few_bad_samples_pass_and_many_stop() -> None:
    counts = SampleCounts()
    counts.add(40, [_BAD] * 5)
    counts.check(0.01, _BAD, "data")  # judged as 5 of 500
    counts.add(10, [_BAD])
    with pytest.raises(DataError, match=r"6 of 50 samples are bad \(damaged_image 6\).*a\.tar, sample '7', byte 512"):
        counts.check(0.01, _BAD, "data")
    counts.seen = 600
    counts.check(0.01, _BAD, "data")
    with pytest.raises(DataError, match="max_bad_share = 0 allows"):
        counts.check(0.0, _BAD, "data")


def test_counts_survive_a_checkpoint() -> None:
    counts = SampleCounts()
    counts.add(9, [_BAD])
    assert counts.to_dict() == {"seen": 9, "damaged_image": 1}
    assert SampleCounts.from_dict(counts.to_dict()) == counts
