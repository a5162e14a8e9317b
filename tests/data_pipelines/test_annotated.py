"""Images with their fields, from shards and from TFDS."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_tfds import prepare
from tiny_shards import picture

from data_pipelines.annotated import open_annotated
from data_pipelines.images import decode_image
from data_pipelines.shard_writer import ShardWriter
from emu2_jax.config import FewShotConfig
from emu2_jax.errors import DataError
from emu2_jax.evaluation.few_shot_tasks import resolve

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


class Refs(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Objects, each with a box and an expression for it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        thing = {"bbox": tfds.features.BBoxFeature(), "refexp": {"raw": tfds.features.Text(), "id": np.int64}}
        features = {"image": tfds.features.Image(encoding_format="png"), "objects": tfds.features.Sequence(thing)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"test": self._generate_examples()}

    def _generate_examples(self) -> Any:
        boxes = [tfds.features.BBox(0.25, 0.0, 0.75, 0.5), tfds.features.BBox(0.0, 0.5, 0.5, 1.0)]
        said = ["the left one", "it"]
        objects = [
            {"bbox": box, "refexp": {"raw": text, "id": i}}
            for i, (box, text) in enumerate(zip(boxes, said, strict=True))
        ]
        yield 0, {"image": io.BytesIO(picture(0)), "objects": objects}


def test_nested_features_are_read_as_a_task_wants_them(tmp_path: Path) -> None:
    builder = Refs(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    images = open_annotated(f"tfds:{builder.data_dir}@test", 8, PATH)
    settings = FewShotConfig(task="refcoco", items="objects", question="refexp.raw", answer="bbox", box_form="yxyx")
    (fields,) = images.fields()
    asked = list(resolve(settings).questions("0", 0, fields, "tfds"))
    assert [(one.values["question"], one.truth) for one in asked] == [
        ("the left one", [0.0, 0.25, 0.5, 0.75]),
        ("it", [0.5, 0.0, 1.0, 0.5]),
    ]


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
