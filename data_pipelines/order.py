"""Which sample, which order, which source: every draw is a function of the seed and of a number, never of a state.

All draws are hashes of (seed, names, number), so that they are the same on every host, for any number of threads, and
from one release of numpy to the next.
"""

from __future__ import annotations

import fractions
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, UInt64

#: Longest period of a schedule; weights that need a longer one are rounded to this many parts.
_MAX_PERIOD = 1 << 16

_ROUNDS = 8  # even, so that the halves end where they began
_SORTED = 4096  # orders up to this size come from sorting hashes


def stream_seed(seed: int, *names: str | int) -> int:
    """A 64-bit seed for the stream of draws called `names`; neighbouring seeds or epochs give unrelated streams."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _hash(seed: int, numbers: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64 of each number. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014."""
    z = np.atleast_1d(numbers).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, numbers: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """A draw from [0, 1) for each number."""
    return (_hash(seed, numbers) >> np.uint64(11)) * 2.0**-53


def shuffled(seed: int, size: int, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The numbers that stand at `places` of an order of 0 ... size - 1 drawn from `seed`.

    A large order is that of a Feistel network with hashes as its rounds, which permutes the numbers of b bits; what
    comes out at or above `size` goes through again, until it does not. So any part of the order of an epoch is known
    without the rest. Source: Black, Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    if size <= _SORTED:
        return np.argsort(_hash(seed, np.arange(size)), kind="stable")[places]
    bits = int(size - 1).bit_length()
    found = np.asarray(places, np.int64).copy()
    left = np.arange(len(found))  # still to be drawn
    while len(left):
        found[left] = _feistel(seed, bits, found[left])
        left = left[found[left] >= size]
    return found


def _feistel(seed: int, bits: int, numbers: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    widths = bits // 2, bits - bits // 2  # of the high and the low half; they change places in every round
    high, low = numbers >> widths[1], numbers & ((1 << widths[1]) - 1)
    for i in range(_ROUNDS):
        width = widths[i % 2]
        mixed = _hash(stream_seed(seed, i), low).astype(np.int64) & ((1 << width) - 1)
        high, low = low, high ^ mixed
    return high << widths[1] | low


class EpochOrder:
    """The order of a source's samples in one epoch; a function of the seed, known at any place of it.

    Without a window every sample may stand anywhere. With one, runs of neighbouring samples are put in a random order,
    and samples change places only within windows of that order: what is read in one stretch of time then comes from few
    places of the shards. With runs of 2 and windows of 4, the samples 0 ... 7 may come as 5 2 4 3, 0 7 6 1.
    """

    def __init__(self, seed: int, size: int, window: int | None = None, run: int = 1) -> None:
        self._seed = seed
        self._size = size
        self._window = window
        self._run = run
        # The last, shorter run keeps its place at the end of the order; so it holds other samples in every epoch.
        self._turn = stream_seed(seed, "turn") % size if size else 0

    def samples(self, first: int, last: int) -> Int64[np.ndarray, " n"]:
        """The samples at places first ... last - 1."""
        places = np.arange(first, last)
        if self._window is None:
            return shuffled(self._seed, self._size, places)
        for window in range(first // self._window, -(-last // self._window)):
            start = window * self._window
            inside = slice(max(first, start) - first, min(last, start + self._window) - first)
            length = min(self._window, self._size - start)
            seed = stream_seed(self._seed, "window", window)
            places[inside] = start + shuffled(seed, length, places[inside] - start)
        runs, within = np.divmod(places, self._run)
        whole = self._size // self._run
        moved = np.where(runs < whole, runs, 0)
        runs = np.where(runs < whole, shuffled(stream_seed(self._seed, "runs"), whole, moved) if whole else 0, runs)
        return (runs * self._run + within + self._turn) % self._size


class Schedule:
    """Takes turns among sources by weight: after n turns source i has had less than one turn more or less than n w_i.

    Weights 2 : 1 give the turns 0 1 0, 0 1 0, ... The pattern repeats after `period` turns, so what stands at a turn
    and how many turns its source had before it are found from the turn's number alone.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        quotas = _quotas(weights)
        self.period = sum(quotas)
        turns = np.array(_fair_turns(quotas))
        self._turns = turns
        self._before = np.zeros((self.period + 1, len(quotas)), np.int64)  # turns of each source before turn t
        np.cumsum(turns[:, None] == np.arange(len(quotas)), axis=0, out=self._before[1:])

    def source(self, turn: int) -> int:
        """The source whose turn it is."""
        return int(self._turns[turn % self.period])

    def turns_before(self, turn: int, source: int) -> int:
        """How many of the turns 0 ... turn - 1 belong to `source`."""
        cycles, rest = divmod(turn, self.period)
        return int(cycles * self._before[-1, source] + self._before[rest, source])


def _quotas(weights: Sequence[float]) -> list[int]:
    """Turns of each source in one period, in the proportions of the weights as they are written in decimal."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    quotas = [int(weight * denominator) for weight in exact]
    quotas = [quota // math.gcd(*quotas) for quota in quotas]
    if sum(quotas) > _MAX_PERIOD:
        total = sum(exact)
        quotas = [max(1, round(_MAX_PERIOD * weight / total)) for weight in exact]
    return quotas


def _fair_turns(quotas: Sequence[int]) -> list[int]:
    """One period of turns, earliest deadline first.

    Turn number k of a source with share w may not come before k / w nor after (k + 1) / w; serving the earliest
    deadline keeps every such window. Source: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996.
    """
    period = sum(quotas)
    had = [0] * len(quotas)
    turns: list[int] = []
    for turn in range(period):
        open_windows = [i for i, quota in enumerate(quotas) if had[i] * period < (turn + 1) * quota]
        chosen = min(open_windows, key=lambda i: (-(-(had[i] + 1) * period // quotas[i]), had[i]))
        had[chosen] += 1
        turns.append(chosen)
    return turns
