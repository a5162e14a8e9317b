"""Images with what is known of them, read by their number for evaluation: from shards, or from a TFDS dataset.

A sample of a shard is an image and a `.json` with an object of fields (`0007.jpg`, `0007.json`). An example of a TFDS
dataset is its image, and as fields all that JSON can hold. Evaluation decides what is reported, so what cannot be used
raises `DataError` instead of being skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from data_pipelines.images import RELEASE_RULES, ImageRules, decode_image
from data_pipelines.index import SampleIndex, scan_shard
from data_pipelines.kinds import SampleError, decode_json
from data_pipelines.samples import image_part, read_part
from data_pipelines.shards import ShardReader, expand_shards
from emu2_jax.errors import DataError

TFDS = "tfds:"
#: Samples whose `.json` is fetched together, where shards lie behind URLs.
_TOGETHER = 256

_TFDS_NAME = re.compile(r"tfds:(?P<dataset>[^@#]+)@(?P<split>[^#]+)(#(?P<image>.+))?")


class AnnotatedImages(Protocol):
    """Images, by their numbers from 0 on."""

    @property
    def keys(self) -> Sequence[str]:
        """Of the samples, as the dataset has them."""
        ...

    @property
    def places(self) -> Sequence[str]:
        """Where they are: the same for the same image, whatever else is read with it."""
        ...

    def fields(self) -> Iterator[Mapping[str, Any]]:
        """What is known of each image, in their order."""
        ...

    def pixels(self, number: int) -> UInt8[np.ndarray, "S S 3"]:
        """One image."""
        ...


def open_annotated(data: str, image_size: int, config_path: str, images: ImageRules = RELEASE_RULES) -> AnnotatedImages:
    """The images of shards (a pattern), or of `tfds:DATASET@SPLIT` (`#FEATURE` where it has several images).

    `config_path` is the setting that `data` comes from, for messages.
    """
    if not data.startswith(TFDS):
        return ShardImages(expand_shards(data, config_path), image_size, images)
    named = _TFDS_NAME.fullmatch(data)
    if named is None:
        raise DataError(f"{config_path}: got {data!r}; wanted tfds:DATASET@SPLIT, such as tfds:coco_captions@val")
    return TfdsImages(named["dataset"], named["split"], named["image"], image_size, images)


class ShardImages:
    """Of shards, in their order."""

    def __init__(self, paths: Sequence[str], image_size: int, images: ImageRules) -> None:
        # What is read of a .json is up to the caller: any name makes it the text of the pair.
        self._indexes = [scan_shard(path, "image_text", None, "json.any", contents=False) for path in paths]
        for index in self._indexes:
            if index.bad:
                raise DataError(f"{index.bad[0]}; wanted an image and a .json for each sample")
        self._readers = [ShardReader(index.paths) for index in self._indexes]
        self._numbers = [(shard, i) for shard, index in enumerate(self._indexes) for i in range(len(index))]
        self._image_size, self._images = image_size, images
        self.keys = [self._indexes[shard].key(i) for shard, i in self._numbers]
        self.places = [f"{paths[shard]}#{key}" for (shard, _), key in zip(self._numbers, self.keys, strict=True)]

    def __len__(self) -> int:
        return len(self._numbers)

    def fields(self) -> Iterator[Mapping[str, Any]]:
        """What is in the `.json` of each sample."""
        for index, reader in zip(self._indexes, self._readers, strict=True):
            for start in range(0, len(index), _TOGETHER):
                samples = range(start, min(start + _TOGETHER, len(index)))
                parts = [int(index.starts[sample]) for sample in samples]
                near = reader.gather([(0, int(index.offsets[part]), int(index.sizes[part])) for part in parts])
                for sample, part in zip(samples, parts, strict=True):
                    try:
                        yield decode_json(read_part(near, index, sample, part))
                    except SampleError as error:
                        raise _unusable(index, sample, part, error) from error

    def encoded(self, number: int) -> bytes:
        """One image as it is stored. Raises `DataError` that names shard, sample and byte."""
        index, sample, part = self._image(number)
        try:
            return read_part(self._readers[self._numbers[number][0]], index, sample, part)
        except SampleError as error:
            raise _unusable(index, sample, part, error) from error

    def pixels(self, number: int) -> UInt8[np.ndarray, "S S 3"]:
        """One image. Raises `DataError` that names shard, sample and byte."""
        try:
            return decode_image(self.encoded(number), self._image_size, self._images)
        except SampleError as error:
            raise _unusable(*self._image(number), error) from error

    def _image(self, number: int) -> tuple[SampleIndex, int, int]:
        shard, sample = self._numbers[number]
        index = self._indexes[shard]
        return index, sample, image_part(index, sample)


def _unusable(index: SampleIndex, sample: int, part: int, error: SampleError) -> DataError:
    return DataError(str(index.bad_sample(sample, part, error)))


class TfdsImages:
    """Of a split of a prepared TFDS dataset."""

    def __init__(self, dataset: str, split: str, image: str | None, image_size: int, images: ImageRules) -> None:
        from data_pipelines.corpora.tfds import Examples  # takes seconds to import

        self._examples = Examples(dataset, split, image)
        self._name = f"{TFDS}{dataset}@{split}"
        self._image_size, self._images = image_size, images
        self.keys = [f"{i:08d}" for i in range(len(self._examples))]
        self.places = [f"{self._name}#{key}" for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def fields(self) -> Iterator[Mapping[str, Any]]:
        """All that JSON can hold of each example."""
        return (self._examples.fields(i) for i in range(len(self)))

    def pixels(self, number: int) -> UInt8[np.ndarray, "S S 3"]:
        """One image. Raises `DataError` that names the example."""
        try:
            return decode_image(self._examples.image(number), self._image_size, self._images)
        except SampleError as error:
            raise DataError(f"{self._name}, example {number}: {error}") from error
