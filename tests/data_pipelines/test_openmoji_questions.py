"""Questions about OpenMoji scenes: true, and laid out as few-shot evaluation reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny_shards import picture

from data_pipelines.annotated import ShardImages
from data_pipelines.corpora.openmoji_drawings import catalogue
from data_pipelines.corpora.openmoji_questions import convert, questions_about
from data_pipelines.corpora.openmoji_scenes import Background, Scene, SceneObject
from data_pipelines.images import RELEASE_RULES
from data_pipelines.shard_writer import ShardWriter
from emu2_jax.errors import DataError

DOG, CAT = (next(one for one in catalogue("animals") if one.name == name) for name in ("dog", "cat"))
SCENE = Scene(
    64,
    Background("plain", ("red",)),
    (
        SceneObject(DOG, "large", "left", ((0, 16, 32, 48),)),
        SceneObject(CAT, "small", "top right", ((40, 0, 50, 16), (52, 0, 62, 16))),
    ),
)


def test_questions_are_true_and_each_has_ten_answers() -> None:
    facts = questions_about(SCENE, ["cat", "dog", "owl"], random.Random(0))
    assert {one["question"]: one["answers"] for one in facts["questions"]} == {
        "what colour is the background?": ["red"] * 10,
        "how many dogs are there?": ["1"] * 10,
        "how large are the dogs?": ["large"] * 10,
        "how many cats are there?": ["2"] * 10,
        "how large are the cats?": ["small"] * 10,
        "what is on the left?": ["dog"] * 10,
        "what is at the top right?": ["cat"] * 10,
    }
    assert facts["objects"] == [{"expression": "the large dog", "box": [0.0, 0.25, 0.5, 0.75]}]
    assert len(facts["captions"]) == 5 and all("dog" in caption for caption in facts["captions"])
    (present, yes), (absent, no) = ((one["question"], one["label"]) for one in facts["checks"])
    assert present in ("is there a dog?", "is there a cat?") and yes == 1
    assert (absent, no) == ("is there an owl?", 0)


def test_an_emoji_that_is_there_twice_is_not_asked_for() -> None:
    twice = Scene(64, Background("fading", ("red", "blue")), (SCENE.objects[0], SCENE.objects[0]))
    facts = questions_about(twice, ["dog"], random.Random(0))
    assert [one["question"] for one in facts["questions"]] == ["what is on the left?"] * 2
    assert facts["objects"] == [] and len(facts["checks"]) == 1


def test_conversion(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "pairs.tar") as shard:
        for i in range(3):
            shard.write(f"pairs-{i}", {"png": picture(i), "txt": b"x", "json": json.dumps(SCENE.to_json()).encode()})
    counts = convert([str(tmp_path / "pairs.tar")], tmp_path / "out", max_samples=2)
    assert counts["samples"] == 2
    written = ShardImages([str(tmp_path / "out" / "openmoji_questions-000000.tar")], 8, RELEASE_RULES)
    assert [set(fields) for fields in written.fields()] == [{"captions", "questions", "objects", "checks"}] * 2
    assert written.encoded(1) == picture(1)

    with ShardWriter(tmp_path / "other.tar") as shard:
        shard.write("0", {"png": picture(0), "json": b"{}"})
    with pytest.raises(DataError, match=r"other\.tar#0: its \.json holds no scene"):
        convert([str(tmp_path / "other.tar")], tmp_path / "other")
