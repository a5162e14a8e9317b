"""TFDS datasets with a data source, prepared here: images and texts by name, for training and for evaluation."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_shards import picture

from data_pipelines.corpora.tfds import convert
from data_pipelines.corpora.validate import validate
from data_pipelines.pairs import read_pairs
from emu2_jax.errors import DataError


class Pets(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Five pictures with a label, two captions and a question."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
                "image/filename": tfds.features.Text(),
                "question": tfds.features.Text(),
                "answers": tfds.features.Sequence(tfds.features.Text()),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for i in range(count):
            captions = [{"text": f"pet {i}", "id": i}, {"text": f"animal {i}", "id": -i}]
            example = {
                "image": io.BytesIO(picture(i)),
                "image/filename": f"{i}.png",
                "label": i % 2,
                "question": "which?",
                "answers": ["a", "b"][: i % 3],
            }
            yield i, {**example, "captions": captions}


def prepare(directory: Path, file_format: str) -> str:
    builder = Pets(data_dir=directory, file_format=file_format)
    builder.download_and_prepare()
    return str(builder.data_dir)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare(tmp_path_factory.mktemp("tfds"), "array_record")


def members(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as shard:
            found |= {one.name: shard.extractfile(one).read() for one in shard}  # type: ignore[union-attr]
    return found


def test_images_and_a_sentence_with_a_label(pets: str, tmp_path: Path) -> None:
    counts = convert(pets, tmp_path / "out", split="train", image="image", text="a photo of a {label}")
    assert counts == {"samples": 5, "missing_text": 0}
    found = members(tmp_path / "out")
    pairs = read_pairs(str(tmp_path / "out" / "*.tar"), 8, 99)  # as an evaluation reads them
    greys = [int(image[0, 0, 0]) for _, image, _ in pairs]
    assert sorted(greys) == [0, 1, 2, 3, 4]
    assert [caption for _, _, caption in pairs] == [f"a photo of a {('cat', 'dog')[grey % 2]}" for grey in greys]
    annotations = json.loads(found["000000000.json"])
    grey = greys[0]
    assert annotations == {
        "label": ("cat", "dog")[grey % 2],
        "captions": {"text": [f"pet {grey}", f"animal {grey}"], "id": [grey, -grey]},
        "question": "which?",
        "image/filename": f"{grey}.png",
        "answers": ["a", "b"][: grey % 3],
    }
    assert validate([str(path) for path in (tmp_path / "out").glob("*.tar")], "tfds").samples == 5


def test_one_sample_for_each_of_several_texts(pets: str, tmp_path: Path) -> None:
    counts = convert(pets, tmp_path / "out", split="test", image="image", text="captions/text")
    assert counts["samples"] == 4
    pairs = read_pairs(str(tmp_path / "out" / "*.tar"), 8, 99)
    assert sorted((caption, int(image[0, 0, 0])) for _, image, caption in pairs) == [
        ("animal 0", 0),
        ("animal 1", 1),
        ("pet 0", 0),
        ("pet 1", 1),
    ]


def test_names_with_slashes(pets: str, tmp_path: Path) -> None:
    convert(pets, tmp_path / "out", split="test", image="image", text="{image/filename}: {label} {captions/id}")
    texts = {data for name, data in members(tmp_path / "out").items() if name.endswith(".txt")}
    assert texts == {b"0.png: cat 0", b"1.png: dog 1", b"1.png: dog -1"}


def test_texts_alone_and_examples_without_one(pets: str, tmp_path: Path) -> None:
    counts = convert(pets, tmp_path / "out", split="train[:3]", image=None, text="Question: {question} {answers}")
    found = members(tmp_path / "out")
    assert {name.partition(".")[2] for name in found} == {"txt"}
    assert counts["samples"] == len(found) and counts["missing_text"] + counts["samples"] >= 3
    assert all(text in (b"Question: which? a", b"Question: which? b") for text in found.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text": "caption"},
            "has no feature 'caption'; its features: answers, captions, image, image/filename, label, question",
        ),
        ({"text": "a {breed}"}, "has no feature 'breed'"),
        ({"image": "picture"}, "has no feature 'picture'"),
        ({"image": "label"}, "feature 'label' is no image"),
        ({"text": "captions"}, "has no feature 'captions'"),
        ({"text": "label/name"}, "has no feature 'label/name'"),
        ({"split": "validation"}, "has no split 'validation'; its splits: test, train"),
    ],
)
def test_what_is_not_there_is_named(pets: str, tmp_path: Path, settings: dict[str, str], message: str) -> None:
    arguments: dict[str, Any] = {"split": "train", "image": "image", "text": "label", **settings}
    with pytest.raises(DataError, match=message):
        convert(pets, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_datasets_without_a_data_source(pets: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no_such_dataset: is no TFDS dataset"):
        convert("no_such_dataset", tmp_path / "out", split="train", image=None, text="text", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"^mnist: is not prepared in .*download_and_prepare"):
        convert("mnist", tmp_path / "out", split="train", image="image", text="label", data_dir=tmp_path)
    other = Path(shutil.copytree(pets, tmp_path / "1.0.0")) / "dataset_info.json"
    other.write_text(other.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"1\.0\.0: offers no data source .*array_record"):
        convert(str(tmp_path / "1.0.0"), tmp_path / "out", split="train", image="image", text="label")


def test_tensorflow_is_not_needed(pets: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from data_pipelines.corpora.tfds import convert; "
        f"convert({pets!r}, Path({str(tmp_path / 'out')!r}), split='train', image='image', text='label'); "
        "sys.exit('tensorflow' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pictures_are_the_bytes_that_were_stored(pets: str, tmp_path: Path) -> None:
    convert(pets, tmp_path / "out", split="train", image="image", text="label")
    images = {data for name, data in members(tmp_path / "out").items() if name.endswith(".png")}
    stored = tfds.builder_from_directory(pets).as_data_source(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert images == {bytes(stored[i]["image"]) for i in range(5)} and picture(0)[:4] == min(images)[:4]
