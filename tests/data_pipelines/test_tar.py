from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shard_damage import Damage, apply, damages_of, is_intact, shard_of
from tiny_shards import WriteShard

from data_pipelines.shards import open_forward
from data_pipelines.tar import Members, scan_members
from emu2_jax.errors import DataError


def _scan(path: str, *, salvage: bool = False) -> Members:
    with open_forward(path) as file:
        return scan_members(path, file, salvage=salvage, wanted=lambda name, size: min(size, 1000))


def _columns(members: Members) -> list[tuple[str, int, int]]:
    return list(zip(members.names, members.offsets, members.sizes, strict=True))


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
    assert _columns(_scan(str(path))) == expected
    assert [name for name, _, _ in expected] == names


def test_sizes_in_base_256(write_shard: WriteShard) -> None:
    path = write_shard("a.tar", [("a.txt", b"cat")])
    header = bytearray(Path(path).read_bytes())
    header[124:136] = b"\x80" + (3).to_bytes(11)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    Path(path).write_bytes(header)
    assert _columns(_scan(path)) == [("a.txt", 512, 3)]


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
def test_broken_shards_are_named_with_member_and_offset(write_shard: WriteShard, case: str, message: str) -> None:
    path = write_shard("bad.tar", [("a.txt", b"cat"), ("a.png", b"x" * 600)])
    Path(path).write_bytes(_broken(case, Path(path).read_bytes()))
    with pytest.raises(DataError, match=rf"^{path}: .*{message}"):
        _scan(path)


# --- salvage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "names", "damage"),
    [
        ("empty", [], [("empty_shard", 0)]),
        ("foreign", [], [("foreign_shard", 0)]),
        ("short", [], [("cut_shard", 0)]),
        ("gzip", [], [("compressed_shard", 0)]),
        ("cut in a member", ["a.txt"], [("cut_member", 1024)]),
        ("cut in a header", ["a.txt"], [("cut_shard", 1024)]),
        ("no end mark", ["a.txt", "a.png"], [("cut_shard", 2560)]),
        ("damaged header", ["a.txt"], [("damaged_header", 1024)]),
        ("joined", ["a.txt", "a.png", "a.txt", "a.png"], [("data_after_end", 10240)]),
    ],
)
def test_salvage_keeps_what_is_whole(
    write_shard: WriteShard, case: str, names: list[str], damage: list[tuple[str, int]]
) -> None:
    path = write_shard("bad.tar", [("a.txt", b"cat"), ("a.png", b"x" * 600)])
    Path(path).write_bytes(_broken(case, Path(path).read_bytes()))
    members = _scan(path, salvage=True)
    assert members.names == names
    assert [(found.cause, found.offset) for found in members.damage] == damage
    assert members.cut == ([("a.png", 1024)] if case == "cut in a member" else [])


def test_salvage_of_a_whole_shard_finds_nothing_wrong(write_shard: WriteShard) -> None:
    path = write_shard("a.tar", [(f"{i}.txt", b"cat" * 300 * i) for i in range(40)])
    assert _scan(path, salvage=True) == _scan(path)


def test_missing_bytes_take_their_own_member_only(write_shard: WriteShard) -> None:
    path = write_shard("a.tar", [(f"{i}.txt", bytes([65 + i]) * 1500) for i in range(4)])
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: 2048 + 700] + whole[2048 + 800 :])  # 100 bytes out of the data of 1.txt
    members = _scan(path, salvage=True)
    assert members.names == ["0.txt", "2.txt", "3.txt"] and members.cut == [("1.txt", 2048)]
    with open_forward(path) as file:
        assert [file.at(offset, 1500)[-1:] for offset in members.offsets] == [b"A", b"C", b"D"]


# --- damage of every kind ---------------------------------------------------------------------------------------------

#: Name and data of the members of the fuzzed shard; sizes around the blocks of a tar, one name that needs a pax header.
_SIZES = (3, 511, 512, 513, 1400, 30, 0, 2000)
_MEMBERS = [(f"{i}.txt", bytes((i * 37 + j * 11) % 251 for j in range(size))) for i, size in enumerate(_SIZES)]
_MEMBERS.insert(3, ("b" * 120 + ".txt", b"x" * 40))
_SHARD, _PARTS = shard_of(_MEMBERS)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=damages_of(_SHARD))
@example(damages=[("zero", 0, 512)])
@example(damages=[("cut", _PARTS[-1][1], 0)])
def test_every_intact_member_of_a_damaged_shard_is_found(tmp_path: Path, damages: list[Damage]) -> None:
    """Neither a crash nor a hang, and what was not touched is there, under its name and with its bytes."""
    content, origins = apply(_SHARD, damages)
    path = tmp_path / "fuzz.tar"
    path.write_bytes(content)
    members = _scan(str(path), salvage=True)
    found: dict[str, bytes] = {}
    for name, offset, size in _columns(members):
        found.setdefault(name, content[offset : offset + size])
    for (name, body), (start, stop) in zip(_MEMBERS, _PARTS, strict=True):
        if is_intact(start, stop, origins):
            assert found.get(name) == body, name
    try:
        assert _scan(str(path)).damage == []
    except DataError as error:
        assert str(error).startswith(f"{path}: ")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_headers_with_a_right_checksum_and_wrong_contents(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(_SHARD)
    header = data.draw(st.sampled_from([start for start, _ in _PARTS]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[header + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    content[header + 148 : header + 156] = b"        "
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    path = tmp_path / "fuzz.tar"
    path.write_bytes(content)
    for salvage in (True, False):
        try:
            members = _scan(str(path), salvage=salvage)
        except DataError as error:
            assert not salvage and str(error).startswith(f"{path}: ")
        else:
            assert all(offset + size <= len(content) for _, offset, size in _columns(members))
