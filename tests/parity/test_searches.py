"""Greedy and beam search on a tiny LLaMA give the ids that the `transformers` of this environment gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is an optional dependency; make test-parity installs it")

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))

import measure_searches
import search_cases


def test_searches_are_those_of_transformers() -> None:
    for search, ours, theirs in zip(
        search_cases.SEARCHES, search_cases.ours("transformers"), measure_searches.theirs(), strict=True
    ):
        assert ours == theirs, search
