from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines import kinds
from data_pipelines.index import (
    SampleIndex,
    index_paths,
    load_index,
    open_index,
    open_shard,
    part_slot,
    scan_shard,
    scan_tar,
    split_name,
)
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "a.tar"
    names = ["a.txt", "dir/b.png", "d" * 80 + "/" + "e" * 60 + ".txt", "ünïcode.txt", "empty.txt"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append("f" * 300 + ".txt")
    with tarfile.open(path, "w", format=tar_format) as tar:
        directory = tarfile.TarInfo("dir")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty.txt" else 511 + i
            info.mtime = 0.5 if tar_format == tarfile.PAX_FORMAT else 0  # a pax record that is not ours
            tar.addfile(info, io.BytesIO(b"x" * info.size))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in scan_tar(str(path))] == expected
    assert [name for name, _, _ in expected] == names


def test_sizes_in_base_256(write_shard: WriteShard) -> None:
    path = write_shard("a.tar", [("a.txt", b"cat")])
    header = bytearray(Path(path).read_bytes())
    header[124:136] = b"\x80" + (3).to_bytes(11)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    Path(path).write_bytes(header)
    assert [(m.name, m.size) for m in scan_tar(path)] == [("a.txt", 3)]


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


# --- what is wrong with a shard stops; what is wrong with a sample is counted -----------------------------------------


def _broken(case: str, data: bytes) -> bytes:
    second = 512 + 512  # header of the second member: the first holds 3 bytes
    return {
        "empty": b"",
        "foreign": b"not a tar at all" * 100,
        "short": b"x" * 100,
        "gzip": gzip.compress(data),
        "cut in a member": data[: second + 512 + 20],
        "cut in a header": data[: second + 100],
        "no end mark": data[: second + 512 + 1024],
        "damaged header": data[: second + 10] + b"###" + data[second + 13 :],
        "joined": data + data,
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "shard has 0 bytes"),
        ("foreign", "is not a tar file: no tar header at byte 0"),
        ("short", "cut: the file ends without the end mark of a tar at byte 0"),
        ("gzip", "is compressed; wanted a plain tar"),
        ("cut in a member", r"cut: member 'a\.png' at byte 1024 has 600 bytes, but the file ends at byte 1556"),
        ("cut in a header", r"cut: the file ends without the end mark of a tar at byte 1024, after member 'a\.txt'"),
        ("no end mark", r"cut: the file ends without the end mark of a tar at byte 2560, after member 'a\.png'"),
        ("damaged header", r"damaged: no tar header at byte 1024, after member 'a\.txt'"),
        ("joined", r"data at byte \d+ after the end mark at byte 2560"),
    ],
)
def test_broken_shards_are_named_with_member_and_offset(
    write_shard: WriteShard, tokenizer: Tokenizer, case: str, message: str
) -> None:
    path = write_shard("bad.tar", [("a.txt", b"cat"), ("a.png", b"x" * 600)])
    Path(path).write_bytes(_broken(case, Path(path).read_bytes()))
    with pytest.raises(DataError, match=rf"^{path}: .*{message}"):
        open_shard(path, "image_text", tokenizer)


def test_missing_and_foreign_layout(write_shard: WriteShard, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: shard does not exist"):
        open_shard(str(tmp_path / "gone.tar"), "text", tokenizer)
    path = write_shard("a.tar", [("a.flac", b"x"), ("b.flac", b"x"), ("b.cls", b"x")])
    with pytest.raises(DataError, match=r"no part of an image_text sample; found \.flac \(2\), \.cls \(1\)"):
        open_shard(path, "image_text", tokenizer)


def test_every_broken_shard_is_counted(write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = write_shard("good.tar", [("a.txt", b"cat")])
    broken = [str(tmp_path / f"{i}.tar") for i in range(3)]
    for path in broken:
        Path(path).write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.tar: shard has 0 bytes.*\(and 2 more broken shards\)"):
        open_index([good, *broken], "text", tokenizer)


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
    ]
    with tarfile.open(path) as tar:
        assert index.bad[2].offset == tar.getmember("latin.txt").offset
    assert str(index.bad[0]).startswith(f"missing_text: {path}, sample 'lonely', byte ")


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
        assert open_shard(path, "image_text", tokenizer).num_tokens.tolist() == [1]
        assert open_shard(path, "image_text", tokenizer, caption="json.long").num_tokens.tolist() == [3]
    names = sorted(os.listdir(Path(path).parent))
    assert names == ["a.tar", "a.tar.image_text.index.npz", "a.tar.image_text.json.long.index.npz"]


# --- the stored index -------------------------------------------------------------------------------------------------


def _same(a: SampleIndex, b: SampleIndex) -> bool:
    names = ("keys", "starts", "offsets", "sizes", "is_image", "slots", "tokens")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names) and a.bad == b.bad


def test_index_is_stored_beside_the_shard_and_read_back(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat"), ("b.txt", b"\xff")])
    built = open_shard(path, "text", tokenizer)
    assert os.listdir(Path(path).parent) and index_paths(path, "text")[0] == Path(f"{path}.text.index.npz")
    assert sorted(os.listdir(Path(path).parent)) == ["a.tar", "a.tar.text.index.npz"]
    stored = load_index(path, "text", tokenizer)
    assert stored is not None and _same(stored, built)
    assert load_index(path, "text", None) is not None
    assert load_index(path, "interleaved", tokenizer) is None


def test_index_is_rebuilt_when_shard_or_tokenizer_change(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    open_shard(path, "text", tokenizer)
    write_shard("a.tar", [("b.txt", b"dog")])  # as many bytes as before
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_index(path, "text", tokenizer) is None
    assert open_shard(path, "text", tokenizer).key(0) == "b"
    other = object.__new__(Tokenizer)
    other.__dict__.update(tokenizer.__dict__, fingerprint="another")
    assert load_index(path, "text", other) is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 garbage", b"\x93NUMPY"])
def test_damaged_index_is_rebuilt(write_shard: WriteShard, tokenizer: Tokenizer, damage: bytes) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    built = open_shard(path, "text", tokenizer)
    sidecar = index_paths(path, "text")[0]
    sidecar.write_bytes(damage or sidecar.read_bytes()[:-50])
    assert load_index(path, "text", tokenizer) is None
    assert _same(open_shard(path, "text", tokenizer), built)
    assert load_index(path, "text", tokenizer) is not None


def test_index_goes_to_the_cache_when_the_data_cannot_be_written(
    write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    beside, cached = index_paths(path, "text")
    (beside / "in the way").mkdir(parents=True)  # a directory cannot be replaced by a file, not even by root
    built = open_shard(path, "text", tokenizer)
    assert cached.exists()
    stored = load_index(path, "text", tokenizer)
    assert stored is not None and _same(stored, built)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_samples_of_several_shards_are_numbered_through(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    paths = [write_shard(f"{i}.tar", [(f"{i}{j}.txt", b"cat " * (j + 1)) for j in range(i + 1)]) for i in range(3)]
    index = open_index(paths, "text", tokenizer)
    assert [index.key(s) for s in range(6)] == ["00", "10", "11", "20", "21", "22"]
    assert index.shards.tolist() == [0, 1, 1, 2, 2, 2]
    assert index.num_tokens.tolist() == [1, 1, 2, 1, 2, 3]
    assert index.starts.tolist() == [0, 1, 2, 3, 4, 5, 6]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_an_index_or_a_data_error(tmp_path: Path, tokenizer: Tokenizer, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in [("a.0.txt", b"cat"), ("b" * 120 + ".1.txt", b"dog"), ("a.0.png", b"x" * 30)]:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    content = bytearray(buffer.getvalue()[:8192])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a header whose checksum holds in spite of the damage
        start = 512 * data.draw(st.integers(0, 6))
        content[start + 148 : start + 156] = b"        "
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path = tmp_path / "fuzz.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        scan_shard(str(path), "interleaved", tokenizer)
    except DataError as error:
        assert str(error).startswith(str(path))
