"""Held-out image-text pairs, read whole and in order for evaluation."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from data_pipelines.images import RELEASE_RULES, ImageRules, decode_image
from data_pipelines.index import SampleIndex, scan_shard
from data_pipelines.kinds import SampleError
from data_pipelines.samples import image_part, read_part, read_text
from data_pipelines.shards import ShardReader, expand_shards
from emu2_jax.errors import DataError


def read_pairs(
    pattern: str,
    image_size: int,
    num: int,
    config_path: str = "evaluation.scenes",
    images: ImageRules = RELEASE_RULES,
) -> list[tuple[str, UInt8[np.ndarray, "S S 3"], str]]:
    """Key, image and caption of the first `num` image-text pairs of the shards, in their order; fewer if there are.

    Held-out pairs decide what is reported, so a bad one raises `DataError` instead of being skipped.
    """
    pairs: list[tuple[str, np.ndarray, str]] = []
    for path in expand_shards(pattern, config_path):
        if len(pairs) >= num:
            break
        index = scan_shard(path, "image_text", tokenizer=None)
        if index.bad:
            raise DataError(str(index.bad[0]))
        reader = ShardReader(index.paths)
        for sample in range(min(len(index), num - len(pairs))):
            pairs.append(_read_pair(index, reader, sample, image_size, images))
        reader.close()
    return pairs


def _read_pair(
    index: SampleIndex, reader: ShardReader, sample: int, image_size: int, images: ImageRules
) -> tuple[str, np.ndarray, str]:
    part = int(index.starts[sample])
    try:
        caption = read_text(reader, index, sample, part)
        part = image_part(index, sample)
        image = decode_image(read_part(reader, index, sample, part), image_size, images)
    except SampleError as error:
        raise DataError(str(index.bad_sample(sample, part, error))) from error
    return index.key(sample), image, caption
