from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines import pipeline as pipeline_module
from data_pipelines.batches import PackedBatch
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.planning import RowPlan
from data_pipelines.position import Saved, saved_of
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

CONFIG = DataConfig(row_length=24, image_slots=3, global_batch_rows=6, packing_pool=16, read_threads=0)


@pytest.fixture
def sources(write_shard: WriteShard) -> tuple[SourceConfig, ...]:
    """Pairs 0 ... 89, each with its own grey, in three shards; and 40 texts."""
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for i in range(30 * shard, 30 * shard + 30):
            members += [(f"{i:03d}.png", picture(i)), (f"{i:03d}.txt", " ".join(WORDS[: 1 + i % 4]).encode())]
        pairs = write_shard(f"pairs-{shard}.tar", members)
    texts = write_shard("texts.tar", [(f"t{i}.txt", " ".join(WORDS[: 1 + i % 9]).encode()) for i in range(40)])
    return (
        SourceConfig(name="pairs", kind="image_text", shards=pairs.replace("pairs-2", "pairs-*"), weight=2.0),
        SourceConfig(name="texts", kind="text", shards=texts),
    )


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 20 samples, so that a few steps cross several."""

    class ShortBlocks(RowPlan):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings, block_samples=20)

    monkeypatch.setattr(pipeline_module, "RowPlan", ShortBlocks)


def _open(
    tokenizer: Tokenizer, sources: tuple[SourceConfig, ...], hosts: int = 1, host: int = 0, **settings: Any
) -> Pipeline:
    config = dataclasses.replace(CONFIG, sources=sources, **settings)
    return open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer, hosts=hosts, host=host)


def _take(pipeline: Pipeline, count: int) -> list[PackedBatch]:
    stream = pipeline.iterate(pipeline.state()["step"])
    batches = [next(stream) for _ in range(count)]
    stream.close()  # type: ignore[attr-defined]
    return batches


def _saved(pipeline: Pipeline | ImagePipeline) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    return dict(json.loads(json.dumps(pipeline.state())))


def _greys(batches: list[PackedBatch]) -> list[int]:
    """The pairs in the batches."""
    return [int(grey) for b in batches for grey in b.fields["images"][b.fields["image_mask"]][:, 0, 0, 0]]


# --- the same data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["mixed", "one_source_per_step"])
@pytest.mark.parametrize("window", [None, 32])
def test_resume_on_other_hosts_and_threads_gives_the_same_bits(
    sources: tuple[SourceConfig, ...], tokenizer: Tokenizer, mixing: str, window: int | None
) -> None:
    settings = {"mixing": mixing, "shuffle_window": window, "shuffle_run": 4}
    whole = _take(_open(tokenizer, sources, **settings), 24)
    assert min(batch.epochs.get("pairs", 9) for batch in whole[-3:]) >= 1
    state = None
    first = 0
    for hosts, threads, count in [(2, 0, 7), (3, 4, 8), (1, 2, 9)]:
        shares = []
        states = []
        for host in range(hosts):
            pipeline = _open(tokenizer, sources, hosts, host, read_threads=threads, **settings)
            if state is not None:
                assert pipeline.restore(state) == []
            shares.append(_take(pipeline, count))
            states.append(_saved(pipeline))
        assert all(other == states[0] for other in states)
        state = states[0]
        assert len(json.dumps(state)) < 1000
        for number in range(count):
            parts, expected = [share[number] for share in shares], whole[first + number]
            for name, array in expected.fields.items():
                assert np.array_equal(np.concatenate([part.fields[name] for part in parts]), array), name
            assert sum((part.sources for part in parts), ()) == expected.sources
        first += count


def test_a_restored_run_plans_only_where_it_is(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, sources)
    batches = _take(pipeline, 40)
    state = _saved(pipeline)
    assert saved_of(state)["pairs"].epoch >= 1
    restored = _open(tokenizer, sources)
    restored.restore(state)
    assert _greys(_take(restored, 3)) == _greys(_take(pipeline, 3))
    with pytest.raises(ValueError, match="where it resumed"):
        restored.batch(0)
    assert len(batches) == 40


def test_seven_sources_of_any_size_take_less_than_a_kilobyte() -> None:
    state = {"version": 2, "step": 10**6, "since": 10**6, "schedule": "a" * 8, "tokenizer": "a" * 16}
    largest = Saved("a" * 8, "a" * 8, 10**5, 10**9, 10**8, 10**9, 10, 10**5, 10**9)
    state["sources"] = {f"source-{number}": list(largest) for number in range(7)}  # type: ignore[assignment]
    assert len(json.dumps(state)) < 1000


# --- other data -------------------------------------------------------------------------------------------------------


def test_a_shard_added_to_a_glob_stops_a_resumed_run(
    sources: tuple[SourceConfig, ...], tokenizer: Tokenizer, write_shard: WriteShard
) -> None:
    pipeline = _open(tokenizer, sources)
    _take(pipeline, 3)
    state = _saved(pipeline)
    write_shard("pairs-3.tar", [("new.png", picture(200)), ("new.txt", b"cat")])
    changed = _open(tokenizer, sources)
    with pytest.raises(
        DataError,
        match=r"^data\.sources\.pairs\.shards: is not the data that this run was trained on: 91 samples in 4 shards, "
        r"was 90 in 3\. .*--allow_config_change=data\.sources\.pairs\.shards$",
    ):
        changed.restore(state)
    notes = changed.restore(state, ["data.sources"])
    assert notes == [
        "data.sources.pairs: its rows are not those of before; it breaks off epoch 0 and begins epoch 1",
    ]
    batches = _take(changed, 30)
    assert [batch.step for batch in batches[:2]] == [3, 4]
    epoch = [grey for batch in batches if batch.epochs.get("pairs") == 1 for grey in _greys([batch])]
    assert 200 in epoch and len(set(epoch)) > 80
    assert (1, saved_of(state)["texts"].rows) in changed.rows_of_step(3)  # the other source goes on


def test_samples_in_another_order_and_other_texts_are_noticed(
    sources: tuple[SourceConfig, ...], tokenizer: Tokenizer, write_shard: WriteShard
) -> None:
    state = _open(tokenizer, sources).state(0)
    texts = [(f"t{i}.txt", " ".join(WORDS[: 1 + i % 9]).encode()) for i in range(40)]
    write_shard("texts.tar", [texts[1], texts[0], *texts[2:]])
    with pytest.raises(DataError, match=r"texts\.shards: .* 40 samples in 1 shards as before, but not the same ones"):
        _open(tokenizer, sources).restore(state)
    write_shard("texts.tar", [("t0.txt", b"cat dog"[:3]), *texts[1:]])
    _open(tokenizer, sources).restore(state)
    write_shard("texts.tar", [(texts[0][0], b"xyz"), *texts[1:]])  # as many bytes and tokens: nothing depends on more
    _open(tokenizer, sources).restore(state)


def test_another_tokenizer_stops_a_resumed_run(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    state = _open(tokenizer, sources).state(0)
    other = object.__new__(Tokenizer)
    other.__dict__.update(tokenizer.__dict__, fingerprint="another")
    with pytest.raises(DataError, match=r"^data\.tokenizer: is not the tokenizer that this run was trained with"):
        _open(other, sources).restore(state)
    assert _open(other, sources).restore(state, ["data.tokenizer"]) == []  # it cuts texts into as many pieces


def test_other_rows_begin_a_new_epoch(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, sources)
    _take(pipeline, 2)
    changed = _open(tokenizer, sources, row_length=30)  # a setting: `emu2 train` has asked already
    assert len(changed.restore(_saved(pipeline))) == 2
    assert _take(changed, 1)[0].epochs == {"pairs": 1, "texts": 1}


def test_a_state_of_another_version_is_refused(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, sources)
    with pytest.raises(DataError, match=r"checkpoint: its data position is of version 1, this program reads 2"):
        pipeline.restore({**pipeline.state(0), "version": 1})


# --- another mixture --------------------------------------------------------------------------------------------------


def test_other_weights_lose_and_repeat_no_sample(sources: tuple[SourceConfig, ...], tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, sources)
    seen = _greys(_take(pipeline, 4))
    state = _saved(pipeline)
    weights = (dataclasses.replace(sources[0], weight=1.0), dataclasses.replace(sources[1], weight=5.0))
    changed = _open(tokenizer, weights)
    assert changed.restore(state) == ["data: the mixture changed; from step 4 on, each source goes on where it was"]
    later = _take(changed, 30)
    assert collections.Counter(name for batch in later for name in batch.sources) == {"pairs": 30, "texts": 150}
    together = collections.Counter(seen + _greys([batch for batch in later if batch.epochs.get("pairs", 0) == 0]))
    assert set(together.values()) == {1}
    # Resumed once more, the changed schedule goes on, bit for bit.
    again = _open(tokenizer, weights)
    assert again.restore(_saved(changed)) == []
    assert again.state()["since"] == 4
    for ours, theirs in zip(_take(again, 5), _take(changed, 5), strict=True):
        assert all(np.array_equal(array, theirs.fields[name]) for name, array in ours.fields.items())


def test_a_source_that_was_left_out_goes_on_where_it_was(
    sources: tuple[SourceConfig, ...], tokenizer: Tokenizer
) -> None:
    pipeline = _open(tokenizer, sources)
    _take(pipeline, 3)
    rows = saved_of(_saved(pipeline))["texts"].rows
    alone = _open(tokenizer, sources[:1])
    alone.restore(_saved(pipeline))
    _take(alone, 3)
    back = _open(tokenizer, sources)
    back.restore(_saved(alone))
    assert next(row for source, row in back.rows_of_step(6) if source == 1) == rows
    new = dataclasses.replace(sources[1], name="new")
    grown = _open(tokenizer, (*sources, new))
    assert "data.sources.new: is new, and begins with its first epoch" in grown.restore(_saved(back))


def test_decoder_images_go_on_as_well(sources: tuple[SourceConfig, ...]) -> None:
    def open_images(hosts: int = 1, host: int = 0, **settings: Any) -> ImagePipeline:
        config = dataclasses.replace(CONFIG, sources=sources, **settings)
        return open_image_pipeline(config, image_size=6, batch_images=6, random_scale_max=1.0, hosts=hosts, host=host)

    whole = open_images()
    stream = whole.iterate()
    batches = [next(stream) for _ in range(25)]
    state = _saved(whole)
    halves = [open_images(2, host) for host in range(2)]
    assert [half.restore(state) for half in halves] == [[], []]
    shares = [half.batch(25).fields["images"] for half in halves]
    assert np.array_equal(np.concatenate(shares), next(stream).fields["images"])
    greys = [int(image[0, 0, 0]) for batch in batches for image in batch.fields["images"]]
    assert sorted(greys[:90]) == list(range(90))
    Path(sources[0].shards.replace("*", "1")).unlink()
    with pytest.raises(DataError, match=r"data\.sources\.pairs\.shards: .* 60 samples in 2 shards, was 90 in 3"):
        open_images().restore(state)
