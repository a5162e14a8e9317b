"""Held-out episodes (examples and a query), read whole and in order for evaluation.

Layout of a sample: `0.png`, `1.png`, ... the pictures in their order; `wrong-0.png`, ... pictures that are not the
answer where one is asked for; and `json`, here without what is of those (`num_wrong`) and of formats (`pattern`):

    {"task": "names", "examples": [{"pictures": [0], "text": "wiwa"}, ...], "query": {"pictures": [8], "text": "lumi"}}

An example's text is the answer to its pictures; without a text its last picture is.
"""

from __future__ import annotations

import collections
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_pipelines.images import RELEASE_RULES, ImageRules, decode_image
from data_pipelines.shards import expand_shards
from emu2_jax.errors import DataError

Image = UInt8[np.ndarray, "S S 3"]


@dataclass(frozen=True)
class Example:
    """Pictures and the answer to them: `text`, or without one the last picture."""

    images: tuple[Image, ...]
    text: str


@dataclass(frozen=True)
class Episode:
    """Examples of one task, and the query whose answer is asked for."""

    key: str
    task: str
    examples: tuple[Example, ...]
    query: Example
    wrong: tuple[Image, ...]  # pictures that are not the answer, where a picture is asked for
    pattern: str | None  # regular expression of answers in the right notation, of formats


def read_episodes(
    pattern: str,
    image_size: int,
    per_task: int,
    config_path: str = "evaluation.in_context",
    images: ImageRules = RELEASE_RULES,
) -> list[Episode]:
    """The first `per_task` episodes of each task in the shards, in their order.

    Held-out episodes decide what is reported, so a bad one raises `DataError` instead of being skipped.
    """
    taken: collections.Counter[str] = collections.Counter()
    episodes = []
    for path in expand_shards(pattern, config_path):
        for key, parts in _samples(path):
            try:
                facts = json.loads(parts["json"])
                task = facts["task"]
                if taken[task] < per_task:
                    episodes.append(_episode(key, facts, parts, image_size, images))
            except (LookupError, TypeError, ValueError, DataError) as error:
                raise DataError(f"{path}: {key}: no episode: {type(error).__name__} {error}") from error
            taken[task] += 1
    return episodes


def _samples(path: str) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Key and parts (by suffix) of each sample of a shard."""
    try:
        with tarfile.open(path) as shard:
            files = ((member.name, shard.extractfile(member)) for member in shard if member.isfile())
            for key, group in itertools.groupby(files, key=lambda named: named[0].partition(".")[0]):
                yield key, {name[len(key) + 1 :]: file.read() for name, file in group if file is not None}
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: {error}") from error


def _episode(
    key: str, facts: Mapping[str, Any], parts: Mapping[str, bytes], image_size: int, rules: ImageRules
) -> Episode:
    def example(fields: Mapping[str, Any]) -> Example:
        pictures = (decode_image(parts[f"{number}.png"], image_size, rules) for number in fields["pictures"])
        return Example(tuple(pictures), str(fields["text"]))

    wrong = (decode_image(parts[f"wrong-{i}.png"], image_size, rules) for i in range(facts.get("num_wrong", 0)))
    examples = tuple(map(example, facts["examples"]))
    return Episode(key, str(facts["task"]), examples, example(facts["query"]), tuple(wrong), facts.get("pattern"))
