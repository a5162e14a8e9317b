"""`python -m benchmarks.packing`: padding and empty image slots that planned rows leave, and what planning costs.

Streams of lengths alone, drawn from a fixed seed: captions (a mean of 25 tokens and one image), interleaved documents
(cut at 1024 positions, 1 to 8 images), and half of each; an image takes 68 positions with all its special tokens. Whole
epochs are counted, with the ends of the blocks in which they are planned. `floor_empty_slots` is what no packer can go
below: the stream has so many images in so many positions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipelines.planning import RowLimits, RowPlan

#: 64 visual ones, [IMG] and [/IMG], <s> and </s>. For a document of several images that is a little too much.
IMAGE_POSITIONS = 68


class Stream(NamedTuple):
    """Positions and images of documents."""

    lengths: np.ndarray
    images: np.ndarray


def captions(rng: np.random.Generator, count: int) -> Stream:
    """Image-text pairs."""
    tokens = np.exp(rng.normal(2.95, 0.72, count)).round().clip(3, 300).astype(np.int64)
    return Stream(IMAGE_POSITIONS + tokens, np.ones(count, np.int64))


def documents(rng: np.random.Generator, count: int) -> Stream:
    """Interleaved documents, as MMC4's."""
    images = (rng.poisson(2.2, count) + 1).clip(1, 8)
    tokens = np.exp(rng.normal(5.9, 0.9, count)).round().clip(20, 4000).astype(np.int64)
    return Stream(np.minimum(IMAGE_POSITIONS * images + tokens, 1024), images)


def mixed(rng: np.random.Generator, count: int) -> Stream:
    """Half captions, half documents."""
    one, other = captions(rng, count), documents(rng, count)
    is_caption = rng.random(count) < 0.5
    return Stream(*(np.where(is_caption, a, b) for a, b in zip(one, other, strict=True)))


CASES: dict[str, tuple[Callable[[np.random.Generator, int], Stream], int]] = {
    "packing-mixed-12": (mixed, 12),
    "packing-mixed-14": (mixed, 14),
    "packing-captions-23": (captions, 23),
    "packing-documents-12": (documents, 12),
}


def measure(name: str, count: int, pool: int, length: int) -> dict[str, float | str]:
    """Plans a whole epoch of one case."""
    make, slots = CASES[name]
    stream = make(np.random.default_rng(7), count)
    limits = RowLimits(length, slots, pool)
    plan = RowPlan(name, 0, count, lambda samples, _: (stream.lengths[samples], stream.images[samples]), limits)
    began = time.process_time()
    located = (plan.locate(number) for number in itertools.count())
    rows = [row.samples for row in itertools.takewhile(lambda row: row.epoch == 0, located)]
    seconds = time.process_time() - began
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(count)), "every sample is in one row"
    positions, images = int(stream.lengths.sum()), int(stream.images.sum())
    fewest_rows = max(math.ceil(positions / length), math.ceil(images / slots))
    return {
        "case": name,
        "padding": round(1 - positions / (len(rows) * length), 5),
        "empty_slots": round(1 - images / (len(rows) * slots), 5),
        "floor_empty_slots": round(1 - images / (fewest_rows * slots), 5),
        "us_per_sample": round(1e6 * seconds / count, 2),
    }


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--pool", type=int, default=256, help="data.packing_pool")
    parser.add_argument("--length", type=int, default=2048, help="data.row_length")
    arguments = parser.parse_args()
    for name in CASES:
        print(json.dumps(measure(name, arguments.samples, arguments.pool, arguments.length)), flush=True)


if __name__ == "__main__":
    main()
