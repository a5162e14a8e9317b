from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny_shards import WORDS, Members, WriteShard, cut_picture, picture
from tiny_videos import STEP, video

from data_pipelines.index import SampleIndex, scan_shard
from data_pipelines.interleave import DocumentRules, measure, order_parts, outline, read_document
from data_pipelines.shards import ShardReader
from emu2_jax.tokenizer import Tokenizer

#: A text of n words takes n positions, an image 2 + 2.
RULES = DocumentRules(visual_tokens=2, image_size=4, max_positions=20, max_images=3, image_first_probability=1.0)
TEXT_FIRST = dataclasses.replace(RULES, image_first_probability=0.0)


def _document(index: SampleIndex, tokenizer: Tokenizer, rules: DocumentRules, sample: int = 0, seed: int = 0) -> str:
    """The document as words: v for a visual position."""
    plan = outline(index, sample, rules, seed)
    document, _ = read_document(index, ShardReader(index.paths), tokenizer, sample, plan, rules)
    assert document is not None and len(document.tokens) == len(document.is_visual)
    placeholders = [tokenizer.image_id, tokenizer.frame_id]
    assert document.is_visual.tolist() == np.isin(document.tokens, placeholders).tolist()
    return tokenizer.decode(document.tokens.tolist()).replace("<image>", "v").replace("[gIMG]", "g")


@pytest.fixture
def story(write_shard: WriteShard, tokenizer: Tokenizer) -> SampleIndex:
    members: Members = [
        ("a.0.txt", b"cat"),
        ("a.0.png", picture(0)),
        ("a.1.txt", b"red dog"),  # its image is missing
        ("a.2.png", picture(2)),  # its text is missing
        ("a.3.txt", b"one two three"),
    ]
    return scan_shard(write_shard("a.tar", members), "interleaved", tokenizer)


def test_order_within_slots(story: SampleIndex, tokenizer: Tokenizer) -> None:
    assert _document(story, tokenizer, TEXT_FIRST) == (
        "<s> cat [IMG] v v [/IMG] red dog [IMG] v v [/IMG] one two three </s>"
    )
    assert _document(story, tokenizer, RULES) == "<s> [IMG] v v [/IMG] cat red dog [IMG] v v [/IMG] one two three </s>"


@pytest.mark.parametrize(
    ("max_positions", "max_images", "words"),
    [
        (16, 3, "<s> cat [IMG] v v [/IMG] red dog [IMG] v v [/IMG] one two three </s>"),
        (15, 3, "<s> cat [IMG] v v [/IMG] red dog [IMG] v v [/IMG] one two three"),
        (14, 3, "<s> cat [IMG] v v [/IMG] red dog [IMG] v v [/IMG] one two"),
        (12, 3, "<s> cat [IMG] v v [/IMG] red dog [IMG] v v [/IMG]"),
        (11, 3, "<s> cat [IMG] v v [/IMG] red dog"),
        (16, 1, "<s> cat [IMG] v v [/IMG] red dog"),
        (7, 3, "<s> cat [IMG] v v [/IMG] red"),
        (5, 3, "<s> cat"),
    ],
)
def test_documents_are_cut_but_never_through_an_image(
    story: SampleIndex, tokenizer: Tokenizer, max_positions: int, max_images: int, words: str
) -> None:
    rules = dataclasses.replace(TEXT_FIRST, max_positions=max_positions, max_images=max_images)
    assert _document(story, tokenizer, rules) == words
    lengths, images = measure(story, np.array([0]), rules, seed=0)
    assert lengths.tolist() == [len(words.split())]
    assert images.tolist() == [words.split().count("[IMG]")]
    assert outline(story, 0, rules, seed=0).is_cut == (max_positions < 16 or max_images < 2)


def test_lengths_from_the_index_are_those_of_the_documents(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for sample in range(60):
        for slot in range(rng.integers(1, 6)):
            if rng.random() < 0.8 or slot == 0:
                members.append((f"{sample}.{slot}.txt", " ".join(rng.choice(WORDS, rng.integers(1, 9))).encode()))
            if rng.random() < 0.8:
                members.append((f"{sample}.{slot}.png", picture(slot)))
    index = scan_shard(write_shard("a.tar", members), "interleaved", tokenizer)
    rules = dataclasses.replace(RULES, image_first_probability=0.5)
    lengths, images = measure(index, np.arange(60), rules, seed=5)
    assert (lengths == 20).any() and (lengths < 20).any()
    reader = ShardReader(index.paths)
    for sample in range(60):
        plan = outline(index, sample, rules, seed=5)
        document, bad = read_document(index, reader, tokenizer, sample, plan, rules)
        assert document is not None and not bad
        assert (len(document.tokens), len(document.images)) == (lengths[sample], images[sample])
        assert (plan.length, plan.num_images) == (lengths[sample], images[sample])


def test_image_first_with_the_set_probability(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = [(f"{i}.{s}", b"cat") for i in range(2000) for s in ("txt", "png")]
    index = scan_shard(write_shard("a.tar", members), "image_text", tokenizer)
    rules = dataclasses.replace(RULES, image_first_probability=0.3)
    orders = [[order_parts(index, i, rules, seed)[0] % 2 for i in range(2000)] for seed in (1, 2, 1)]
    assert abs(np.mean(orders[0]) - 0.3) < 0.05
    assert orders[0] == orders[2] != orders[1]


def test_damaged_image_is_dropped_from_a_story_and_ends_a_pair(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    cut = cut_picture(0)
    story = scan_shard(
        write_shard("a.tar", [("a.0.txt", b"cat"), ("a.0.png", cut), ("a.1.png", picture(1)), ("b.0.png", cut)]),
        "interleaved",
        tokenizer,
    )
    assert _document(story, tokenizer, TEXT_FIRST) == "<s> cat [IMG] v v [/IMG] </s>"
    assert measure(story, np.array([0]), RULES, seed=0)[0].tolist() == [11]  # the plan still has room for it
    reader = ShardReader(story.paths)
    document, bad = read_document(story, reader, tokenizer, 1, outline(story, 1, RULES, 0), RULES)
    assert document is None and [(b.cause, b.key) for b in bad] == [("damaged_image", "b")]
    pair = scan_shard(write_shard("b.tar", [("a.txt", b"cat"), ("a.png", cut)]), "image_text", tokenizer)
    document, bad = read_document(pair, ShardReader(pair.paths), tokenizer, 0, outline(pair, 0, RULES, 0), RULES)
    assert document is None and bad[0].offset == 1024  # header of the image


def test_text_that_changed_since_it_was_indexed(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    index = scan_shard(write_shard("a.tar", [("a.txt", b"red cat")]), "text", tokenizer)
    write_shard("a.tar", [("a.txt", b"redcats")])
    document, bad = read_document(
        index, ShardReader(index.paths), tokenizer, 0, outline(index, 0, RULES, seed=0), RULES
    )
    assert document is None and bad[0].cause == "changed_text"


# --- videos -----------------------------------------------------------------------------------------------------------

VIDEO_RULES = dataclasses.replace(RULES, video_frames=3, max_positions=40)


@pytest.fixture
def clip(write_shard: WriteShard, tokenizer: Tokenizer) -> SampleIndex:
    members = [("a.mp4", video(30)), ("a.txt", b"red cat"), ("a.json", b"{}")]
    return scan_shard(write_shard("clip.tar", members), "video_text", tokenizer)


def test_a_video_is_its_frames_each_wrapped_as_an_image(clip: SampleIndex, tokenizer: Tokenizer) -> None:
    frames = "[VIDEO] [IMG] g g [/IMG] [IMG] g g [/IMG] [IMG] g g [/IMG]"
    assert _document(clip, tokenizer, VIDEO_RULES) == f"<s> {frames} red cat </s>"
    text_first = dataclasses.replace(VIDEO_RULES, image_first_probability=0.0)
    assert _document(clip, tokenizer, text_first) == f"<s> red cat {frames} </s>"
    lengths, images = measure(clip, np.array([0]), VIDEO_RULES, seed=0)
    assert lengths.tolist() == [2 + 1 + 3 * 4 + 2] and images.tolist() == [3]


def test_a_video_goes_in_whole_or_not_at_all(clip: SampleIndex, tokenizer: Tokenizer) -> None:
    text_first = dataclasses.replace(VIDEO_RULES, image_first_probability=0.0)
    for rules in (dataclasses.replace(text_first, max_images=2), dataclasses.replace(text_first, max_positions=15)):
        assert _document(clip, tokenizer, rules) == "<s> red cat"
        lengths, images = measure(clip, np.array([0]), rules, seed=0)
        assert (lengths.tolist(), images.tolist()) == ([3], [0])


def test_frames_are_drawn_anew_for_each_seed_and_are_those_of_the_draw(clip: SampleIndex, tokenizer: Tokenizer) -> None:
    shown = []
    for seed in (1, 2, 1):
        plan = outline(clip, 0, VIDEO_RULES, seed)
        document, bad = read_document(clip, ShardReader(clip.paths), tokenizer, 0, plan, VIDEO_RULES)
        assert document is not None and not bad and len(document.images) == 3
        shown.append([round(float(image.mean()) / STEP) for image in document.images])
    assert shown[0] == shown[2] != shown[1]
    for numbers in shown:
        assert [number // 10 for number in numbers] == [0, 1, 2]  # one from each third


def test_a_bad_video_ends_its_pair(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = [("a.mp4", video(30)[:-300]), ("a.txt", b"cat"), ("b.txt", b"cat"), ("c.mp4", b"x")]
    index = scan_shard(write_shard("a.tar", members), "video_text", tokenizer)
    assert [(one.cause, one.key) for one in index.bad] == [("missing_video", "b"), ("missing_text", "c")]
    plan = outline(index, 0, VIDEO_RULES, 0)
    document, bad = read_document(index, ShardReader(index.paths), tokenizer, 0, plan, VIDEO_RULES)
    assert document is None and [(one.cause, one.key, one.offset) for one in bad] == [("damaged_video", "a", 0)]


# --- grounded pairs, captions in the .json ----------------------------------------------------------------------------


def test_a_grounded_pair(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    fields = {"caption": "red dog and cat", "noun_chunks": [[0, 7, 0, 0, 0.5, 0.5, 1], [12, 15, 0.5, 0.5, 1, 1, 1]]}
    members = [("a.json", json.dumps(fields).encode()), ("a.png", picture(0)), ("a.txt", b"not read")]
    index = scan_shard(write_shard("a.tar", members), "grounded", tokenizer)
    rules = dataclasses.replace(RULES, max_positions=40, phrase_first_probability=1.0)
    phrase = "<phrase> red dog </phrase>"
    boxes = "<object> <patch_index_0000> <patch_index_0000> <patch_index_0112> <patch_index_0112> </object>"
    document = _document(index, tokenizer, rules)
    assert document.startswith(f"<s> [IMG] v v [/IMG] <grounding> {phrase} {boxes} and <phrase> cat </phrase> <object>")
    assert measure(index, np.array([0]), rules, 0)[0].tolist() == [len(document.replace("red dog", "red  dog").split())]
    last = dataclasses.replace(rules, phrase_first_probability=0.0)
    assert f"<grounding> {boxes} {phrase} and" in _document(index, tokenizer, last)


def test_phrases_come_first_with_the_set_probability(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    caption = " ".join(["cat"] * 400)
    chunks = [[4 * i, 4 * i + 3, 0, 0, 1, 1] for i in range(400)]
    members = [("a.json", json.dumps({"caption": caption, "noun_chunks": chunks}).encode()), ("a.png", picture(0))]
    index = scan_shard(write_shard("a.tar", members), "grounded", tokenizer)
    rules = dataclasses.replace(RULES, max_positions=10_000, phrase_first_probability=0.7)
    documents = [_document(index, tokenizer, rules, seed=seed) for seed in (1, 2, 1)]
    assert documents[0] == documents[2] != documents[1]
    assert abs(documents[0].count("</phrase> <object>") - documents[0].count("</object> <phrase>")) < 400
    first = sum(part.strip().startswith("<phrase>") for part in documents[0].split("<object>")[:1])
    assert first in (0, 1)
    units = documents[0].split("<grounding> ")[1].removesuffix(" </s>").split()
    kinds = [word for word in units if word in ("<phrase>", "<object>")]
    share = np.mean([kinds[i] == "<phrase>" for i in range(0, len(kinds), 2)])
    assert abs(share - 0.7) < 0.07


def test_captions_from_a_field_of_the_json(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = [
        ("a.jpg", picture(0)),
        ("a.txt", b"red"),
        ("a.json", b'{"capsfusion": "blue dog", "url": "http://a"}'),
        ("b.jpg", picture(0)),
        ("b.json", b'{"url": "http://b"}'),
    ]
    index = scan_shard(write_shard("a.tar", members), "image_text", tokenizer, caption="json.capsfusion")
    assert [(one.cause, one.key) for one in index.bad] == [("missing_text", "b")]
    assert _document(index, tokenizer, RULES) == "<s> [IMG] v v [/IMG] blue dog </s>"


# --- images of a document ---------------------------------------------------------------------------------------------


def _gallery(write_shard: WriteShard, tokenizer: Tokenizer) -> SampleIndex:
    """Document a: eight slots, of which 1 and 5 have no image; b: texts alone; c: two slots with images."""
    members: list[tuple[str, bytes]] = []
    for slot in range(8):
        members.append((f"a.{slot}.txt", WORDS[slot].encode()))
        if slot not in (1, 5):
            members.append((f"a.{slot}.png", picture(slot)))
    members += [("b.0.txt", b"cat"), ("b.1.txt", b"dog")]
    members += [
        (f"c.{slot}.{suffix}", data) for slot in (0, 1) for suffix, data in (("txt", b"on"), ("png", picture(9)))
    ]
    return scan_shard(write_shard("gallery.tar", members), "interleaved", tokenizer)


def test_sampled_images_bring_their_sentences_and_nothing_else(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    index = _gallery(write_shard, tokenizer)
    rules = dataclasses.replace(TEXT_FIRST, images_per_document=3, max_positions=100, max_images=9)
    drawn = set()
    for seed in range(20):
        words = _document(index, tokenizer, rules, seed=seed).replace("[IMG] v v [/IMG]", "v").split()[1:-1]
        assert words[1::2] == ["v"] * 3
        slots = [WORDS.index(word) for word in words[0::2]]
        assert slots == sorted(slots) and not {1, 5} & set(slots)
        drawn.add(tuple(slots))
    assert len(drawn) > 10
    assert {slot for slots in drawn for slot in slots} == {0, 2, 3, 4, 6, 7}
    assert _document(index, tokenizer, rules, sample=1) == "<s> cat dog </s>"
    assert _document(index, tokenizer, rules, sample=2) == "<s> on [IMG] v v [/IMG] on [IMG] v v [/IMG] </s>"


def test_lengths_of_sampled_documents_come_from_the_index(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for sample in range(60):
        for slot in rng.permutation(rng.integers(1, 12)):
            if rng.random() < 0.8 or slot == 0:
                members.append((f"{sample}.{slot}.txt", " ".join(rng.choice(WORDS, rng.integers(1, 9))).encode()))
            if rng.random() < 0.6:
                members.append((f"{sample}.{slot}.png", b""))
    index = scan_shard(write_shard("a.tar", members), "interleaved", tokenizer)
    assert (index.num_images == 0).any() and (index.num_images > 7).any()
    samples = rng.permutation(len(index))
    for count, limit in [(1, 400), (3, 400), (7, 400), (99, 400), (3, 20)]:
        rules = dataclasses.replace(TEXT_FIRST, images_per_document=count, max_positions=limit, max_images=99)
        lengths, images = measure(index, samples, rules, seed=3)
        plans = [outline(index, int(sample), rules, seed=3) for sample in samples]
        assert lengths.tolist() == [plan.length for plan in plans]
        assert images.tolist() == [plan.num_images for plan in plans]
