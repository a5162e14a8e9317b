"""Pictures that were downloaded apart from the documents that name them.

Web corpora of documents (MMC4, OBELICS) are distributed without their pictures, as URLs. What a downloader made of
these is looked up here: directories of files, found by their base name, and img2dataset's shards, found by the `url` in
the `.json` of a sample or by base name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.index import split_name
from data_pipelines.kinds import IMAGE_SUFFIXES, JSON_SUFFIX
from data_pipelines.shards import ShardReader, scan_tar
from emu2_jax.errors import DataError


class _Place(NamedTuple):
    shard: int  # number of the tar; -1 for a file of its own
    offset: int
    size: int
    path: str  # of a file of its own


class DownloadedImages:
    """The pictures in directories and tars, by file name and by URL; the first of a name or URL counts.

    Takes some 200 bytes of memory a picture. Raises `DataError` for a path that is neither.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._by_name: dict[str, _Place] = {}
        self._by_url: dict[str, _Place] = {}
        tars = [str(path) for path in paths if not path.is_dir()]
        self._reader = ShardReader(tars)
        for path in paths:
            if path.is_dir():
                self._add_directory(path)
        for number, tar in enumerate(tars):
            self._add_tar(number, tar)
        if not self._by_name:
            raise DataError(f"--images: no picture in {', '.join(map(str, paths)) or 'nothing'}")

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, *, name: str | None = None, url: str | None = None) -> bytes | None:
        """The picture of that file name or that URL; None when it was not downloaded."""
        place = self._by_name.get(name) if name else None
        if place is None and url:
            place = self._by_url.get(url)
        if place is None:
            return None
        if place.shard < 0:
            return Path(place.path).read_bytes()
        return self._reader.read(place.shard, place.offset, place.size)

    def _add_directory(self, directory: Path) -> None:
        for folder, folders, files in os.walk(directory):
            folders.sort()  # so that the first of a name is the same on every machine
            for file in sorted(files):
                if Path(file).suffix.lower()[1:] in IMAGE_SUFFIXES:
                    self._by_name.setdefault(file, _Place(-1, 0, 0, os.path.join(folder, file)))

    def _add_tar(self, number: int, tar: str) -> None:
        images: dict[str, _Place] = {}
        urls: dict[str, str] = {}
        for member in scan_tar(tar):
            split = split_name(member.name)
            if split is None:
                continue
            key, suffix = split
            if suffix in IMAGE_SUFFIXES:
                place = _Place(number, member.offset, member.size, "")
                images.setdefault(key, place)
                self._by_name.setdefault(member.name.rpartition("/")[2], place)
            elif suffix == JSON_SUFFIX:
                url = _url(self._reader.read(number, member.offset, member.size))
                if url is not None:
                    urls[key] = url
        for key, url in urls.items():
            if key in images:
                self._by_url.setdefault(url, images[key])


def _url(data: bytes) -> str | None:
    try:
        fields = json.loads(data)
    except ValueError:
        return None
    url = fields.get("url") if isinstance(fields, dict) else None
    return url if isinstance(url, str) else None


def image_suffix(data: bytes) -> str:
    """The suffix of a picture's member, by its first bytes; "jpg" for all others, as readers look at the bytes."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"
