from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from shard_damage import Damage, apply, damages_of, is_intact, shard_of
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines import kinds
from data_pipelines.image_header import FORMATS
from data_pipelines.index import scan_shard, split_name
from data_pipelines.index_files import IndexRules, open_shard
from data_pipelines.kinds import part_slot
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("0007.png", ("0007", "png")),
        ("a.b/c/0007.0.PNG", ("a.b/c/0007", "0.png")),
        ("./0007.txt", ("./0007", "txt")),
        ("README", None),
        (".hidden", None),
        ("__meta.txt__", None),
    ],
)
def test_keys_end_at_the_first_dot(name: str, split: tuple[str, str] | None) -> None:
    assert split_name(name) == split


@pytest.mark.parametrize(
    ("kind", "suffix", "slot"),
    [
        ("image_text", "txt", (0, False)),
        ("image_text", "0.txt", (0, False)),
        ("image_text", "jpeg", (0, True)),
        ("image_text", "0.webp", (0, True)),
        ("image_text", "1.png", None),
        ("image_text", "json", None),
        ("interleaved", "12.txt", (12, False)),
        ("interleaved", "0.jpg", (0, True)),
        ("interleaved", "txt", None),
        ("interleaved", "v1.jpg", None),
        ("text", "txt", (0, False)),
        ("text", "png", None),
    ],
)
def test_suffixes_of_each_kind(kind: str, suffix: str, slot: tuple[int, bool] | None) -> None:
    assert part_slot(kind, suffix) == slot  # type: ignore[arg-type]


def test_parts_are_grouped_wherever_they_lie(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    image = picture(1)
    path = write_shard(
        "a.tar",
        [
            ("b.1.png", image),
            ("a.0.txt", b"red cat"),
            ("b.0.txt", b" dog\n"),
            ("a.1.txt", b"and"),
            ("a.0.png", image),
            ("b.1.txt", b"blue blue dog"),
            ("a.json", b"{}"),
            ("b.10.txt", b"one"),
        ],
    )
    index = scan_shard(path, "interleaved", tokenizer)
    assert [index.key(s) for s in range(len(index))] == ["b", "a"]
    assert index.starts.tolist() == [0, 4, 7]
    assert index.slots.tolist() == [0, 1, 1, 10, 0, 0, 1]
    assert index.is_image.tolist() == [False, False, True, False, False, True, False]
    assert index.tokens.tolist() == [1, 3, 0, 1, 2, 0, 1]
    assert index.num_tokens.tolist() == [5, 3] and index.num_images.tolist() == [1, 1]
    reader = ShardReader(index.paths)
    assert reader.read(0, int(index.offsets[1]), int(index.sizes[1])) == b"blue blue dog"


def test_webdataset_reads_the_same_samples(write_shard: WriteShard) -> None:
    members = []
    for i in range(5):
        members += [(f"x/{i}.json", b"{}"), (f"x/{i}.PNG", picture(i)), (f"x/{i}.txt", WORDS[i].encode())]
    path = write_shard("a.tar", members)
    index = scan_shard(path, "image_text", None)
    reader = ShardReader(index.paths)
    ours = []
    for s in range(len(index)):
        first = int(index.starts[s])
        text, image = (reader.read(0, int(index.offsets[p]), int(index.sizes[p])) for p in (first, first + 1))
        ours.append((index.key(s), text, image))
    theirs = [(s["__key__"], s["txt"], s["png"]) for s in webdataset.WebDataset(path, shardshuffle=False)]
    assert ours == theirs


# --- what is wrong with a sample is counted ---------------------------------------------------------------------------


def test_missing_and_foreign_layout(write_shard: WriteShard, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: shard does not exist"):
        scan_shard(str(tmp_path / "gone.tar"), "text", tokenizer)
    path = write_shard("a.tar", [("a.flac", b"x"), ("b.flac", b"x"), ("b.cls", b"x")])
    with pytest.raises(DataError, match=r"no part of an image_text sample; found \.flac \(2\), \.cls \(1\)"):
        scan_shard(path, "image_text", tokenizer)


def test_bad_samples_are_left_out_and_counted(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    image = picture(1)
    path = write_shard(
        "a.tar",
        [
            ("good.png", image),
            ("good.txt", b"cat"),
            ("lonely.png", image),
            ("mute.txt", b"cat"),
            ("latin.png", image),
            ("latin.txt", "caf\xe9".encode("latin-1")),
            ("blank.png", image),
            ("blank.txt", b" \n"),
            ("twice.png", image),
            ("twice.jpg", image),
            ("twice.txt", b"cat"),
            ("again.txt", b"cat"),
            ("again.png", image),
            ("again.txt", b"dog"),
            ("nul.png", image),
            ("nul.txt", b"cat\0dog"),
            ("k" * 1100 + ".txt", b"cat"),
            ("k" * 1100 + ".png", image),
            ("other.json", b"{}"),
        ],
    )
    index = scan_shard(path, "image_text", tokenizer)
    assert [index.key(s) for s in range(len(index))] == ["good"]
    assert [(b.cause, b.key) for b in index.bad] == [
        ("missing_text", "lonely"),
        ("missing_image", "mute"),
        ("invalid_utf8", "latin"),
        ("empty_text", "blank"),
        ("duplicate_part", "twice"),
        ("duplicate_part", "again"),
        ("nul_in_text", "nul"),
        ("long_key", "k" * 1024),
    ]
    with tarfile.open(path) as tar:
        assert index.bad[2].offset == tar.getmember("latin.txt").offset
        places = [member.offset for member in tar.getmembers() if member.name == "again.txt"]
    assert f"two texts for slot 0, at bytes {places[0]} and {places[1]}" in index.bad[5].detail
    assert str(index.bad[0]).startswith(f"missing_text: {path}, sample 'lonely', byte ")


def test_samples_are_the_same_without_a_tokenizer(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat"), ("b.txt", b"\xff"), ("c.txt", b"dog")])
    with_it, without = scan_shard(path, "text", tokenizer), scan_shard(path, "text", None)
    assert (with_it.digest, with_it.bad) == (without.digest, without.bad)
    assert (with_it.tokens.tolist(), without.tokens.tolist()) == ([2, 1], [0, 0])
    assert len(scan_shard(path, "text", None, contents=False)) == 3  # nothing but headers is known


def test_enormous_texts_are_left_out_unread(
    write_shard: WriteShard, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "MAX_TEXT_BYTES", 100)
    path = write_shard("a.tar", [("a.txt", b"cat"), ("b.txt", b"cat " * 26), ("c.txt", b"\0cat\0 dog"), ("d.txt", b"")])
    index = scan_shard(path, "text", tokenizer)
    assert [index.key(s) for s in range(len(index))] == ["a"]
    causes = [("text_too_large", "b"), ("nul_in_text", "c"), ("empty_text", "d")]
    assert [(b.cause, b.key) for b in index.bad] == causes


def test_each_caption_has_an_index_of_its_own(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    members = [("a.jpg", picture(1)), ("a.txt", b"cat"), ("a.json", b'{"long": "one red cat"}')]
    path = write_shard("a.tar", members)
    for _ in range(2):
        assert open_shard(path, IndexRules("image_text", tokenizer)).num_tokens.tolist() == [1]
        assert open_shard(path, IndexRules("image_text", tokenizer, "json.long")).num_tokens.tolist() == [3]
    names = sorted(os.listdir(Path(path).parent))
    assert names == ["a.tar", "a.tar.image_text.index", "a.tar.image_text.json.long.index"]


def test_images_are_measured_by_their_first_bytes(write_shard: WriteShard) -> None:
    exif = b"\xff\xd8\xff\xe1" + (9000).to_bytes(2) + bytes(8998)  # a long EXIF segment before the size
    jpeg = exif + picture(1, size=24, file_format="JPEG")[2:]
    members = [("a.png", picture(1, size=12)), ("b.jpg", jpeg), ("c.jpg", picture(3, 40, "WEBP")), ("d.png", b"no")]
    path = write_shard("a.tar", [part for name, data in members for part in ((name, data), (name[0] + ".txt", b"cat"))])
    index = scan_shard(path, "image_text", None)
    images = np.flatnonzero(index.is_image)
    assert [FORMATS[i] for i in index.formats[images]] == ["PNG", "JPEG", "WEBP", ""]
    assert index.widths[images].tolist() == index.heights[images].tolist() == [12, 24, 40, 0]
    assert not index.widths[~index.is_image].any()


_PAIRS: list[tuple[str, bytes]] = [
    part for i in range(5) for part in ((f"{i}.png", bytes([i]) * (400 + 300 * i)), (f"{i}.txt", WORDS[i].encode()))
]
_SHARD, _PARTS = shard_of(_PAIRS)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=damages_of(_SHARD))
def test_every_intact_sample_of_a_damaged_shard_is_used(
    tmp_path: Path, tokenizer: Tokenizer, damages: list[Damage]
) -> None:
    content, origins = apply(_SHARD, damages)
    path = tmp_path / "fuzz.tar"
    path.write_bytes(content)
    try:
        index = scan_shard(str(path), "image_text", tokenizer, salvage=True)
    except DataError as error:  # nothing is left, and nothing looks damaged
        assert str(error).startswith(f"{path}: holds no part") and set(origins[: len(content)]) <= {-1}
        return
    found = {}
    for sample in range(len(index)):
        parts = range(int(index.starts[sample]), int(index.starts[sample + 1]))
        places = [(int(index.offsets[part]), int(index.sizes[part])) for part in parts]
        found[index.key(sample)] = [content[offset : offset + size] for offset, size in places]
    for i in range(5):
        image, text = _PARTS[2 * i], _PARTS[2 * i + 1]
        if is_intact(*image, origins) and is_intact(*text, origins):
            assert found[str(i)] == [_PAIRS[2 * i + 1][1], _PAIRS[2 * i][1]]
    assert all(bad.shard == str(path) and bad.cause and 0 <= bad.offset < len(content) + 512 for bad in index.bad)


def test_digest_changes_with_the_samples_alone(write_shard: WriteShard) -> None:
    def digest(name: str, *members: tuple[str, bytes]) -> str:
        return scan_shard(write_shard(name, members), "text", None).digest

    one = digest("a.tar", ("a.txt", b"cat"), ("b.txt", b"dog"))
    assert one == digest("renamed.tar", ("a.txt", b"cat"), ("a.json", b"{}"), ("b.txt", b"dog"))
    others = [(("b.txt", b"dog"), ("a.txt", b"cat")), (("a.txt", b"cat"), ("b.txt", b"dogs")), (("a.txt", b"cat"),)]
    assert one not in [digest(f"{i}.tar", *members) for i, members in enumerate(others)]
