"""Any TFDS dataset that offers a data source: image-text pairs, or texts alone, of the features that are named.

How it is distributed: a directory that `tensorflow_datasets` prepared with files that can be read at random
(`builder.download_and_prepare(file_format="array_record")`), `DATASET/1.0.0/` with `dataset_info.json`, `features.json`
and `*.array_record-*`. It is read through `tfds.builder(...).as_data_source`, which needs no TensorFlow.

What it becomes: shards of kind `image_text` (or `text`, without an image), for training and for evaluation alike.
Images are the bytes that TFDS stored, not decoded. A text is a feature ("caption", "captions/text") or a sentence with
features in it ("a photo of a {label}"); class labels stand for their names. An example with several texts becomes a
sample for each. The `.json` of a sample has every feature that JSON can hold, so that an evaluation finds questions
and answers there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.corpora.converted import new_corpus
from data_pipelines.corpora.downloaded import image_suffix
from data_pipelines.kinds import Kind
from emu2_jax.errors import DataError

KIND: Kind = "image_text"

_FIELD = re.compile(r"\{([^{}]+)\}")
_MAX_JSON_VALUES = 1000  # a longer array is no annotation


def convert(
    dataset: str,
    out_dir: Path,
    *,
    split: str,
    text: str,
    image: str | None,
    data_dir: Path | None = None,
    samples_per_shard: int = 1000,
) -> Counter[str]:
    """Writes a split of a prepared TFDS dataset into shards in the new directory `out_dir`.

    `dataset` is a name ("coco_captions", "vqa/v2:1.0.0") or the directory of a prepared version; `split` may be a slice
    ("train[:10%]"). Returns how many samples were written and what was left out, by cause. Raises `DataError` when
    the dataset, the split or a feature is not there, or the dataset was prepared in another file format.
    """
    builder = _builder(dataset, data_dir)
    features = builder.info.features
    texts = {name: _find(features, name, dataset) for name in _FIELD.findall(text) or [text]}
    picture = None if image is None else _find(features, image, dataset)
    if picture is not None and (picture.repeated or not isinstance(picture.feature, tfds.features.Image)):
        raise DataError(f"{dataset}: feature {image!r} is no image; its features: {', '.join(sorted(features))}")
    decoders = None if picture is None else picture.nested(tfds.decode.SkipDecoding())
    source = _data_source(builder, split, decoders, dataset)
    settings = {"dataset": dataset, "version": str(builder.version), "split": split, "text": text, "image": image}
    with new_corpus(out_dir, "tfds", samples_per_shard, settings) as corpus:
        for i in range(len(source)):
            example = source[i]
            captions = _captions(text, {name: found.texts(example) for name, found in texts.items()})
            captions = [caption for caption in captions if caption.strip()]
            corpus.counts["missing_text"] += not captions
            with_image: dict[str, bytes] = {}
            if picture is not None:
                data = bytes(picture.value(example))
                with_image = {image_suffix(data): data, "json": json.dumps(_plain(features, example)).encode()}
            for caption in captions:
                corpus.write({**with_image, "txt": caption.encode()})
    return corpus.counts


class Examples:
    """A split of a prepared dataset as it is, for evaluation: the image of an example, and its other features.

    Raises `DataError` as `convert`. `image` may be left out where there is one image feature.
    """

    def __init__(self, dataset: str, split: str, image: str | None = None, data_dir: Path | None = None) -> None:
        builder = _builder(dataset, data_dir)
        self._features = builder.info.features
        images = [name for name, one in self._features.items() if isinstance(one, tfds.features.Image)]
        if image is None and len(images) != 1:
            raise DataError(
                f"{dataset}: has {len(images)} image features ({', '.join(images)}); name one: ...@SPLIT#FEATURE"
            )
        self._image = _find(self._features, image or images[0], dataset)
        self._source = _data_source(builder, split, self._image.nested(tfds.decode.SkipDecoding()), dataset)

    def __len__(self) -> int:
        return len(self._source)

    def image(self, number: int) -> bytes:
        """The bytes that were stored."""
        return bytes(self._image.value(self._source[number]))

    def fields(self, number: int) -> dict[str, Any]:
        """What JSON can hold of an example."""
        fields: dict[str, Any] = _plain(self._features, self._source[number])
        return fields


def _builder(dataset: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    try:
        if Path(dataset).is_dir():
            return tfds.builder_from_directory(dataset)
        return tfds.builder(dataset, **({} if data_dir is None else {"data_dir": str(data_dir)}))
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{dataset}: is no TFDS dataset, nor the directory of a prepared version: {reason}") from error


def _data_source(builder: tfds.core.DatasetBuilder, split: str, decoders: Any, dataset: str) -> Any:
    splits = builder.info.splits
    if not splits:
        raise DataError(
            f"{dataset}: is not prepared in {builder.data_dir}; run tfds.builder({dataset!r})"
            '.download_and_prepare(file_format="array_record"), or give --data_dir'
        )
    if re.split(r"[\[+]", split)[0] not in splits:
        raise DataError(f"{dataset}: has no split {split!r}; its splits: {', '.join(sorted(splits))}")
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (NotImplementedError, ValueError) as error:
        raise DataError(
            f"{dataset}: offers no data source ({str(error).splitlines()[0]}); prepare it with "
            'file_format="array_record"'
        ) from error


@dataclass(frozen=True)
class _Found:
    """A feature and the names that lead to it: "captions/text" is `text` within `captions`."""

    names: tuple[str, ...]
    feature: Any
    repeated: bool  # it lies in a sequence, or is one

    def nested(self, value: Any) -> Any:
        """`value` in dictionaries of the names."""
        for name in reversed(self.names):
            value = {name: value}
        return value

    def value(self, example: Any) -> Any:
        """What an example has there."""
        for name in self.names:
            example = example[name]
        return example

    def texts(self, example: Any) -> list[str]:
        """The text of the feature in an example, or all of them."""
        value = self.value(example)
        values = value if isinstance(value, list | np.ndarray) else [value]
        return [_word(self.feature, one) for one in np.asarray(values, object).ravel()]


def _find(features: Any, path: str, dataset: str) -> _Found:
    found = _search(features, path)
    if found is None or isinstance(found.feature, tfds.features.FeaturesDict):
        raise DataError(f"{dataset}: has no feature {path!r}; its features: {', '.join(sorted(features))}")
    return found


def _search(feature: Any, path: str) -> _Found | None:
    """The feature at a path, which may go through sequences. A name may hold a slash itself: "image/filename"."""
    if isinstance(feature, tfds.features.Sequence):
        found = _search(feature.feature, path)
        return None if found is None else dataclasses.replace(found, repeated=True)
    if not path:
        return _Found((), feature, repeated=False)
    if isinstance(feature, tfds.features.FeaturesDict):
        for name in feature:
            if path == name or path.startswith(f"{name}/"):
                found = _search(feature[name], path[len(name) + 1 :])
                if found is not None:
                    return dataclasses.replace(found, names=(name, *found.names))
    return None


def _word(feature: Any, value: Any) -> str:
    plain = _plain_value(feature, value)
    return plain if isinstance(plain, str) else str(plain)


def _captions(text: str, values: Mapping[str, list[str]]) -> list[str]:
    """One caption for each value of the features in the sentence; features with several values go side by side."""
    template = text if _FIELD.search(text) else f"{{{text}}}"
    return [
        _filled(template, {name: words[i % len(words)] for name, words in values.items()})
        for i in range(max(map(len, values.values())))
        if all(i < len(words) or len(words) == 1 for words in values.values())
    ]


def _filled(template: str, words: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda match: words[match[1]], template)


def _plain(feature: Any, value: Any) -> Any:
    """A feature's value as JSON has it; what JSON cannot hold (images, long arrays) is left out."""
    if isinstance(feature, tfds.features.FeaturesDict):
        plain = {name: _plain(feature[name], inner) for name, inner in value.items() if name in feature}
        return {name: inner for name, inner in plain.items() if inner is not None}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(value, Mapping):
            return _plain(feature.feature, value)
        return [_plain(feature.feature, one) for one in value] if len(value) <= _MAX_JSON_VALUES else None
    return _plain_value(feature, value)


def _plain_value(feature: Any, value: Any) -> Any:
    if isinstance(feature, tfds.features.Image | tfds.features.Video | tfds.features.Audio):
        return None
    if isinstance(value, list | np.ndarray):
        array = np.asarray(value, object)
        return [_plain_value(feature, one) for one in array.tolist()] if array.size <= _MAX_JSON_VALUES else None
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
