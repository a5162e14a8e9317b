"""Episodes: answers are right, held-out things stay out of training, and only the context says the answer."""

from __future__ import annotations

import collections
import json
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.corpora.openmoji import OpenMojiSettings, build
from data_pipelines.corpora.openmoji_drawings import GROUPS
from data_pipelines.corpora.openmoji_in_context import (
    NUM_NAMES,
    NUM_WRONG,
    TASKS,
    Episode,
    Episodes,
    Notation,
    Split,
    Task,
    notation_is_held_out,
    random_name,
    random_notation,
    random_training_episode,
)
from data_pipelines.corpora.openmoji_splits import HeldOutRules, split_emoji
from data_pipelines.episodes import read_episodes
from emu2_jax.errors import DataError

SEEN, UNSEEN = split_emoji(tuple(GROUPS), None, 0.1, 0)
RULES = HeldOutRules(0, 0.1, 0.1)


def episodes(split: Split) -> Episodes:
    return Episodes(SEEN if split == "train" else UNSEEN, SEEN, 64, split, RULES)


def draw(task: Task, split: Split, num: int = 40, examples: int = 8) -> list[Episode]:
    rng = random.Random(f"{task}/{split}")
    return [episodes(split).draw(task, examples, rng) for _ in range(num)]


def emoji_of(episode: Episode) -> set[str]:
    return {thing.emoji.name for one in episode.all_examples for shown in one.pictures for thing in shown.scene.objects}


def test_held_out_names_are_eight_of_which_the_query_asks_for_any() -> None:
    asked = collections.Counter()
    for episode in draw("names", "heldout", 400):
        named = {one.pictures[0].scene.objects[0].emoji.name: one.text for one in episode.examples}
        assert len(named) == len(set(named.values())) == NUM_NAMES
        emoji = episode.query.pictures[0].scene.objects[0].emoji.name
        assert named[emoji] == episode.query.text
        asked[list(named).index(emoji)] += 1
    assert sorted(asked) == list(range(NUM_NAMES))
    assert max(asked.values()) < 90  # 50 expected at each place


def test_a_picture_of_the_query_is_never_one_of_the_examples() -> None:
    same = sum(
        np.array_equal(one.pictures[0].draw(), episode.query.pictures[0].draw())
        for episode in draw("names", "heldout")
        for one in episode.examples
    )
    assert same == 0


def test_training_names_come_back_and_are_drawn_anew_for_each_document() -> None:
    drawn = draw("names", "train", 60, examples=15)
    for episode in drawn:
        names: dict[str, str] = {}
        for one in episode.all_examples:
            emoji = one.pictures[0].scene.objects[0].emoji.name
            assert names.setdefault(emoji, one.text) == one.text
        assert 2 <= len(names) <= NUM_NAMES
    assert len({episode.query.text for episode in drawn}) > 0.9 * len(drawn)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_things_are_not_in_training(task: Task) -> None:
    unseen = {one.name for one in UNSEEN}
    training, held_out = draw(task, "train"), draw(task, "heldout")
    assert not any(emoji_of(episode) & unseen for episode in training)
    assert not any(
        RULES.holds_out_any([shown.scene])
        for episode in training
        for one in episode.all_examples
        for shown in one.pictures
    )
    if task in ("names", "counting", "patterns", "settings"):
        assert all(emoji_of(episode) <= unseen for episode in held_out)
    if task == "marks":
        assert all(
            RULES.holds_out_pair(*(thing.emoji for thing in one.pictures[0].scene.objects))
            for episode in held_out
            for one in episode.all_examples
        )


def test_held_out_names_and_notations_share_nothing_with_those_of_training() -> None:
    rng = random.Random(0)
    assert not {random_name(rng, "train") for _ in range(3000)} & {random_name(rng, "heldout") for _ in range(3000)}
    assert not {random_notation(rng, "train") for _ in range(2000)} & {
        random_notation(rng, "heldout") for _ in range(2000)
    }
    apple_and_cat = Notation("[", "].", ": ", ", ", count_first=False)
    assert apple_and_cat.write([("apple", 2), ("cat", 1)]) == "[apple: 2, cat: 1]."
    assert notation_is_held_out(apple_and_cat)
    assert re.fullmatch(apple_and_cat.pattern, "[red apple: 2, cat: 1].")
    assert not re.fullmatch(apple_and_cat.pattern, "[red apple: 2; cat: 1].")
    assert not re.fullmatch(apple_and_cat.pattern, "[2: red apple].")


def test_an_answer_in_formats_is_in_its_notation_and_in_no_other() -> None:
    drawn = draw("formats", "heldout")
    for episode in drawn:
        assert all(re.fullmatch(episode.pattern or "", one.text) for one in episode.all_examples)
    others = [re.fullmatch(drawn[i - 1].pattern or "", episode.query.text) for i, episode in enumerate(drawn)]
    assert sum(other is not None for other in others) < 5


def test_the_answers_are_true() -> None:
    for episode in draw("counting", "heldout"):
        numerals = {one.pictures[0].scene.objects[0].count: one.text for one in episode.all_examples}
        assert all(numerals[one.pictures[0].scene.objects[0].count] == one.text for one in episode.all_examples)
    for episode in draw("marks", "heldout"):
        for one in episode.all_examples:
            (shown,) = one.pictures
            (marked,) = (thing for thing in shown.scene.objects if thing.boxes[0] == shown.mark)
            assert marked.emoji.name == one.text
    for episode in draw("formats", "heldout"):
        for one in episode.all_examples:
            assert all(
                thing.emoji.name in one.text and str(thing.count) in one.text for thing in one.pictures[0].scene.objects
            )


def test_a_mark_is_seen() -> None:
    (episode,) = draw("marks", "heldout", 1)
    (shown,) = episode.query.pictures
    pixels = shown.draw().reshape(-1, 3)
    assert (pixels == (255, 0, 255)).all(1).sum() > 30


@pytest.mark.parametrize("task", ["patterns", "settings"])
def test_the_wrong_pictures_are_all_wrong_and_differ(task: Task) -> None:
    for episode in draw(task, "heldout"):
        pictures = [shown.draw().tobytes() for shown in (episode.query.pictures[-1], *episode.wrong)]
        assert len(set(pictures)) == 1 + NUM_WRONG


def test_a_pattern_goes_on() -> None:
    for episode in draw("patterns", "heldout"):
        row = [one.pictures[0].draw().tobytes() for one in episode.all_examples]
        period = len(set(row))
        assert period in (2, 4)
        assert all(row[i] == row[i % period] for i in range(len(row)))


def test_training_episodes_are_of_all_the_other_tasks() -> None:
    rng = random.Random(0)
    assert {random_training_episode(episodes("train"), rng).task for _ in range(100)} == {*TASKS} - {"names"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in_context") / "corpus"
    none = dict.fromkeys(("num_interleaved", "num_videos", "num_storyboards", "num_grounded", "num_unseen"), 0)
    settings = OpenMojiSettings(
        num_pairs=60, num_named=20, num_text=20, num_heldout_scenes=0, num_names=10, num_episodes=20, num_questions=12,
        vocab_size=512, **none,
    )  # fmt: skip
    build(path, settings, processes=1, progress=lambda what, done, total: None)
    return path


def test_what_was_drawn_is_what_is_read(corpus: Path) -> None:
    found = read_episodes(f"{corpus}/heldout/questions-*.tar", 64, per_task=2)
    assert [one.task for one in found] == [*TASKS, *TASKS]
    names = found[0]
    assert len(names.examples) == NUM_NAMES
    assert all(len(one.images) == 1 and one.text for one in (*names.examples, names.query))
    assert names.query.images[0].shape == (64, 64, 3)
    settings = found[5]
    assert len(settings.query.images) == 3
    assert len(settings.wrong) == NUM_WRONG
    assert settings.query.text == ""
    assert [one.key for one in read_episodes(f"{corpus}/heldout/questions-*.tar", 64, per_task=1)] == [
        one.key for one in found[:6]
    ]


def test_named_pictures_say_the_name_and_nothing_else(corpus: Path) -> None:
    with tarfile.open(corpus / "train" / "named-000000.tar") as shard:
        texts = [shard.extractfile(one).read().decode() for one in shard if one.name.endswith(".txt")]  # type: ignore[union-attr]
    assert texts == [one.name for one in SEEN[:20]]


def test_names_have_shards_of_their_own(corpus: Path) -> None:
    def tasks(kind: str) -> list[str]:
        with tarfile.open(corpus / "train" / f"{kind}-000000.tar") as shard:
            return [json.load(shard.extractfile(one))["task"] for one in shard if one.name.endswith(".json")]  # type: ignore[arg-type]

    assert tasks("names") == ["names"] * 10
    assert len(tasks("episodes")) == 20 and "names" not in tasks("episodes")


def test_pairs_are_no_episodes(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"pairs-000000\.tar: pairs-00000000: no episode: .*'task'"):
        read_episodes(f"{corpus}/train/pairs-*.tar", 64, per_task=1)
