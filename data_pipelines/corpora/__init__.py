"""Corpora: the embedded one, and those of the paper, each in a file that says how it is distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from data_pipelines.kinds import Kind

#: The kinds by name.
KINDS: Mapping[str, Kind] = {kind: kind for kind in get_args(Kind)}

#: The sources there are, and the kind that their shards are of (`KIND` in the module of that name).
SOURCES: Mapping[str, Kind] = {
    "img2dataset": "image_text",
    "video2dataset": "video_text",
    "grit": "grounded",
    "mmc4": "interleaved",
    "obelics": "interleaved",
    "storyboard": "interleaved",
    "text": "text",
    "tfds": "image_text",
}
