from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny_shards import WriteShard, picture

from data_pipelines.embedding_store import (
    EMBEDDINGS,
    EmbeddingStore,
    StoreHeader,
    members_of,
    stem,
    store_path,
    write_store_shard,
)
from data_pipelines.index import SampleIndex
from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.kinds import SampleError
from data_pipelines.pipeline import open_pipeline
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.tokenizer import Tokenizer

SETTINGS = {"visual_tokens": 2, "width": 3, "image_size": 4}
MEMBERS = members_of(2, 3)
LONG_KEY = "a/" + "k" * 90


@pytest.fixture
def index(write_shard: WriteShard) -> SampleIndex:
    """Two shards of stories; the images of a sample are not in the order of the samples."""
    first = [("s.0.png", picture(1)), ("t.0.png", picture(2)), ("s.2.png", picture(3)), ("s.1.txt", b"cat")]
    second = [("u.5.png", picture(4)), (f"{LONG_KEY}.0.png", picture(5)), (f"{LONG_KEY}.1.png", picture(6))]
    paths = [write_shard("one.tar", first), write_shard("two.tar", second)]
    return open_index(paths, IndexRules("interleaved", None))


def embedding(name: str) -> np.ndarray:
    """Something that only this image has."""
    return (np.arange(6).reshape(2, 3) + sum(name.encode())).astype(ml_dtypes.bfloat16)


def images(index: SampleIndex, shard: int) -> list[tuple[int, int]]:
    return [
        (sample, part)
        for sample in np.flatnonzero(index.shards == shard).tolist()
        for part in range(index.starts[sample], index.starts[sample + 1])
        if index.is_image[part]
    ]


def write(index: SampleIndex, out: Path, bad: str = "", encoder: str = "e1", reverse: bool = False) -> str:
    for shard, path in enumerate(index.paths):
        stems = [stem(index, *image) for image in images(index, shard)][:: -1 if reverse else 1]
        header = StoreHeader(encoder, SETTINGS, MEMBERS, len(stems), Path(path).stat().st_size)
        error = SampleError("damaged_image", "cut " * 40)
        records = [error if name == bad else {EMBEDDINGS: embedding(name)} for name in stems]
        write_store_shard(store_path(out, path), header, stems, records)
    return str(out)


def open_store(directory: str, index: SampleIndex, **settings: int) -> EmbeddingStore:
    return EmbeddingStore(directory, index, {**SETTINGS, **settings}, "data.sources.s.embeddings")


@pytest.mark.parametrize("reverse", [False, True])
def test_every_image_finds_its_own(index: SampleIndex, tmp_path: Path, reverse: bool) -> None:
    """By its key: the store may be in another order than the index."""
    store = open_store(write(index, tmp_path / "store", reverse=reverse), index)
    assert store.encoder == "e1"
    found = [(shard, *image) for shard in (0, 1) for image in images(index, shard)]
    assert len(found) == 6
    for _, sample, part in found:
        read = store.read(sample, part)[EMBEDDINGS]
        assert read.dtype == ml_dtypes.bfloat16
        assert np.array_equal(read, embedding(stem(index, sample, part)))


def test_a_store_is_an_ordinary_tar(index: SampleIndex, tmp_path: Path) -> None:
    directory = write(index, tmp_path / "store", bad="t.0")
    with tarfile.open(Path(directory) / "one.tar") as tar:
        assert tar.getnames() == ["__store__.json", "__keys__.u64", "s.0.emb", "s.2.emb", "t.0.emb.bad"]
        data = tar.extractfile("s.2.emb").read()  # type: ignore[union-attr]
    assert np.array_equal(np.frombuffer(data, ml_dtypes.bfloat16).reshape(2, 3), embedding("s.2"))


def test_a_bad_picture_stays_bad_for_the_same_cause(index: SampleIndex, tmp_path: Path) -> None:
    settings = {**SETTINGS, "width": 200}
    members = members_of(2, 200)
    (sample, part), *_ = images(index, 0)
    name = stem(index, sample, part)
    for path, stems in zip(index.paths, ([name], []), strict=True):
        header = StoreHeader("e", settings, members, len(stems), Path(path).stat().st_size)
        records = [SampleError("damaged_image", "premature end")] * len(stems)
        write_store_shard(store_path(tmp_path / "store", path), header, stems, records)
    store = EmbeddingStore(str(tmp_path / "store"), index, settings, "x")
    with pytest.raises(SampleError, match="damaged_image: premature end"):
        store.read(sample, part)
    other = images(index, 1)[0]
    with pytest.raises(SampleError, match="not_encoded"):
        store.read(*other)


def _remove(directory: Path, index: SampleIndex) -> None:
    (directory / "two.tar").unlink()


def _cut(directory: Path, index: SampleIndex) -> None:
    path = directory / "two.tar"
    path.write_bytes(path.read_bytes()[:6000])


def _foreign(directory: Path, index: SampleIndex) -> None:
    (directory / "two.tar").write_bytes(Path(index.paths[1]).read_bytes())


def _empty(directory: Path, index: SampleIndex) -> None:
    (directory / "two.tar").write_bytes(b"")


def _original_changed(directory: Path, index: SampleIndex) -> None:
    with Path(index.paths[1]).open("ab") as file:
        file.write(bytes(512))


def _two_encoders(directory: Path, index: SampleIndex) -> None:
    keep = (directory / "one.tar").read_bytes()
    write(index, directory, encoder="e2")
    (directory / "one.tar").write_bytes(keep)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, r"two\.tar: .*two\.tar is not encoded; run `emu2 encode` again"),
        (_cut, r"two\.tar: cut: has 6000 bytes"),
        (_foreign, r"two\.tar: is no shard of an embedding store"),
        (_empty, r"two\.tar: is no shard of an embedding store"),
        (_original_changed, r"two\.tar: was made from a shard of \d+ bytes, but"),
        (_two_encoders, r"two\.tar: was made by another encoder than .*one\.tar"),
    ],
)
def test_damage_is_refused_before_training(
    index: SampleIndex, tmp_path: Path, damage: Callable[[Path, SampleIndex], None], message: str
) -> None:
    directory = write(index, tmp_path / "store")
    damage(Path(directory), index)
    with pytest.raises(DataError, match=message):
        open_store(directory, index)


def test_other_settings_are_refused_by_name(index: SampleIndex, tmp_path: Path) -> None:
    directory = write(index, tmp_path / "store")
    message = r"^data\.sources\.s\.embeddings: .*one\.tar was made with image_size = 4, this run has 8"
    with pytest.raises(DataError, match=message):
        open_store(directory, index, image_size=8)


def test_nothing_unfinished_is_left(index: SampleIndex, tmp_path: Path) -> None:
    header = StoreHeader("e", SETTINGS, MEMBERS, 1, 0)
    with pytest.raises(ValueError, match="wanted \\(2, 3\\)"):
        write_store_shard(tmp_path / "store" / "one.tar", header, ["a"], [{EMBEDDINGS: np.zeros((3, 3))}])
    assert list((tmp_path / "store").iterdir()) == []


def test_shards_of_one_name_do_not_share_a_store(index: SampleIndex, tmp_path: Path) -> None:
    twice = dataclasses.replace(index, paths=("a/one.tar", "b/one.tar"))
    with pytest.raises(DataError, match="have the same name"):
        open_store(str(tmp_path), twice)


# --- in rows ----------------------------------------------------------------------------------------------------------


def _config(index: SampleIndex, embeddings: str | None, *more: SourceConfig, **settings: object) -> DataConfig:
    shards = "{" + ",".join(index.paths) + "}"
    source = SourceConfig(name="s", kind="interleaved", shards=shards, embeddings=embeddings)
    values = {"row_length": 60, "image_slots": 8, "global_batch_rows": 1, **settings}
    return DataConfig(sources=(source, *more), **values)  # type: ignore[arg-type]


def _batch(config: DataConfig, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    pipeline = open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer, store_settings=SETTINGS)
    return pipeline.batch(0).fields


def test_rows_are_the_same_but_for_what_is_in_their_slots(
    index: SampleIndex, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pixels = _batch(_config(index, None), tokenizer)
    stored = _batch(_config(index, write(index, tmp_path / "store")), tokenizer)
    assert set(pixels) ^ set(stored) == {"images", "embeddings"}
    for name in set(pixels) - {"images"}:
        assert np.array_equal(pixels[name], stored[name]), name
    assert stored["embeddings"].shape == (1, 8, 2, 3)
    greys = {1: "s.0", 2: "t.0", 3: "s.2", 4: "u.5", 5: f"{LONG_KEY}.0", 6: f"{LONG_KEY}.1"}
    for slot, grey in enumerate(pixels["images"][0, :, 0, 0, 0].tolist()):
        expected = embedding(greys[grey]) if grey else np.zeros((2, 3))
        assert np.array_equal(stored["embeddings"][0, slot], expected)


def test_a_mixed_batch_has_one_kind_of_slots(index: SampleIndex, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = write(index, tmp_path / "store")
    other = SourceConfig(name="p", kind="interleaved", shards=index.paths[0])
    with pytest.raises(ConfigError, match=r"^data\.sources\.p\.embeddings: not set, while s has them"):
        _batch(_config(index, directory, other), tokenizer)
    config = _config(index, directory, other, mixing="one_source_per_step")
    pipeline = open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer, store_settings=SETTINGS)
    kinds = {batch.sources[0]: "embeddings" in batch.fields for batch in (pipeline.batch(0), pipeline.batch(1))}
    assert kinds == {"s": True, "p": False}
