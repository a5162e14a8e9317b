from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_shards import WORDS, WriteShard, cut_picture, picture
from tiny_videos import video

from data_pipelines.batches import ImageBatch, PackedBatch
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.pairs import read_pairs
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.samples import SampleCounts
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.sequence import RowShape, batch_shapes
from emu2_jax.tokenizer import Tokenizer

Pairs = Callable[..., str]

#: With N = 2 a pair of w words takes 2 + w + 4 positions: 7 to 10, so two or three share a row of 24.
CONFIG = DataConfig(row_length=24, image_slots=3, global_batch_rows=4, packing_pool=16, read_threads=2)


def _source(shards: str, name: str = "pairs", kind: str = "image_text", **settings: object) -> SourceConfig:
    return SourceConfig(name=name, kind=kind, shards=shards, **settings)  # type: ignore[arg-type]


def _open(tokenizer: Tokenizer, *sources: SourceConfig, hosts: int = 1, host: int = 0, **settings: object) -> Pipeline:
    config = dataclasses.replace(CONFIG, sources=sources, **settings)  # type: ignore[arg-type]
    return open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer, hosts=hosts, host=host)


def _assert_equal(one: PackedBatch | ImageBatch, other: PackedBatch | ImageBatch) -> None:
    assert dataclasses.replace(one, fields={}) == dataclasses.replace(other, fields={})
    for name, array in one.fields.items():
        assert np.array_equal(array, other.fields[name]), name


def _greys(batch: PackedBatch) -> list[int]:
    """The images of a batch; each pair of the test shards has its own grey."""
    return batch.fields["images"][batch.fields["image_mask"]][:, 0, 0, 0].tolist()


def _first(pipeline: Pipeline, count: int, start: int = 0) -> list[PackedBatch]:
    stream = pipeline.iterate(start)
    batches = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return batches


@pytest.fixture
def three_kinds(write_shard: WriteShard, pairs: Pairs) -> tuple[SourceConfig, ...]:
    stories: list[tuple[str, bytes]] = []
    for i in range(15):
        for slot in range(1 + i % 2):
            stories += [(f"s{i}.{slot}.txt", WORDS[i % 10].encode()), (f"s{i}.{slot}.png", picture(100 + i))]
    texts = [(f"t{i}.txt", " ".join(WORDS[: 1 + i % 9]).encode()) for i in range(20)]
    return (
        _source(pairs("pairs.tar", 30)),
        _source(write_shard("stories.tar", stories), "stories", "interleaved"),
        _source(write_shard("texts.tar", texts), "texts", "text"),
    )


# --- what a batch is --------------------------------------------------------------------------------------------------


def test_one_row_exactly(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    shard = write_shard("a.tar", [("a.txt", b"red cat"), ("a.png", picture(50))])
    batch = _open(tokenizer, _source(shard), row_length=10, image_first_probability=1.0, global_batch_rows=1).batch(0)
    start, image, end = tokenizer.image_start_id, tokenizer.image_id, tokenizer.image_end_id
    red, cat = tokenizer.encode("red cat")
    assert batch.fields["tokens"].tolist() == [[1, start, image, image, end, red, cat, 2, *[tokenizer.pad_id] * 2]]
    assert batch.fields["segment_ids"].tolist() == [[1] * 8 + [0] * 2]
    assert batch.fields["images"][0, :, 0, 0, 0].tolist() == [50, 0, 0]
    assert (batch.sources, batch.epochs, batch.num_samples, batch.num_documents) == (("pairs",), {"pairs": 0}, 1, 1)


@pytest.mark.parametrize("mixing", ["mixed", "one_source_per_step"])
def test_fields_have_the_shapes_of_the_contract(
    three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer, mixing: str
) -> None:
    pipeline = _open(tokenizer, *three_kinds, mixing=mixing)
    for step in range(4):
        expected = batch_shapes(4, RowShape(length=24, image_slots=3, visual_tokens=2, image_size=4))
        fields = pipeline.batch(step).fields
        assert {name: (array.shape, array.dtype.type) for name, array in fields.items()} == expected


def test_rows_obey_the_slot_rules(three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, *three_kinds)
    for step in range(12):
        fields = pipeline.batch(step).fields
        for row in range(4):
            segments, visual = fields["segment_ids"][row], fields["is_visual"][row]
            used = int((segments > 0).sum())
            assert (np.diff(segments[:used]) >= 0).all() and not segments[used:].any()  # no bad samples: no holes
            for segment in range(1, segments.max() + 1):
                positions = fields["positions"][row][segments == segment]
                assert positions.tolist() == list(range(len(positions)))
            num_images = int(fields["image_mask"][row].sum())
            assert fields["image_mask"][row, :num_images].all()
            assert fields["visual_index"][row][visual].tolist() == list(range(2 * num_images))
            assert (fields["tokens"][row] == tokenizer.image_id).tolist() == visual.tolist()
            assert (fields["loss_weights"][row] == (segments > 0)).all()


# --- epochs, order, resume --------------------------------------------------------------------------------------------


def test_every_sample_is_in_each_epoch_once(pairs: Pairs, tokenizer: Tokenizer) -> None:
    shards = [pairs("a-0.tar", 30), pairs("a-1.tar", 23, 30)]
    pipeline = _open(tokenizer, _source(shards[0].replace("a-0", "a-{0..1}")), global_batch_rows=1)
    seen: dict[int, list[int]] = collections.defaultdict(list)
    for batch in _first(pipeline, 80):
        seen[batch.epochs["pairs"]] += _greys(batch)
    assert len(seen) >= 3
    for epoch in range(len(seen) - 1):
        assert sorted(seen[epoch]) == list(range(53))
    assert seen[0] != seen[1] != seen[2]


def test_batches_depend_on_the_step_alone(three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    expected = [_open(tokenizer, *three_kinds).batch(step) for step in range(25)]
    assert max(expected[-1].epochs.values()) >= 2
    asked_backwards = _open(tokenizer, *three_kinds)
    for step in reversed(range(25)):
        _assert_equal(asked_backwards.batch(step), expected[step])
    for threads, ahead in [(0, 2), (1, 1), (3, 6), (4, 0)]:
        pipeline = _open(tokenizer, *three_kinds, read_threads=threads, prefetch_batches=ahead)
        for ours, theirs in zip(_first(pipeline, 25), expected, strict=True):
            _assert_equal(ours, theirs)


@pytest.mark.parametrize("start", [1, 7, 19])
def test_restart_in_the_middle_gives_the_same_bits(
    three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer, start: int
) -> None:
    whole = _first(_open(tokenizer, *three_kinds), start + 5)
    for ours, theirs in zip(_first(_open(tokenizer, *three_kinds), 5, start), whole[start:], strict=True):
        _assert_equal(ours, theirs)


def test_seed_changes_the_order(pairs: Pairs, tokenizer: Tokenizer) -> None:
    source = _source(pairs("a.tar", 50))
    assert _greys(_open(tokenizer, source).batch(0)) != _greys(_open(tokenizer, source, seed=1).batch(0))


@pytest.mark.parametrize("mixing", ["mixed", "one_source_per_step"])
def test_hosts_hold_slices_of_the_global_batch(
    three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer, mixing: str
) -> None:
    alone = _open(tokenizer, *three_kinds, mixing=mixing)
    for hosts in (2, 4):
        shares = [_open(tokenizer, *three_kinds, mixing=mixing, hosts=hosts, host=host) for host in range(hosts)]
        for step in (0, 1, 2, 11):
            parts = [pipeline.batch(step) for pipeline in shares]
            whole = alone.batch(step)
            for name, array in whole.fields.items():
                assert np.array_equal(np.concatenate([part.fields[name] for part in parts]), array), name
            assert sum(part.num_samples for part in parts) == whole.num_samples


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_mixed_rows_follow_the_weights(three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    weights = {"pairs": 6.0, "stories": 3.0, "texts": 1.0}
    sources = [dataclasses.replace(source, weight=weights[source.name]) for source in three_kinds]
    counts = collections.Counter(name for batch in _first(_open(tokenizer, *sources), 15) for name in batch.sources)
    assert counts == {"pairs": 36, "stories": 18, "texts": 6}


def test_one_source_per_step_has_its_own_rows_and_slots(
    three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer
) -> None:
    sources = [
        dataclasses.replace(three_kinds[0], weight=2.0, batch_rows=6),
        dataclasses.replace(three_kinds[1], weight=0.0),
        dataclasses.replace(three_kinds[2], weight=1.0, batch_rows=2, image_slots=0),
    ]
    pipeline = _open(tokenizer, *sources, mixing="one_source_per_step")
    assert {name: (rows, shape.image_slots) for name, (rows, shape) in pipeline.row_shapes.items()} == {
        "pairs": (6, 3),
        "texts": (2, 0),
    }
    batches = _first(pipeline, 6)
    assert [set(batch.sources) for batch in batches] == [{"pairs"}, {"texts"}, {"pairs"}] * 2
    assert [batch.fields["images"].shape for batch in batches[:2]] == [(6, 3, 4, 4, 3), (2, 0, 4, 4, 3)]
    rows = [pipeline.rows_of_step(step) for step in (0, 2, 3)]
    assert [[row for _, row in step] for step in rows] == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    assert sum(s.num_documents for s in batches) == sum(s.num_samples for s in batches)


def test_far_steps_need_no_counting_through(three_kinds: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, *three_kinds)
    assert len(pipeline.rows_of_step(10**12)) == 4


# --- bad samples ------------------------------------------------------------------------------------------------------


def test_bad_sample_leaves_a_hole_and_nothing_else_moves(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    def members(damaged: int | None) -> list[tuple[str, bytes]]:
        data = {i: picture(i) for i in range(6)}
        if damaged is not None:
            data[damaged] = cut_picture(damaged)
        return [part for i in range(6) for part in ((f"{i}.txt", b"cat"), (f"{i}.png", data[i]))]

    settings = {"row_length": 7 * 6, "image_slots": 6, "global_batch_rows": 1}
    good = _open(tokenizer, _source(write_shard("good.tar", members(None))), **settings).batch(0)
    batch = _open(tokenizer, _source(write_shard("bad.tar", members(4))), **settings).batch(0)
    order = _greys(good)
    place = order.index(4)
    hole = np.arange(42) // 7 == place
    assert (batch.num_samples, batch.num_documents) == (6, 5)
    assert [(bad.cause, bad.key) for bad in batch.bad] == [("damaged_image", "4")]
    for name in ("tokens", "positions", "is_visual", "visual_index", "loss_weights"):
        assert np.array_equal(batch.fields[name][0, ~hole], good.fields[name][0, ~hole]), name
    assert not batch.fields["segment_ids"][0, hole].any() and not batch.fields["loss_weights"][0, hole].any()
    assert batch.fields["image_mask"][0].tolist() == [i != place for i in range(6)]
    assert np.unique(batch.fields["segment_ids"]).tolist() == [0, 1, 2, 3, 4, 5]


def test_damaged_pictures_are_counted_by_cause_with_their_place(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    jpeg, bmp = picture(1, 64, "JPEG"), picture(3, 8, "BMP")
    damaged = {
        "damaged_image": [
            jpeg[:-300],
            jpeg[:900] + bytes(b ^ 0xFF for b in jpeg[900:950]) + jpeg[950:],
            cut_picture(2),
        ],
        "not_an_image": [b"<html>", b""],
        "image_too_large": [bmp[:18] + (100_000).to_bytes(4, "little") * 2 + bmp[26:]],
    }
    files = [data for causes in damaged.values() for data in causes] + [picture(4, 8, "WEBP"), picture(5, 8, "GIF")]
    shard = write_shard("a.tar", [m for i, d in enumerate(files) for m in ((f"{i}.txt", b"cat"), (f"{i}.jpg", d))])
    batch = _open(tokenizer, _source(shard), row_length=80, image_slots=8, global_batch_rows=1).batch(0)
    assert batch.num_documents == 2
    assert {cause: sum(bad.cause == cause for bad in batch.bad) for cause in damaged} == {
        cause: len(files) for cause, files in damaged.items()
    }
    content = Path(shard).read_bytes()
    for bad in batch.bad:
        assert bad.shard == shard and content[bad.offset :].startswith(f"{bad.key}.jpg\0".encode())


def test_a_bad_video_leaves_its_positions_and_its_slots_empty(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = []
    for i, data in enumerate((video(9), video(9)[:-400], video(9))):
        members += [(f"{i}.mp4", data), (f"{i}.txt", b"cat")]
    source = _source(write_shard("clips.tar", members), "clips", "video_text", video_frames=2)
    settings: dict[str, Any] = {"row_length": 3 * 12, "image_slots": 6, "global_batch_rows": 1}
    batch = _open(tokenizer, source, **settings).batch(0)
    assert [(one.cause, one.key) for one in batch.bad] == [("damaged_video", "1")]
    assert (batch.num_samples, batch.num_documents) == (3, 2)
    segments = batch.fields["segment_ids"][0].reshape(3, 12)
    empty = int(np.flatnonzero(~segments.any(axis=1))[0])
    assert [bool(row.all()) for row in segments] == [i != empty for i in range(3)]
    mask = batch.fields["image_mask"][0].reshape(3, 2)
    assert mask.tolist() == [[i != empty] * 2 for i in range(3)]
    visual = batch.fields["is_visual"][0]
    assert (batch.fields["visual_index"][0][visual] // 2).tolist() == np.repeat(np.flatnonzero(mask), 2).tolist()
    assert (batch.fields["tokens"][0][visual] == tokenizer.frame_id).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_frames": 7}, "video_frames: got 7; wanted 1 to the 6 image slots of a row"),
        (
            {"video_frames": 6, "max_document_positions": 20},
            "video_frames: 6 frames take 27 positions; a document has 20",
        ),
        ({"max_document_positions": 99}, r"sources\.clips\.max_document_positions: got 99; wanted 3 \.\.\. .* = 36"),
    ],
)
def test_videos_that_can_never_fit(
    write_shard: WriteShard, tokenizer: Tokenizer, settings: dict[str, int], message: str
) -> None:
    source = _source(
        write_shard("clips.tar", [("a.mp4", video(3)), ("a.txt", b"cat")]), "clips", "video_text", **settings
    )
    with pytest.raises(ConfigError, match=message):
        _open(tokenizer, source, row_length=36, image_slots=6)


def test_documents_of_one_source_are_cut_by_themselves(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    text = " ".join(WORDS * 2).encode()
    sources = [
        _source(write_shard(f"{name}.tar", [("a.txt", text)]), name, "text", max_document_positions=limit)
        for name, limit in (("long", None), ("short", 10))
    ]
    pipeline = _open(tokenizer, *sources, row_length=40, global_batch_rows=2)
    batch = pipeline.batch(0)
    lengths = {name: int((batch.fields["segment_ids"][i] > 0).sum()) for i, name in enumerate(batch.sources)}
    assert lengths == {"long": 22, "short": 10} and batch.num_cut == 1


def test_too_many_bad_samples_stop_the_run_with_causes_and_an_example(
    write_shard: WriteShard, tokenizer: Tokenizer
) -> None:
    members = []
    for i in range(40):
        members += [(f"{i}.txt", b"cat"), (f"{i}.png", cut_picture(i) if i % 4 == 0 else picture(i))]
    source = _source(write_shard("a.tar", members))
    pipeline = _open(tokenizer, source, max_bad_share=0.05)
    with pytest.raises(
        DataError, match=r"2[6-9] of \d+ samples are bad \(damaged_image 2[6-9]\).*a\.tar, sample '\d+'"
    ):
        _first(pipeline, 200)
    assert pipeline.counts["pairs"].bad["damaged_image"] > 25
    lenient = _open(tokenizer, source, max_bad_share=0.5)
    assert len(_first(lenient, 60)) == 60
    assert lenient.counts["pairs"].bad.total() / lenient.counts["pairs"].seen == pytest.approx(0.25, abs=0.05)
    resumed = _open(tokenizer, source, max_bad_share=0.05)
    resumed.counts["pairs"] = SampleCounts.from_dict(lenient.counts["pairs"].to_dict())
    with pytest.raises(DataError, match="samples are bad"):
        _first(resumed, 3, start=60)


def test_counts_are_of_what_was_handed_out(pairs: Pairs, tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, _source(pairs("a.tar", 50)), prefetch_batches=8)
    batches = _first(pipeline, 2)
    assert pipeline.counts["pairs"].seen == sum(batch.num_samples for batch in batches)


def test_samples_left_out_of_the_index_count_too(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = [(f"{i}.txt", b"cat" if i >= 6 else b"\xff") for i in range(30)]
    source = _source(write_shard("a.tar", members), "texts", "text")
    with pytest.raises(DataError, match=r"^data\.sources\.texts: 6 of 30 samples are bad \(invalid_utf8 6\)"):
        _open(tokenizer, source)
    pipeline = _open(tokenizer, source, max_bad_share=0.02)
    assert pipeline.summary == {"texts": {"shards": 1, "samples": 24, "invalid_utf8": 6}}
    nothing = _source(write_shard("b.tar", members[:3]), "texts", "text")
    with pytest.raises(DataError, match=r"data\.sources\.texts: none of its samples can be used.*b\.tar"):
        _open(tokenizer, nothing)


def test_broken_shards_stop_before_training(pairs: Pairs, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = pairs("a-0.tar", 4)
    (tmp_path / "a-1.tar").write_bytes(Path(good).read_bytes()[:1500])
    with pytest.raises(DataError, match=r"a-1\.tar: cut: "):
        _open(tokenizer, _source(str(tmp_path / "a-*.tar")))
    with pytest.raises(DataError, match=r"a-2\.tar: shard does not exist \(named by data\.sources\.pairs\.shards"):
        _open(tokenizer, _source(str(tmp_path / "a-{0..2}.tar")))
    with pytest.raises(DataError, match=r"data\.sources\.pairs\.shards: no file matches"):
        _open(tokenizer, _source(str(tmp_path / "b-*.tar")))


def test_damaged_shards_are_salvaged_if_that_is_allowed(pairs: Pairs, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number in range(4):
        pairs(f"a-{number}.tar", 30, 30 * number)
    cut, foreign = tmp_path / "a-1.tar", tmp_path / "a-2.tar"
    cut.write_bytes(cut.read_bytes()[: 9 * 2048 + 1540])
    foreign.write_bytes(b"<html>not found</html>" * 100)
    source = _source(str(tmp_path / "a-*.tar"))
    with pytest.raises(DataError, match=r"a-1\.tar: cut: member '0039\.txt' .*\(and 1 more broken shards\)"):
        _open(tokenizer, source)
    with pytest.raises(
        DataError,
        match=r"data\.sources\.pairs: 25 of \d+ samples are bad \(cut_member 1, foreign_shard 1, in unusable shards "
        r"about 23\), more than data\.max_bad_share = 0\.01 allows; for example cut_member: .*a-1\.tar, sample '0039'",
    ):
        _open(tokenizer, source, damaged_shards="salvage")
    pipeline = _open(tokenizer, source, damaged_shards="salvage", max_bad_share=0.3)
    assert pipeline.summary == {"pairs": {"shards": 4, "samples": 69, "cut_member": 1, "foreign_shard": 1}}
    greys = {grey for batch in _first(pipeline, 12) for grey in _greys(batch)}
    assert greys == {*range(39), *range(90, 120)}


def test_shard_that_becomes_shorter_leaves_holes(pairs: Pairs, tokenizer: Tokenizer) -> None:
    path = Path(pairs("a.tar", 30))
    pipeline = _open(tokenizer, _source(str(path)), max_bad_share=1.0)
    path.write_bytes(path.read_bytes()[:20_000])
    batches = _first(pipeline, 3)
    assert {bad.cause for batch in batches for bad in batch.bad} == {"shorter_shard"}
    assert {bad.source for batch in batches for bad in batch.bad} == {"pairs"}
    assert any(_greys(batch) for batch in batches)


def test_shard_that_vanishes_during_the_run_ends_it(pairs: Pairs, tokenizer: Tokenizer) -> None:
    path = pairs("a.tar", 30)
    pipeline = _open(tokenizer, _source(path))
    Path(path).unlink()
    stream = pipeline.iterate()
    with pytest.raises(DataError, match=r"a\.tar: cannot open the shard"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize(
    ("source_settings", "settings", "message"),
    [
        ({}, {"row_length": 4}, r"data\.row_length: got 4; wanted at least 5"),
        ({}, {"max_document_positions": 4}, r"data\.max_document_positions: got 4; wanted at least 5"),
        ({}, {"max_document_positions": 25}, r"data\.max_document_positions: got 25; wanted 3 \.\.\. data\.row_length"),
        ({}, {"image_slots": 0}, r"data\.image_slots: got 0, but source 'pairs' has images"),
        ({"weight": -1.0}, {}, r"data\.sources\.pairs\.weight: got -1"),
        ({"weight": 0.0}, {}, r"data\.sources: no source has a weight above 0"),
        ({"batch_rows": 3}, {}, r"data\.sources\.pairs\.batch_rows: is for data\.mixing = one_source_per_step"),
        ({"image_slots": 3}, {}, r"data\.sources\.pairs\.image_slots: is for data\.mixing = one_source_per_step"),
        ({}, {"global_batch_rows": 3}, r"data\.global_batch_rows: got 3; wanted a positive multiple .* hosts, 2"),
    ],
)
def test_settings_that_do_not_go_together(
    tokenizer: Tokenizer, source_settings: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        _open(tokenizer, _source("never opened", **source_settings), hosts=2, **settings)


def test_names_must_be_unique(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: names must be unique"):
        _open(tokenizer, _source("a"), _source("b"))


# --- the decoder's images, evaluation's pairs -------------------------------------------------------------------------


def _images(
    sources: tuple[SourceConfig, ...], hosts: int = 1, host: int = 0, scale: float = 1.25, **settings: object
) -> ImagePipeline:
    config = dataclasses.replace(CONFIG, sources=sources, **settings)  # type: ignore[arg-type]
    return open_image_pipeline(config, image_size=6, batch_images=4, random_scale_max=scale, hosts=hosts, host=host)


def test_decoder_batches(three_kinds: tuple[SourceConfig, ...]) -> None:
    pipeline = _images(three_kinds)
    assert list(pipeline.summary) == ["pairs"]
    batches = list(itertools.islice(pipeline.iterate(), 15))
    fields = batches[0].fields
    assert [(name, array.shape, array.dtype) for name, array in fields.items()] == [
        ("images", (4, 6, 6, 3), np.uint8),
        ("time_ids", (4, 6), np.int32),
        ("weight", (4,), np.float32),
    ]
    greys = [int(image[0, 0, 0]) for batch in batches for image in batch.fields["images"]]
    assert sorted(greys[:30]) == sorted(greys[30:]) == list(range(30)) and greys[:30] != greys[30:]
    ids = np.concatenate([batch.fields["time_ids"] for batch in batches])
    assert (ids[:, :2] == 8).all() and (ids[:, 4:] == 6).all()
    assert set(ids[:, 2]) == {0, 1} == set(ids[:, 3])  # the scaled side is 6 to 7.5: room of at most one pixel
    for start in (1, 9):
        for ours, theirs in zip(_images(three_kinds).iterate(start), batches[start:], strict=False):
            _assert_equal(ours, theirs)
    halves = [_images(three_kinds, hosts=2, host=host).batch(8) for host in range(2)]
    assert np.array_equal(np.concatenate([half.fields["time_ids"] for half in halves]), batches[8].fields["time_ids"])


def test_decoder_marks_bad_images_and_counts_small_ones(write_shard: WriteShard) -> None:
    shard = write_shard(
        "a.tar",
        [
            *[("0.png", picture(9, size=5)), ("0.txt", b"cat")],
            *[("1.png", cut_picture(7)), ("1.txt", b"cat")],
            *[("2.png", picture(8)), ("2.txt", b"cat"), ("3.png", picture(6)), ("3.txt", b"cat")],
        ],
    )
    batch = _images((_source(shard),)).batch(0)
    weights = {int(image[0, 0, 0]): weight for image, weight in zip(*list(batch.fields.values())[::2], strict=True)}
    assert weights == {0: 0.0, 6: 1.0, 8: 1.0, 9: 1.0}
    assert batch.num_upscaled == 1 and [bad.key for bad in batch.bad] == ["1"]
    assert batch.num_small == 0


def test_decoder_leaves_out_and_counts_pictures_below_its_least_side(write_shard: WriteShard) -> None:
    """Of sides 5, 6, 7 and 8, with 7 asked for: two are left out, and they are no bad samples."""
    members = [
        (f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("png", picture(9 - i, 5 + i)), ("txt", b"x"))
    ]
    config = DataConfig(sources=(_source(write_shard("a.tar", members)),))
    pipeline = open_image_pipeline(config, image_size=6, batch_images=4, random_scale_max=1.0, min_image_side=7)
    batch = next(iter(pipeline.iterate()))
    left = {
        int(size) for size, weight in zip(batch.fields["time_ids"][:, 0], batch.fields["weight"], strict=True) if weight
    }
    assert left == {7, 8} and batch.fields["weight"].sum() == 2.0
    assert (batch.num_small, batch.num_upscaled, batch.bad) == (2, 0, ())


def test_decoder_needs_pairs(three_kinds: tuple[SourceConfig, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: the decoder trains on sources of kind image_text"):
        _images(three_kinds[1:])
    with pytest.raises(ConfigError, match=r"decoder\.batch_images: got 4; .* hosts, 3"):
        _images(three_kinds, hosts=3)
    with pytest.raises(ConfigError, match=r"decoder\.random_scale_max"):
        _images(three_kinds, scale=0.5)


def test_evaluation_pairs_come_in_order(pairs: Pairs, write_shard: WriteShard) -> None:
    shards = pairs("e-0.tar", 3).replace("e-0", "e-*")
    pairs("e-1.tar", 3, 3)
    found = read_pairs(shards, 4, 5)
    assert [(key, int(image[0, 0, 0]), caption) for key, image, caption in found] == [
        ("0000", 0, "cat"),
        ("0001", 1, "cat dog"),
        ("0002", 2, "cat dog red"),
        ("0003", 3, "cat dog red blue"),
        ("0004", 4, "cat"),
    ]
    assert len(read_pairs(shards, 4, 100)) == 6
    bad = write_shard("bad.tar", [("a.png", cut_picture(1)), ("a.txt", b"cat")])
    with pytest.raises(DataError, match=r"damaged_image: .*bad\.tar, sample 'a', byte 0"):
        read_pairs(bad, 4, 1)
    with pytest.raises(DataError, match=r"evaluation\.unseen: no file matches"):
        read_pairs("none-*.tar", 4, 1, "evaluation.unseen")
