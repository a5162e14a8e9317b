"""Storyboards (YT-Storyboard-1B): frames of a video, each with what was said until the next one.

How it is laid out: one folder a video, or one tar a video, with a frame and its subtitles under one number,

    VIDEO/0.png  VIDEO/0.txt  VIDEO/1.png  VIDEO/1.txt  ...

where either may be missing (nothing was said, or the frame could not be had). Folders may lie in a directory or in
tars of any number of videos.

What it becomes: shards of kind `interleaved`, one sample a video, slot i with the frame and the text of number i.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.corpora.converted import new_corpus
from data_pipelines.kinds import IMAGE_SUFFIXES, TEXT_SUFFIX, Kind
from data_pipelines.shards import ShardReader, scan_tar
from emu2_jax.errors import DataError

KIND: Kind = "interleaved"


def convert(inputs: Sequence[Path], out_dir: Path, *, samples_per_shard: int = 1000) -> Counter[str]:
    """Writes the videos in directories and tars into shards in the new directory `out_dir`.

    Returns how many videos and frames were written and what was left out, by cause. Raises `DataError` for what is
    neither a directory nor a tar.
    """
    settings = {"inputs": [str(path) for path in inputs]}
    with new_corpus(out_dir, "storyboard", samples_per_shard, settings) as corpus:
        for path in inputs:
            for video, members in _videos(path, corpus.counts):
                parts = dict(sorted(members.items(), key=lambda item: _place(item[0])))
                corpus.counts["frames"] += sum(not name.endswith(TEXT_SUFFIX) for name in parts)
                corpus.write({**parts, "json": json.dumps({"input": path.name, "video": video}).encode()})
    return corpus.counts


def _place(name: str) -> tuple[int, bool]:
    number, _, suffix = name.partition(".")
    return int(number), suffix != TEXT_SUFFIX


def _videos(path: Path, counts: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and members ("0.png") of each video."""
    if path.is_dir():
        yield from _videos_of_directory(path, counts)
    elif path.suffix == ".tar":
        yield from _videos_of_tar(path, counts)
    else:
        raise DataError(f"{path}: wanted a directory or a .tar of numbered frames and texts")


def _videos_of_directory(directory: Path, counts: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for folder, folders, files in os.walk(directory):
        folders.sort()
        names = [name for name in files if _is_part(name, counts)]
        if names:
            members = {_member(name): (Path(folder) / name).read_bytes() for name in sorted(names)}
            yield os.path.relpath(folder, directory.parent), members


def _videos_of_tar(path: Path, counts: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    groups: dict[str, dict[str, tuple[int, int]]] = {}  # in order of appearance
    for member in scan_tar(str(path)):
        folder, _, name = member.name.rpartition("/")
        if _is_part(name, counts):
            groups.setdefault(folder or path.stem, {})[_member(name)] = (member.offset, member.size)
    reader = ShardReader([str(path)])
    for video, places in groups.items():
        yield video, {name: reader.read(0, offset, size) for name, (offset, size) in places.items()}
    reader.close()


def _is_part(name: str, counts: Counter[str]) -> bool:
    number, _, suffix = name.lower().partition(".")
    is_part = number.isdecimal() and number.isascii() and (suffix == TEXT_SUFFIX or suffix in IMAGE_SUFFIXES)
    counts["other_file"] += not is_part
    return is_part


def _member(name: str) -> str:
    number, _, suffix = name.lower().partition(".")
    return f"{int(number)}.{suffix}"
