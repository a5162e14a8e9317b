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


def permutation(seed: int, size: int) -> Int64[np.ndarray, " size"]:
    """The numbers 0 ... size - 1 in an order drawn from `seed`."""
    return np.argsort(_hash(seed, np.arange(size)), kind="stable")


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
