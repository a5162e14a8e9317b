"""Each source, on a small sample true to how it is distributed: converted, looked through, and read as documents."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tiny_shards import WORDS, WriteShard, cut_picture, picture
from tiny_videos import video

from data_pipelines.corpora import SOURCES, mmc4, obelics, storyboard, text
from data_pipelines.corpora.validate import validate
from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.interleave import DocumentRules, outline, read_document
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

TEXT_FIRST = DocumentRules(visual_tokens=1, image_size=4, max_positions=400, max_images=20, image_first_probability=0.0)


def documents(
    shards: Sequence[Path], source: str, tokenizer: Tokenizer, caption: str = "txt", **rules: Any
) -> list[str]:
    """The documents that training makes of the shards, as words: each image by its grey."""
    found = []
    index = open_index([str(path) for path in shards], IndexRules(SOURCES[source], tokenizer, caption))
    rule = dataclasses.replace(TEXT_FIRST, **rules)
    for sample in range(len(index)):
        plan = outline(index, sample, rule, seed=0)
        document, bad = read_document(index, ShardReader(index.paths), tokenizer, sample, plan, rule)
        assert document is not None and not bad
        words = tokenizer.decode(document.tokens.tolist()).replace("[gIMG]", "<image>")
        for image in document.images:
            words = words.replace("[IMG] <image> [/IMG]", f"({image[0, 0, 0]})", 1)
        found.append(words.removeprefix("<s> ").removesuffix(" </s>"))
    return found


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tar"))


# --- as they are downloaded: img2dataset, video2dataset, GRIT ---------------------------------------------------------


def download(write_shard: WriteShard, samples: Sequence[dict[str, bytes]], successes: int | None = None) -> str:
    """A shard with the files that img2dataset leaves beside it."""
    members = [(f"{i:09d}.{suffix}", data) for i, sample in enumerate(samples) for suffix, data in sample.items()]
    path = write_shard("00000.tar", members)
    stats = {"count": len(samples) + 2, "successes": len(samples) if successes is None else successes, "failed": 2}
    Path(path).with_name("00000_stats.json").write_text(json.dumps(stats))
    table = pyarrow.Table.from_pylist([{"key": f"{i:09d}", "status": "success"} for i in range(len(samples))])
    pyarrow.parquet.write_table(table, Path(path).with_name("00000.parquet"))
    return path


def meta(**fields: Any) -> bytes:
    return json.dumps({"url": "http://a", "key": "0", "status": "success", "width": 8, "height": 8, **fields}).encode()


def test_img2dataset(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    samples = [
        {"jpg": picture(7), "txt": b"red cat", "json": meta(caption="red cat", capsfusion="a red cat")},
        {"jpg": picture(9), "txt": b"dog", "json": meta(caption="dog", capsfusion="one blue dog")},
    ]
    path = download(write_shard, samples)
    assert documents([Path(path)], "img2dataset", tokenizer) == ["red cat (7)", "dog (9)"]
    fused = documents([Path(path)], "img2dataset", tokenizer, caption="json.capsfusion")
    assert fused[1] == "one blue dog (9)"
    found = validate([path], "img2dataset", caption="json.capsfusion")
    assert list(found.lines()) == ["1 shards, 2 samples that can be used, 2 images, 2 texts"]
    found.check()


def test_what_is_wrong_with_a_download_is_counted_and_said(write_shard: WriteShard) -> None:
    samples = [
        {"jpg": picture(7), "txt": b"red cat"},
        {"jpg": cut_picture(7), "txt": b"red cat"},
        {"jpg": picture(7), "txt": b"\xff"},
        {"jpg": picture(7)},
    ]
    path = download(write_shard, samples, successes=5)
    found = validate([path], "img2dataset")
    assert (found.samples, dict(found.bad)) == (1, {"damaged_image": 1, "invalid_utf8": 1, "missing_text": 1})
    assert dict(found.remarks) == {"other_statistics": 1}
    assert found.examples["other_statistics"] == (
        f"{path}: holds 4 samples, but 00000_stats.json says 5; the download may have been resumed"
    )
    assert any(line.startswith(f"damaged_image 1; for example damaged_image: {path}, sample '000000001', byte ")
               for line in found.lines())  # fmt: skip
    found.check()
    Path(path).with_name("00000_stats.json").unlink()
    found = validate([path], "img2dataset", samples_per_shard=1, threads=2)
    assert "may not have been finished" in found.examples["no_statistics"] and found.samples == 1
    Path(path).with_name("00000_stats.json").write_text("[]")
    assert dict(validate([path], "img2dataset").remarks) == {"bad_statistics": 1}
    assert not validate([path], "image_text").remarks


def test_shards_of_another_layout_are_refused(write_shard: WriteShard, tmp_path: Path) -> None:
    good = write_shard("good.tar", [("a.jpg", picture(1)), ("a.txt", b"cat")])
    audio = write_shard("audio.tar", [("a.flac", b"x")])
    (tmp_path / "cut.tar").write_bytes(Path(good).read_bytes()[:700])
    found = validate([good, audio, str(tmp_path / "cut.tar")], "img2dataset")
    assert (found.shards, len(found.broken)) == (1, 2)
    with pytest.raises(DataError, match=r"audio\.tar: holds no part of an image_text sample.*and 1 more broken"):
        found.check()
    useless = validate([write_shard("useless.tar", [("a.jpg", picture(1))])], "img2dataset")
    with pytest.raises(DataError, match="no sample can be used; for example missing_text"):
        useless.check()


def test_video2dataset(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    samples = [
        {"mp4": video(16), "txt": b"red cat", "json": meta(caption="red cat", videoid=7)},
        {"mp4": video(16)[:200], "txt": b"dog", "json": meta(caption="dog")},
    ]
    path = download(write_shard, samples)
    found = validate([path], "video2dataset")
    assert next(iter(found.lines())) == "1 shards, 1 samples that can be used, 2 texts, 1 videos"
    assert dict(found.bad) == {"damaged_video": 1}
    (document,) = documents([Path(download(write_shard, samples[:1]))], "video2dataset", tokenizer, video_frames=2)
    assert document.startswith("red cat [VIDEO] (") and document.count("(") == 2


def test_grit(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    boxes = {"noun_chunks": [[0, 3, 0.0, 0.25, 0.5, 1.0, 0.79]], "ref_exps": [[0, 3, 0.0, 0.25, 0.5, 1.0, 0.79]]}
    samples = [
        {"jpg": picture(7), "txt": b"cat on red", "json": meta(caption="cat on red", **boxes)},
        {"jpg": picture(7), "txt": b"cat", "json": meta(caption="cat", noun_chunks=[[0, 9, 0, 0, 1, 1, 1]])},
        {"jpg": picture(7), "txt": b"cat", "json": b"{"},
    ]
    path = download(write_shard, samples)
    found = validate([path], "grit")
    assert (found.samples, dict(found.bad)) == (1, {"malformed_boxes": 1, "invalid_json": 1})
    (document,) = documents([Path(path)], "grit", tokenizer)
    assert document == (
        "<grounding> <phrase> cat </phrase> <object> <patch_index_0000> <patch_index_0056> <patch_index_0112> "
        "<patch_index_0224> </object> on red (7)"
    )


# --- interleaved documents: MMC4, OBELICS, storyboards ----------------------------------------------------------------


def mmc4_document(texts: Sequence[str], images: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """A document as MMC4 has it; `images` are names and the sentences they are matched to."""
    return {
        "text_list": list(texts),
        "image_info": [
            {
                "image_name": name,
                "raw_url": f"http://pictures/{name}",
                "matched_text_index": index,
                "matched_sim": 0.27,
                "face_detections": None,
            }
            for name, index in images
        ],
        "similarity_matrix": [[0.1] * len(texts)] * len(images),
        "url": "http://page",
        "could_have_url_duplicate": 0,
    }


def mmc4_zip(path: Path, lines: Sequence[Any]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_mmc4(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "images" / "shard_0").mkdir(parents=True)
    for grey, name in enumerate(("a.jpg", "b.jpg", "c.png", "d.jpg")):
        (tmp_path / "images" / "shard_0" / name).write_bytes(picture(grey))
    lines = [
        mmc4_document(["cat", "dog", "red"], [("b.jpg", 2), ("a.jpg", 0)]),
        mmc4_document(["one", "two"], [("gone.jpg", 0), ("c.png", 1), ("d.jpg", 1)]),
        mmc4_document(["blue"], [("gone.jpg", 0)]),
        mmc4_document([], []),
        {"image_info": []},
        mmc4_document(["on"], [("a.jpg", 7)]),
    ]
    zipped = mmc4_zip(tmp_path / "docs_no_face_shard_0_v3.jsonl.zip", lines)
    counts = mmc4.convert([zipped], [tmp_path / "images"], tmp_path / "out", samples_per_shard=3)
    assert counts == {
        "samples": 4,
        "images": 4,
        "missing_image": 2,
        "documents_without_images": 2,
        "empty_document": 1,
        "malformed_document": 1,
        "malformed_image_info": 1,
    }
    shards = shards_of(tmp_path / "out")
    assert [path.name for path in shards] == ["mmc4-000000.tar", "mmc4-000001.tar"]
    assert documents(shards, "mmc4", tokenizer) == ["cat (0) dog red (1)", "one two (2) (3)", "blue", "on"]
    sampled = documents(shards, "mmc4", tokenizer, images_per_document=8)
    assert sampled == ["cat (0) red (1)", "two (2) (3)", "blue", "on"]
    found = validate([str(path) for path in shards], "mmc4")
    assert (found.samples, found.parts) == (4, {"images": 4, "texts": 7})
    summary = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert summary["source"] == "mmc4" and summary["counts"]["missing_image"] == 2


def test_images_downloaded_with_img2dataset_are_found_by_their_url(
    tmp_path: Path, write_shard: WriteShard, tokenizer: Tokenizer
) -> None:
    images = download(
        write_shard,
        [{"jpg": picture(5), "json": meta(url="http://pictures/a.jpg")}, {"jpg": picture(6), "json": b"not json"}],
    )
    zipped = mmc4_zip(tmp_path / "docs.jsonl.zip", [mmc4_document(["cat"], [("a.jpg", 0)])])
    counts = mmc4.convert([zipped], [Path(images)], tmp_path / "out")
    assert documents(shards_of(tmp_path / "out"), "mmc4", tokenizer) == ["cat (5)"] and counts["images"] == 1


def test_obelics(tmp_path: Path, write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    urls = {name: f"http://pictures/{name}" for name in "abcd"}
    images = download(write_shard, [{"jpg": picture(i), "json": meta(url=urls[name])} for i, name in enumerate("abc")])
    rows = [
        {  # a page: text, picture, text, two pictures, text, one that is gone, text
            "images": [None, urls["a"], None, urls["b"], urls["c"], None, urls["d"], None],
            "texts": ["one", None, "two", None, None, "three", None, "four"],
            "metadata": "[]",
            "general_metadata": '{"url": "http://page"}',
        },
        {"images": [urls["d"]], "texts": [None], "metadata": "[]", "general_metadata": "{"},
        {"images": [None], "texts": [], "metadata": "[]", "general_metadata": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "obelics-train-00000.parquet")
    counts = obelics.convert([tmp_path / "obelics-train-00000.parquet"], [Path(images)], tmp_path / "out")
    assert counts == {
        "samples": 1,
        "images": 3,
        "missing_image": 2,
        "documents_without_images": 0,
        "empty_document": 1,
        "malformed_document": 1,
    }
    shards = shards_of(tmp_path / "out")
    assert documents(shards, "obelics", tokenizer) == ["one two (0) (1) three (2) four"]
    image_first = documents(shards, "obelics", tokenizer, image_first_probability=1.0)
    assert image_first == ["one (0) two (1) (2) three four"]
    assert documents(shards, "obelics", tokenizer, images_per_document=8) == ["two (0) (1) three (2)"]


def test_storyboard(tmp_path: Path, write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "boards" / "video_a"
    folder.mkdir(parents=True)
    for i in range(11):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.txt").write_text(WORDS[i % 10])
    (folder / "3.txt").unlink()  # nothing was said
    (folder / "info.json").write_text("{}")
    tar = write_shard("b.tar", [("x/1.txt", b"dog"), ("x/0.png", picture(50)), ("x/0.txt", b"cat"), ("y/0.txt", b"on")])
    alone = write_shard("video_z.tar", [("0.png", picture(60)), ("0.txt", b"red")])
    counts = storyboard.convert([tmp_path / "boards", Path(tar), Path(alone)], tmp_path / "out")
    assert counts == {"samples": 4, "frames": 13, "other_file": 1}
    shards = shards_of(tmp_path / "out")
    texts = [f"{WORDS[i % 10]} ({i})" if i != 3 else "(3)" for i in range(11)]
    assert documents(shards, "storyboard", tokenizer) == [" ".join(texts), "cat (50) dog", "on", "red (60)"]
    assert validate([str(path) for path in shards], "storyboard").samples == 4
    with pytest.raises(DataError, match=r"wanted a directory or a \.tar"):
        storyboard.convert([tmp_path / "boards" / "video_a" / "0.png"], tmp_path / "other")


# --- language alone ---------------------------------------------------------------------------------------------------


def test_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        {"text": "cat dog", "meta": {"pile_set_name": "Books3"}},
        {"text": " "},
        {"body": "red"},
        {"text": "on\nred "},
    ]
    path = tmp_path / "00.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    counts = text.convert([path], tmp_path / "out")
    assert counts == {"samples": 2, "split_documents": 0, "empty_text": 1, "missing_text": 1}
    assert documents(shards_of(tmp_path / "out"), "text", tokenizer) == ["cat dog", "on red"]
    assert validate([str(path) for path in shards_of(tmp_path / "out")], "text").parts == {"texts": 2}


def test_long_texts_are_split_without_losing_a_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    long = " ".join(rng.choice(WORDS, 1000))
    table = pyarrow.Table.from_pylist([{"content": long}, {"content": "cat"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    counts = text.convert(
        [tmp_path / "a.parquet"], tmp_path / "out", field="content", tokenizer=tokenizer, max_tokens=30
    )
    pieces = documents(shards_of(tmp_path / "out"), "text", tokenizer)
    assert (counts["split_documents"], counts["samples"]) == (1, len(pieces))
    assert " ".join(pieces[:-1]) == long and pieces[-1] == "cat"
    lengths = [len(piece.split()) for piece in pieces]
    assert max(lengths) <= 30 and len(pieces) <= 40


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_an_unfinished_conversion_starts_anew(tmp_path: Path) -> None:
    good, cut = tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"
    good.write_text('{"text": "cat"}\n' * 5)
    cut.write_bytes(zstandard.compress(b'{"text": "cat"}\n' * 5)[:-4])
    with pytest.raises(DataError, match=r"b\.jsonl\.zst: cannot be read beyond line"):
        text.convert([good, cut], tmp_path / "out", samples_per_shard=2)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "convert.json").exists()
    assert text.convert([good], tmp_path / "out", samples_per_shard=2)["samples"] == 5
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(DataError, match=r"out: exists already"):
        text.convert([good], tmp_path / "out")
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(DataError, match=r"other\.partial: is in the way"):
        text.convert([good], tmp_path / "other")


def test_a_conversion_of_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"no sample could be written \(empty_text 1\)"):
        text.convert([tmp_path / "a.jsonl"], tmp_path / "out")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="--images: no picture in"):
        mmc4.convert([], [tmp_path / "images"], tmp_path / "out")
