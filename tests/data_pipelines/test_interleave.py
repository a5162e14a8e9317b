from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_shards import WORDS, Members, WriteShard, cut_picture, picture

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
    assert document.is_visual.tolist() == (document.tokens == tokenizer.image_id).tolist()
    return tokenizer.decode(document.tokens.tolist()).replace("<image>", "v")


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
