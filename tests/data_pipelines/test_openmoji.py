"""The OpenMoji corpus: true captions, clean splits, equal bytes, and no half-built corpus."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import webdataset

from data_pipelines.corpora.openmoji import OpenMojiSettings, build, train_tokenizer
from data_pipelines.corpora.openmoji_drawings import GROUPS, Emoji, catalogue
from data_pipelines.corpora.openmoji_scenes import (
    COLOURS,
    CORNERS,
    LAYOUTS,
    POSITIONS,
    Background,
    Box,
    Scene,
    describe,
    describe_background,
    place,
    place_phrase,
    random_scene,
    render,
)
from data_pipelines.corpora.openmoji_splits import HeldOutRules
from data_pipelines.corpora.openmoji_stories import random_story
from data_pipelines.corpora.openmoji_text import counted, joined, plural, prose_paragraphs, prose_passages, with_article
from data_pipelines.grounding import decode_grounded
from data_pipelines.pipeline import open_pipeline
from data_pipelines.video import sample_frames
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.tokenizer import Tokenizer

SETTINGS = OpenMojiSettings(
    num_pairs=240,
    num_interleaved=60,
    num_text=50,
    num_videos=20,
    num_storyboards=15,
    num_grounded=40,
    num_named=10,
    num_two_names=10,
    num_names=20,
    num_episodes=60,
    num_questions=0,
    num_heldout_scenes=60,
    num_unseen=20,
    num_emoji=40,
    samples_per_shard=100,
    vocab_size=600,
)
ALL_EMOJI = [one for group in GROUPS for one in catalogue(group)]
APPLE, DOG = Emoji("1F34E", "red apple"), Emoji("1F415", "dog")


#: The kinds of training shards that show something.
WITH_PICTURES = ("pairs", "interleaved", "videos", "storyboards", "grounded")

RELATION_WORDS = ("above", "over", "below", "under", "left of", "right of")


def quiet(what: str, done: int, total: int) -> None:
    """Reports no progress."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openmoji") / "corpus"
    build(path, SETTINGS, processes=1, progress=quiet)
    return path


def samples(corpus: Path, kind: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and parts of each sample of a kind, read with tarfile alone."""
    for path in sorted(corpus.glob(f"*/{kind}-*.tar")):
        with tarfile.open(path) as shard:
            members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
        for key, names in itertools.groupby(members, key=lambda name: name.split(".")[0]):
            yield key, {name.removeprefix(f"{key}."): members[name] for name in names}


def facts(corpus: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(parts["json"]) for _, parts in samples(corpus, kind)]


def scenes_of(corpus: Path, kind: str) -> list[list[Scene]]:
    return [[Scene.from_json(scene) for scene in fact.get("scenes", [fact])] for fact in facts(corpus, kind)]


def shown(scenes: list[list[Scene]]) -> set[str]:
    return {thing.emoji.name for document in scenes for scene in document for thing in scene.objects}


# Words


@pytest.mark.parametrize(
    ("singular", "many"),
    [
        ("red apple", "red apples"),
        ("fox", "foxes"),
        ("honeybee", "honeybees"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("computer mouse", "computer mice"),
        ("tropical fish", "tropical fish"),
        ("wolf", "wolves"),
        ("ear of corn", "ears of corn"),
        ("cloud with lightning", "clouds with lightning"),
        ("toothbrush", "toothbrushes"),
    ],
)
def test_plural(singular: str, many: str) -> None:
    assert plural(singular) == many


def test_phrases() -> None:
    assert [with_article(noun) for noun in ("owl", "unicorn", "dog", "ewe", "orange background")] == [
        "an owl",
        "a unicorn",
        "a dog",
        "a ewe",
        "an orange background",
    ]
    assert (counted(1, "large owl"), counted(3, "small owl")) == ("a large owl", "three small owls")
    assert (joined(["x"]), joined(["x", "y"]), joined(["x", "y", "z"])) == ("x", "x and y", "x, y and z")


def test_prose_leaves_out_code_and_grammar() -> None:
    page = """The "assert" statement
**********************

Assert statements are a convenient way to insert debugging assertions
into a program, and may be non-
local:

   assert_stmt ::= "assert" expression ["," expression]

Sets
   These represent a mutable set, which is created by the built-in
   constructor of sets.
"""
    assert prose_paragraphs(page) == [
        "Assert statements are a convenient way to insert debugging assertions into a program, and may be non-local:",
        "These represent a mutable set, which is created by the built-in constructor of sets.",
    ]


def test_passages_are_long_enough_and_unique() -> None:
    passages = prose_passages(800)
    assert len(passages) > 100 and len(set(passages)) == len(passages)
    assert np.mean([len(passage) <= 800 for passage in passages]) > 0.98


def test_names_are_unique() -> None:
    assert len({one.name for one in ALL_EMOJI}) == len({one.code for one in ALL_EMOJI}) == len(ALL_EMOJI) > 450


# Scenes


def overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def random_scenes(number: int) -> list[Scene]:
    rng = random.Random(1)
    return [
        random_scene(rng.choices(ALL_EMOJI, k=1 + i % 4), image_size=64, max_count=4, rng=rng) for i in range(number)
    ]


def test_boxes_lie_in_the_picture_and_apart() -> None:
    for scene in random_scenes(300):
        boxes = [box for thing in scene.objects for box in thing.boxes]
        assert all(0 <= left < right <= 64 and 0 <= top < bottom <= 64 for left, top, right, bottom in boxes)
        assert not any(overlap(first, second) for first, second in itertools.combinations(boxes, 2))


def test_large_and_small_are_told_apart() -> None:
    sides: dict[str, set[int]] = {"large": set(), "small": set()}
    for scene in random_scenes(300):
        for thing in scene.objects:
            sides[thing.size] |= {max(right - left, bottom - top) for left, top, right, bottom in thing.boxes}
    assert min(sides["small"]) >= 14 and max(sides["small"]) <= 20
    assert min(sides["large"]) >= 26 and max(sides["large"]) <= 39


def test_groups_stand_where_they_are_said_to() -> None:
    for scene in random_scenes(400):
        for thing in scene.objects:
            x = np.mean([(left + right) / 2 for left, _, right, _ in thing.boxes])
            y = np.mean([(top + bottom) / 2 for _, top, _, bottom in thing.boxes])
            words = thing.position.split()
            assert x < 28 if "left" in words else x > 36 if "right" in words else 22 < x < 42
            assert y < 28 if "top" in words else y > 36 if "bottom" in words else 22 < y < 42


def test_render_draws_in_the_boxes_only() -> None:
    rng = random.Random(0)
    thing = place(APPLE, 1, "large", "top left", ("top left",), 64, rng)
    assert thing is not None
    scene = Scene(64, Background("plain", ("light blue",)), (thing,))
    picture = render(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    left, top, right, bottom = thing.boxes[0]
    drawn = (picture != np.array(COLOURS["light blue"], np.uint8)).any(-1)
    rows, columns = np.nonzero(drawn)
    assert left <= columns.min() <= left + 1 and right - 2 <= columns.max() < right
    assert top <= rows.min() <= top + 1 and bottom - 2 <= rows.max() < bottom
    middle = picture[(top + bottom) // 2, (left + right) // 2].astype(int)
    assert middle[0] > middle[1] + 60 and middle[0] > middle[2] + 60  # a red apple is red


@pytest.mark.parametrize(
    ("pattern", "top_left", "middle_right", "bottom_middle"),
    [
        ("split left and right", "red", "blue", "blue"),
        ("split top and bottom", "red", "blue", "blue"),
        ("fading", "red", None, "blue"),
        ("bordered", "blue", "blue", "blue"),
    ],
)
def test_background_patterns(pattern: Any, top_left: str, middle_right: str | None, bottom_middle: str) -> None:
    picture = render(Scene(64, Background(pattern, ("red", "blue")), ()))
    for (row, column), colour in {(0, 0): top_left, (32, 63): middle_right, (63, 32): bottom_middle}.items():
        if colour is not None:
            assert tuple(picture[row, column]) == COLOURS[colour]
    if pattern == "bordered":
        assert tuple(picture[32, 32]) == COLOURS["red"]


def test_captions_name_everything() -> None:
    rng = random.Random(2)
    for scene in random_scenes(400):
        caption = describe(scene, rng)
        assert describe_background(scene.background) in caption
        assert all(thing.noun_phrase in caption for thing in scene.objects)
        related = len(scene.objects) == 2 and any(f" {word} " in caption for word in RELATION_WORDS)
        assert related or all(place_phrase(thing.position) in caption for thing in scene.objects)


def test_every_wording_of_one_scene() -> None:
    rng = random.Random(3)
    apple = place(APPLE, 1, "large", "top", LAYOUTS[2][1], 64, rng)
    dogs = place(DOG, 3, "small", "bottom", LAYOUTS[2][1], 64, rng)
    assert apple is not None and dogs is not None
    scene = Scene(64, Background("plain", ("orange",)), (apple, dogs))
    wordings = {describe(scene, rng) for _ in range(600)}
    assert "a large red apple at the top and three small dogs at the bottom, on an orange background" in wordings
    assert "on an orange background: at the bottom three small dogs and at the top a large red apple" in wordings
    assert "a picture of three small dogs below a large red apple, on an orange background" in wordings
    assert "an orange background with a large red apple above three small dogs" in wordings
    for wording in wordings:
        if "above" in wording or "over" in wording:
            assert wording.index("apple") < wording.index("dogs")
        if "below" in wording or "under" in wording:
            assert wording.index("dogs") < wording.index("apple")
    assert len(wordings) == 4 * (2 + 4) + 2 * 2  # four frames of listed or related objects, two of them place-first too


@pytest.mark.parametrize("image_size", [48, 50, 97, 224])
def test_other_picture_sizes(image_size: int) -> None:
    rng = random.Random(6)
    for i in range(40):
        scene = random_scene(rng.choices(ALL_EMOJI[:20], k=1 + i % 4), image_size=image_size, max_count=4, rng=rng)
        story = random_story(ALL_EMOJI[:20], image_size=image_size, max_count=4, rng=rng)
        assert render(scene).shape == render(story.scenes[-1]).shape == (image_size, image_size, 3)


def test_place_refuses_what_does_not_fit() -> None:
    assert place(APPLE, 4, "large", "top left", CORNERS, 64, random.Random(0)) is None


def test_scene_survives_json() -> None:
    for scene in random_scenes(20):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


# Stories


def test_stories_change_one_thing_at_a_time() -> None:
    rng = random.Random(4)
    for _ in range(300):
        story = random_story(ALL_EMOJI, image_size=64, max_count=4, rng=rng)
        assert 2 <= len(story.scenes) <= 4
        assert len(story.texts) - len(story.scenes) in (0, 1)
        for before, after in itertools.pairwise(story.scenes):
            changed = {(one.emoji, one.size, one.count, one.position) for one in before.objects} ^ {
                (one.emoji, one.size, one.count, one.position) for one in after.objects
            }
            assert (before.background != after.background) + bool(changed) == 1
            assert len(changed) <= 2


def test_story_events_say_what_changed() -> None:
    rng = random.Random(5)
    moves = turns = 0
    for _ in range(300):
        story = random_story(ALL_EMOJI, image_size=64, max_count=4, rng=rng)
        for text, scene in zip(story.texts[1:], story.scenes[1:], strict=False):
            if " moves to the " in text:
                moves += 1
                name, position = text.split("the ", 1)[1].split(" moves to the ")
                assert any((one.emoji.name, one.position) == (name, position) for one in scene.objects)
            if "background turns " in text:
                turns += 1
                assert text.endswith(f"background turns {scene.background.colours[0]}")
    assert moves > 20 and turns > 20


# The corpus


def test_counts_and_keys(corpus: Path) -> None:
    info = json.loads((corpus / "corpus.json").read_text())
    training = {"pairs": 240, "interleaved": 60, "text": 50, "videos": 20, "storyboards": 15, "grounded": 40}
    training |= {"named": 10, "two_names": 10, "names": 20, "episodes": 60}
    kinds = training | {"scenes": 60, "unseen": 20}
    assert info["samples"] == kinds
    keys = [key for kind in kinds for key, _ in samples(corpus, kind)]
    assert len(keys) == len(set(keys)) == sum(kinds.values())
    assert info["samples_per_shard"]["train/pairs-000002.tar"] == 40
    written = {str(path.relative_to(corpus)) for path in corpus.glob("*/*.tar")}
    assert written == set(info["samples_per_shard"])
    assert "CC BY-SA 4.0" in (corpus / "ATTRIBUTION.txt").read_text()


def test_parts_of_each_kind(corpus: Path) -> None:
    assert all(set(parts) == {"png", "txt", "json"} for _, parts in samples(corpus, "pairs"))
    assert all(set(parts) == {"txt"} for _, parts in samples(corpus, "text"))
    assert all(set(parts) == {"mp4", "txt", "json"} for _, parts in samples(corpus, "videos"))
    assert all(set(parts) == {"png", "txt", "json"} for _, parts in samples(corpus, "grounded"))
    for _, parts in itertools.chain(samples(corpus, "interleaved"), samples(corpus, "storyboards")):
        story = json.loads(parts["json"])
        assert [parts[f"{i}.txt"].decode() for i in range(len(story["texts"]))] == story["texts"]
        assert {part for part in parts if part.endswith("png")} == {f"{i}.png" for i in range(len(story["scenes"]))}


def test_training_holds_nothing_that_is_held_out(corpus: Path) -> None:
    rules = HeldOutRules(SETTINGS.seed, SETTINGS.heldout_pair_share, SETTINGS.heldout_placement_share)
    training = [document for kind in WITH_PICTURES for document in scenes_of(corpus, kind)]
    heldout = scenes_of(corpus, "scenes")
    assert not any(rules.holds_out_any(document) for document in training)
    assert all(rules.holds_out_any(document) for document in heldout)

    # The same, without the rules: what the held-out samples say they are for is in no training picture.
    together = {
        frozenset(pair)
        for document in training
        for pair in itertools.combinations({one.emoji.name for scene in document for one in scene.objects}, 2)
    }
    placed = {
        (one.emoji.name, scene.background.colours[0], one.position)
        for document in training
        for scene in document
        for one in scene.objects
    }
    reasons = [fact["held_out"] for fact in facts(corpus, "scenes")]
    assert set(reasons) == {"pair", "placement"}
    for reason, (scene,) in zip(reasons, heldout, strict=True):
        names = {one.emoji.name for one in scene.objects}
        if reason == "pair":
            assert any(frozenset(pair) not in together for pair in itertools.combinations(names, 2))
        else:
            (one,) = scene.objects
            assert (one.emoji.name, scene.background.colours[0], one.position) not in placed
    assert shown(heldout) <= shown(training)


def test_seen_emoji_occur_alone_and_with_others(corpus: Path) -> None:
    pairs = [scene for (scene,) in scenes_of(corpus, "pairs")]
    alone = {scene.objects[0].emoji.name for scene in pairs if len(scene.objects) == 1}
    with_others = {one.emoji.name for scene in pairs for one in scene.objects if len(scene.objects) > 1}
    seen = set(json.loads((corpus / "corpus.json").read_text())["emoji_seen"])
    assert alone == with_others == seen


def test_unseen_emoji_are_never_in_training(corpus: Path) -> None:
    info = json.loads((corpus / "corpus.json").read_text())
    unseen = set(info["emoji_unseen"])
    assert len(unseen) == 4 and len(info["emoji_seen"]) == 36
    training = [document for kind in (*WITH_PICTURES, "scenes") for document in scenes_of(corpus, kind)]
    assert not unseen & shown(training)
    assert all(unseen & shown([document]) for document in scenes_of(corpus, "unseen"))
    assert unseen <= shown(scenes_of(corpus, "unseen"))


def test_webdataset_reads_the_pairs(corpus: Path) -> None:
    dataset = webdataset.WebDataset(str(corpus / "train/pairs-000000.tar"), shardshuffle=False).decode("rgb8")
    for sample in itertools.islice(dataset, 5):
        scene = Scene.from_json(sample["json"])
        assert sample["txt"] == sample["json"]["caption"]
        np.testing.assert_array_equal(sample["png"], render(scene))


def test_tokenizer_is_of_llamas_kind(corpus: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    assert pieces.GetPieceSize() == 600
    assert [pieces.IdToPiece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert pieces.pad_id() == -1
    text = "two  small dogs,\n12 日本"
    assert pieces.Decode(pieces.Encode(text)) == text
    assert pieces.EncodeAsPieces("12")[-2:] == ["1", "2"]


def test_tokenizer_without_enough_text() -> None:
    with pytest.raises(DataError, match="cannot make 5000 pieces"):
        train_tokenizer(["a small dog"], 5000)


def test_videos_show_what_their_captions_say(corpus: Path) -> None:
    for _, parts in samples(corpus, "videos"):
        fact = json.loads(parts["json"])
        frames = [Scene.from_json(scene) for scene in fact["scenes"]]
        assert parts["txt"].decode() == fact["caption"]
        moving = [frame.objects[-1] for frame in frames]
        start, end = moving[0], moving[-1]
        assert f"moves from the {start.position} to the {end.position}" in fact["caption"]
        assert start.noun_phrase in fact["caption"] and start.boxes != end.boxes
        sizes = {(right - left, bottom - top) for one in moving for left, top, right, bottom in one.boxes}
        assert len(sizes) == 1
        assert all(0 <= edge <= SETTINGS.image_size for one in moving for edge in one.boxes[0])
        for other in frames[0].objects[:-1]:
            assert f"stays {place_phrase(other.position)}" in fact["caption"]
        shown = sample_frames(parts["mp4"], np.full(len(frames), 0.5), SETTINGS.image_size)
        for frame, picture in zip(frames, shown, strict=True):  # lossy, and colours at half resolution
            assert np.abs(picture.astype(int) - render(frame)).mean() < 12


def test_storyboards_say_what_happened_to_it(corpus: Path) -> None:
    events = set()
    for fact in facts(corpus, "storyboards"):
        scenes = [Scene.from_json(scene) for scene in fact["scenes"]]
        assert 5 <= len(scenes) == len(fact["texts"]) <= 8
        for text, before, after in zip(fact["texts"][1:], scenes, scenes[1:], strict=False):
            old, new = before.objects[0], after.objects[0]
            assert old.emoji == new.emoji
            if old.size != new.size:
                assert text == ("it grows" if new.size == "large" else "it shrinks")
            elif old.position != new.position:
                assert text in (f"it goes to the {new.position}", f"now it is {place_phrase(new.position)}")
            else:
                assert text == "it stays where it is" and old == new
            events.add(text.split()[1])
    assert events == {"goes", "it", "grows", "shrinks", "stays"}


def test_grounded_captions_name_every_box(corpus: Path) -> None:
    several = 0
    for _, parts in samples(corpus, "grounded"):
        fact = json.loads(parts["json"])
        grounded = decode_grounded(parts["json"])
        assert grounded.text == parts["txt"].decode() == fact["caption"]
        found = {grounded.text[one.start : one.end]: one.boxes for one in grounded.phrases}
        scene = Scene.from_json(fact)
        size = scene.image_size
        wanted = {one.noun_phrase: {tuple(edge / size for edge in box) for box in one.boxes} for one in scene.objects}
        assert {phrase: set(boxes) for phrase, boxes in found.items()} == wanted
        several += any(one.count > 1 for one in scene.objects)
    assert several > 5


def test_every_kind_becomes_rows(corpus: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(corpus, tmp_path / "corpus")  # indexes are written beside the shards
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    kinds = {"pairs": "image_text", "videos": "video_text", "grounded": "grounded", "text": "text"}
    kinds |= {"interleaved": "interleaved", "storyboards": "interleaved"}
    config = DataConfig(
        sources=tuple(
            SourceConfig(name=name, kind=kind, shards=f"{corpus}/train/{name}-*.tar", video_frames=4)  # type: ignore[arg-type]
            for name, kind in kinds.items()
        ),
        row_length=320,
        image_slots=8,
        global_batch_rows=6,
    )
    pipelines = [open_pipeline(config, visual_tokens=4, image_size=32, tokenizer=tokenizer) for _ in range(2)]
    assert pipelines[0].summary["videos"] == {"shards": 1, "samples": 20}
    words: set[str] = set()
    for step in range(12):
        batch, again = (pipeline.batch(step) for pipeline in pipelines)
        assert not batch.bad
        for name, array in batch.fields.items():
            assert np.array_equal(array, again.fields[name])
        for row, source in enumerate(batch.sources):
            text = tokenizer.decode(batch.fields["tokens"][row].tolist())
            assert ("[VIDEO]" in text) == ("[gIMG]" in text) == (source == "videos")
            assert ("<patch_index_" in text) == (source == "grounded")
            images = int(batch.fields["image_mask"][row].sum())
            assert text.count("[IMG]") == images and batch.fields["is_visual"][row].sum() == 4 * images
            words |= {word for word in ("[VIDEO]", "<grounding>", "</delimiter_of_multi_objects/>") if word in text}
    assert len(words) == 3


def test_processes_do_not_change_a_byte(corpus: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", SETTINGS, processes=2, progress=quiet)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (corpus, tmp_path / "again")
    )
    assert first == second


def test_built_corpus_is_left_alone(corpus: Path) -> None:
    reports = []
    before = (corpus / "corpus.json").stat().st_mtime_ns
    info = build(corpus, SETTINGS, progress=lambda what, done, total: reports.append(what))
    assert info["samples"]["pairs"] == 240
    assert reports == [f"{corpus}: already built"]
    assert (corpus / "corpus.json").stat().st_mtime_ns == before


def test_other_settings_are_named(corpus: Path) -> None:
    other = dataclasses.replace(SETTINGS, num_pairs=241, seed=7)
    with pytest.raises(DataError, match=r"num_pairs \(there 240, wanted 241\), seed \(there 0, wanted 7\)"):
        build(corpus, other, progress=quiet)


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not an OpenMoji corpus"):
        build(tmp_path / "data", SETTINGS, progress=quiet)
    (tmp_path / "data").rename(tmp_path / "other.partial")
    with pytest.raises(DataError, match="no unfinished build"):
        build(tmp_path / "other", SETTINGS, progress=quiet)
    assert (tmp_path / "other.partial" / "thesis.txt").read_text() == "mine"


def test_killed_build_starts_anew(tmp_path: Path) -> None:
    none: dict[str, Any] = {
        "num_videos": 0,
        "num_storyboards": 0,
        "num_grounded": 0,
        "num_names": 0,
        "num_episodes": 0,
        "num_questions": 0,
    }
    few: dict[str, Any] = {"num_pairs": 100, "num_interleaved": 20, "num_heldout_scenes": 4, "num_unseen": 2}
    small = dataclasses.replace(SETTINGS, **none, **few)

    def stop(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "corpus", small, processes=1, progress=stop)
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "corpus.partial" / "train" / "pairs-999999.tar").write_bytes(b"left over")
    build(tmp_path / "corpus", small, processes=1, progress=quiet)
    assert not (tmp_path / "corpus" / "train" / "pairs-999999.tar").exists()
    assert not (tmp_path / "corpus.partial").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("groups", ("animals", "minerals")),
        ("groups", ()),
        ("num_emoji", 5),
        ("num_emoji", 100_000),
        ("num_pairs", -1),
        ("num_videos", -1),
        ("num_questions", 6),
        ("num_text", 1_000_000),
        ("unseen_share", 0.0),
        ("max_objects", 5),
        ("max_count", 0),
        ("image_size", 16),
        ("vocab_size", 10),
    ],
)
def test_impossible_settings(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^openmoji\.{name}: got "):
        dataclasses.replace(SETTINGS, **{name: value})


def test_building_does_not_load_jax() -> None:
    code = "import sys, data_pipelines.corpora.openmoji; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_positions_cover_the_layouts() -> None:
    assert {position for layouts in LAYOUTS.values() for layout in layouts for position in layout} == set(POSITIONS)
