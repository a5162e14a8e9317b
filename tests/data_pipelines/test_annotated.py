"""Images with their fields, from shards and from TFDS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_tfds import prepare
from tiny_shards import picture

from data_pipelines.annotated import open_annotated
from data_pipelines.images import decode_image
from data_pipelines.shard_writer import ShardWriter
from emu2_jax.errors import DataError

PATH = "evaluation.few_shot.queries"


def write(path: Path, *samples: dict[str, bytes]) -> str:
    with ShardWriter(path) as shard:
        for i, parts in enumerate(samples):
            shard.write(f"{i:04d}", parts)
    return str(path)


def sample(i: int) -> dict[str, bytes]:
    return {"png": picture(i), "txt": b"not read", "json": json.dumps({"question": f"which {i}?"}).encode()}


def test_shards(tmp_path: Path) -> None:
    first = write(tmp_path / "a-0.tar", sample(0), sample(1))
    second = write(tmp_path / "a-1.tar", sample(2))
    images = open_annotated(f"{tmp_path}/a-*.tar", 8, PATH)
    assert list(images.keys) == ["0000", "0001", "0000"]
    assert list(images.places) == [f"{first}#0000", f"{first}#0001", f"{second}#0000"]
    assert list(images.fields()) == [{"question": f"which {i}?"} for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(images.pixels(i), decode_image(picture(i), 8))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    broken = {**sample(1), "png": b"GIF89a but no more"}
    images = open_annotated(write(tmp_path / "broken.tar", sample(0), broken), 8, PATH)
    images.pixels(0)
    with pytest.raises(DataError, match=r"(damaged|not_an)_image: .*broken\.tar, sample '0001', byte \d+"):
        images.pixels(1)

    without = open_annotated(write(tmp_path / "list.tar", {**sample(0), "json": b"[1]"}), 8, PATH)
    with pytest.raises(DataError, match=r"invalid_json: .*list\.tar, sample '0000'.*wanted an object"):
        list(without.fields())
    with pytest.raises(DataError, match=r"missing_text: .*sample '0000'.*wanted an image and a \.json for each"):
        open_annotated(write(tmp_path / "no.tar", {"png": picture(0)}), 8, PATH)
    with pytest.raises(DataError, match=r"evaluation\.few_shot\.queries: got 'tfds:pets'; wanted tfds:DATASET@SPLIT"):
        open_annotated("tfds:pets", 8, PATH)


def test_tfds(tmp_path: Path) -> None:
    pets = prepare(tmp_path, "array_record")
    images = open_annotated(f"tfds:{pets}@test", 8, PATH)
    assert list(images.keys) == ["00000000", "00000001"]
    fields = list(images.fields())
    assert fields[1]["label"] in ("cat", "dog") and fields[1]["question"] == "which?"
    number = int(fields[1]["image/filename"].removesuffix(".png"))
    np.testing.assert_array_equal(images.pixels(1), decode_image(picture(number), 8))
    with pytest.raises(DataError, match="has no split 'val'"):
        open_annotated(f"tfds:{pets}@val", 8, PATH)
