"""Which examples go into a prompt: those whose images are most like the query's (RICES), or any.

RICES is retrieval-based in-context example selection (Flamingo, section A.2.1 of its appendix; Yang et al. 2021): the
cosine similarity of features of a frozen image encoder. Selections are nested: the 4 shots of a query are among its 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def normalised(features: Float[np.ndarray, "I E"]) -> Float[np.ndarray, "I E"]:
    """Of length 1 each, so that products are cosines; a feature of length 0 stays."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def most_similar(
    queries: Float[np.ndarray, "Q E"],
    support: Float[np.ndarray, "S E"],
    count: int,
    left_out: Sequence[int | None],
) -> list[Int[np.ndarray, " k"]]:
    """Numbers of the `count` nearest in `support`, the nearest first, both sides normalised.

    Of equally similar ones the first in `support` comes first. `left_out` is, for each query, the support image that it
    may not get: itself.
    """
    similarity = queries @ support.T
    for row, number in enumerate(left_out):
        if number is not None:
            similarity[row, number] = -np.inf
    return [_largest(row, count) for row in similarity]


def _largest(values: Float[np.ndarray, " S"], count: int) -> Int[np.ndarray, " k"]:
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= least)  # in their order: ties are cut at the end
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def random_examples(seed: int, query: str, num_support: int, count: int, left_out: int | None) -> Int[np.ndarray, " k"]:
    """`count` different numbers below `num_support`, the same for the same seed and key of the query on any host.

    A smaller `count` gives the first of them. Raises `ValueError` when there are not so many.
    """
    if num_support - (left_out is not None) < count:
        raise ValueError(f"{num_support} examples to choose {count} from")
    rng = np.random.default_rng([seed, hashed(query)])
    taken: dict[int, None] = {}
    while len(taken) < count:
        number = int(rng.integers(num_support))
        if number != left_out:
            taken[number] = None
    return np.array(list(taken), np.int64)


def hashed(*parts: object) -> int:
    """63 bits that are the same for equal `parts` on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()) >> 1
