"""Every part, forward and backward, against the implementations of others, in float32."""

from __future__ import annotations

import goldens
import numpy as np
import pytest
from goldens import CASES
from references import LARGER, golden


@pytest.mark.parametrize("name", CASES)
def test_the_package_agrees_with_the_reference(name: str) -> None:
    assert goldens.failures(CASES[name], golden(CASES[name])) == []


@pytest.mark.parametrize("name", LARGER)
def test_it_does_at_the_real_head_widths_and_lengths(name: str) -> None:
    assert goldens.failures(LARGER[name], golden(LARGER[name])) == []


@pytest.mark.parametrize("name", CASES)
def test_the_golden_file_is_what_the_reference_gives(name: str) -> None:
    """Up to rounding, which differs from one processor to the next."""
    case = CASES[name]
    stored, now = goldens.load(case), golden(case)
    for section in ("params", "inputs"):
        old, new = (goldens.flatten(getattr(source, section)) for source in (stored, now))
        assert set(old) == set(new)
        for path, array in old.items():
            np.testing.assert_array_equal(array, new[path], err_msg=path)
    assert max(goldens.forward_differences(stored.forward, now.forward).values()) < 1
    assert max(goldens.gradient_differences(stored.gradients, now.gradients).values()) < goldens.GRADIENT_RTOL
