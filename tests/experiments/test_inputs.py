"""What a run reads, as its config names it; counters, and a state that goes on counting."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny

from data_pipelines.pipeline import Pipeline, open_pipeline
from emu2_jax.config import DataConfig, ExperimentConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.tokenizer import Tokenizer
from experiments.inputs import TrainingInput, _summed, open_tokenizer


def config(model_file: Path, vocab_size: int, **data: Any) -> ExperimentConfig:
    language = dataclasses.replace(tiny.CONFIG.model.language, vocab_size=vocab_size)
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(tiny.CONFIG.model, language=language),
        data=dataclasses.replace(tiny.CONFIG.data, tokenizer=str(model_file), **data),
    )


def test_the_chat_vocabulary_is_a_setting(sentencepiece_model: Path) -> None:
    base = Tokenizer(sentencepiece_model).vocab_size
    assert "[USER]" not in open_tokenizer(config(sentencepiece_model, base)).special_ids
    chat = open_tokenizer(config(sentencepiece_model, base + 2, special_tokens="chat"))
    assert chat.special_ids["[ASSISTANT]"] == base + 1


def test_a_vocabulary_of_another_size_than_the_embedding_is_an_error(sentencepiece_model: Path) -> None:
    base = Tokenizer(sentencepiece_model).vocab_size
    wanted = rf"^model\.language\.vocab_size: is {base}, .* has {base + 2} with data\.special_tokens = chat; set it to "
    with pytest.raises(ConfigError, match=wanted + rf"{base + 2}$"):
        open_tokenizer(config(sentencepiece_model, base, special_tokens="chat"))


@pytest.fixture
def pipeline(corpus: Path) -> Pipeline:
    """Pairs and texts of the minimal corpus, in rows that use them up within some steps."""
    sources = (
        SourceConfig(name="pairs", kind="image_text", shards=f"{corpus}/train/pairs-*.tar", weight=1.0),
        SourceConfig(name="text", kind="text", shards=f"{corpus}/train/text-*.tar", weight=3.0),
    )
    config = DataConfig(sources=sources, row_length=512, image_slots=32, global_batch_rows=8, read_threads=0)
    return open_pipeline(config, visual_tokens=4, image_size=8, tokenizer=Tokenizer(corpus / "tokenizer.model"))


def test_counters_by_source_and_a_line_for_each_new_epoch(pipeline: Pipeline) -> None:
    lines: list[str] = []
    batches = list(itertools.islice(TrainingInput(pipeline, say=lines.append).iterate(0), 30))
    infos = [batch.info for batch in batches]
    epochs = max(int(info["epoch/text"]) for info in infos)
    assert epochs >= 1
    assert f"text: all samples have been read; epoch {epochs} goes through them in a new order" in lines
    assert len([line for line in lines if line.startswith("text: ")]) == epochs
    assert infos[-1]["samples/text"] > pipeline.summary["text"]["samples"]
    assert infos[0]["bad_samples"] == infos[0]["bad_of_source/text"] == 0 and "read_retries" not in infos[0]


def test_counts_and_position_go_on(pipeline: Pipeline) -> None:
    said: list[str] = []
    first = TrainingInput(pipeline, say=said.append)
    stream = first.iterate(0)
    for _ in range(5):
        next(stream)
    state = json.loads(json.dumps(first.state()))
    assert state["position"]["step"] == 5 and len(json.dumps(state)) < 1000
    said.clear()
    expected = next(stream)
    lines: list[str] = []
    second = TrainingInput(pipeline, say=lines.append)
    second.restore(state)
    found = next(second.iterate(5))
    assert (found.info, lines) == (expected.info, said)
    with pytest.raises(DataError, match="holds no data position that this program reads"):
        second.restore({"counts": {"seen": 3}})


def _cut_every_fourth_image(source: Path, target: Path) -> None:
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for number, member in enumerate(one for one in old if one.isfile()):
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".png") and number % 8 < 2:
                data = data[: len(data) // 2]
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def test_counts_of_two_hosts_are_those_of_one(corpus: Path, tmp_path: Path) -> None:
    """By cause, after every step."""
    _cut_every_fourth_image(next((corpus / "train").glob("pairs-000000.tar")), tmp_path / "cut.tar")
    source = SourceConfig(name="pairs", kind="image_text", shards=f"{tmp_path}/cut.tar")
    config = DataConfig(
        sources=(source,), row_length=128, image_slots=8, global_batch_rows=2, read_threads=0, prefetch_batches=0,
        max_bad_share=1.0,
    )  # fmt: skip
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    shares = [(1, 0), (2, 0), (2, 1)]
    one, *two = (
        open_pipeline(config, visual_tokens=4, image_size=8, tokenizer=tokenizer, hosts=hosts, host=host)
        for hosts, host in shares
    )
    streams = [pipeline.iterate(0) for pipeline in (one, *two)]
    for _ in range(30):
        for stream in streams:
            next(stream)
        counts = [{name: c.to_dict() for name, c in pipeline.counts.items()} for pipeline in (one, *two)]
        assert _summed(counts[1:]) == _summed(counts[:1])
    bad = collections.Counter(counts[0]["pairs"])
    assert bad["damaged_image"] > 10 and set(bad) == {"seen", "damaged_image"}
