"""The members of a tar, found from its headers alone, and what can be saved of a damaged one.

Plain headers, nearly all of them, are collected in runs and checked together with numpy; the others (long names, pax
records, the end, damage) are looked at one by one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from emu2_jax.errors import DataError

BLOCK = 512  # bytes; everything in a tar takes a multiple of it

_ZEROS = bytes(BLOCK)  # the end mark
_MAGIC, _MAGIC_AT = b"ustar", 257  # what a header holds, and where
_MAX_NAME_BYTES = 1 << 16  # a longer "long name" is damage, not a name
_REGULAR = (b"0", b"\0", b"7")  # type flags of plain files
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
_EXTENDED = (b"L", b"K", b"x", b"g")  # headers about other members
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # gzip, zstd, bzip2, xz
_SHORTEST_RUN, _LONGEST_RUN = 8, 4096  # headers
_READ_AT_ONCE = 1 << 20  # bytes, where all of a stretch has to be looked at

#: How many bytes of a member's data to hand over with it, by its name and size.
Wanted = Callable[[str, int], int]


class Damage(NamedTuple):
    """Something wrong with a shard itself."""

    cause: str  # the word it is counted under
    offset: int  # bytes
    detail: str
    member: str  # the member that is cut, or the last one before the damage; "" when there is none


@dataclass
class Members:
    """The regular files of a tar, in columns; `headers` and `offsets` are the bytes where header and data start."""

    names: list[str] = field(default_factory=list)
    headers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)  # the first bytes of each, as many as were wanted
    damage: list[Damage] = field(default_factory=list)  # of a salvaged tar
    cut: list[tuple[str, int]] = field(default_factory=list)  # name and header of members that are not all there

    @property
    def offsets(self) -> list[int]:
        """Bytes where the data of each member starts."""
        return [header + BLOCK for header in self.headers]


class ForwardReader:
    """Bytes of a file that is read from front to back, a block at a time; what lies between is not read."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, block_bytes: int) -> None:
        self.size = size  # bytes of the file
        self.read = read  # (size, offset), like pread -> bytes, fewer at the end of the file
        self.block_bytes = block_bytes
        self._block = b""
        self._start = 0  # of the block, in the file

    def at(self, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset` on; fewer at the end of the file."""
        first = offset - self._start
        if first < 0 or first + size > len(self._block):
            size = min(size, self.size - offset)
            if size <= 0:
                return b""
            if first < 0 or first + size > len(self._block):
                self._block = self.read(size if size > self.block_bytes else self.block_bytes, offset)
                self._start, first = offset, 0
        return self._block[first : first + size]


def scan_members(path: str, file: ForwardReader, *, salvage: bool = False, wanted: Wanted | None = None) -> Members:
    """The regular files of an uncompressed tar (ustar, GNU, pax); with `wanted`, also the first bytes of some.

    A tar that is empty, foreign, damaged or cut raises `DataError` naming file, member and byte offset. With `salvage`
    this is noted in `Members.damage`, and the scan goes on at the next whole header, wherever that lies.
    """
    scan = _Scan(file, wanted)
    while True:
        try:
            while scan.advance():
                pass
            return scan.found
        except _BrokenError as error:
            if not salvage:
                raise DataError(f"{path}: {error.damage.detail}") from None
            if not scan.resume_after(error.damage):
                return scan.found


class _BrokenError(Exception):
    def __init__(self, cause: str, offset: int, detail: str, member: str = "") -> None:
        super().__init__(detail)
        self.damage = Damage(cause, offset, detail, member)


@dataclass(slots=True)
class _Extended:
    """What a GNU or pax header says about the member after it."""

    name: str | None = None
    size: int | None = None


class _Scan:
    def __init__(self, file: ForwardReader, wanted: Wanted | None) -> None:
        self.found = Members()
        self._file = file
        self._wanted = wanted
        self._position = 0  # of the next header
        self._run_length = _SHORTEST_RUN
        self._extended = _Extended()
        self._last_header: int | None = None  # the last valid one, and whether it is that of the last member found
        self._last_is_member = False

    def advance(self) -> bool:
        """Goes on by some headers; False when the end mark has been met. Raises `_BrokenError`."""
        if self._file.size == 0:
            raise _BrokenError("empty_shard", 0, "shard has 0 bytes; wanted a tar file")
        if self._extended.name is None and self._extended.size is None and self._plain_run() == self._run_length:
            self._run_length = min(2 * self._run_length, _LONGEST_RUN)
            return True
        self._run_length = _SHORTEST_RUN
        return self._one_header()

    def _plain_run(self) -> int:
        """Takes plain headers, at most `_run_length`; their number."""
        headers: list[bytes] = []
        positions: list[int] = []
        sizes: list[int] = []
        data: list[bytes] = []
        position, end, at, wanted = self._position, self._file.size, self._file.at, self._wanted
        # Where nothing but headers is read, keeping the block would cost as much as reading it.
        read = self._file.read if self._file.block_bytes == BLOCK else None
        for _ in range(self._run_length):
            header = at(position, BLOCK) if read is None else read(BLOCK, position)
            try:
                size = int(header[124:135], 8)
            except ValueError:  # the end, or a size in base 256
                break
            following = position + BLOCK + (size + BLOCK - 1 & -BLOCK)
            if following > end or size < 0:
                break
            if wanted is not None:  # now, because the reader does not go back
                count = wanted(_text(header[:100]), size)
                data.append(at(position + BLOCK, count) if count else b"")
            headers.append(header)
            positions.append(position)
            sizes.append(size)
            position = following
        names = _plain_names(headers)
        good = len(names)
        if good:
            found = self.found
            found.names += names
            found.headers += positions[:good]
            found.sizes += sizes[:good]
            found.data += data[:good]
            self._last_header, self._last_is_member = positions[good - 1], True
            self._position = positions[good - 1] + BLOCK + (sizes[good - 1] + BLOCK - 1 & -BLOCK)
        return good

    def _one_header(self) -> bool:
        position = self._position
        header = self._file.at(position, BLOCK)
        if header == _ZEROS:
            self._check_end()
            return False
        fault = _fault(header, position)
        if fault is not None:
            cause, detail = fault
            last = self.found.names[-1] if self.found.names else ""
            after = f", after member {last!r}" if last else ""
            raise _BrokenError(cause, position, f"{detail} at byte {position}{after}", last)
        name, size, kind = self._describe(header)
        if position + BLOCK + size > self._file.size:
            detail = f"cut: member {name!r} at byte {position} has {size} bytes, but the file ends at byte "
            raise _BrokenError("cut_member", position, detail + str(self._file.size), name)
        self._last_header, self._last_is_member = position, False
        if kind in (b"L", b"x"):
            self._read_extended(kind, size)
        elif kind not in (b"K", b"g"):  # long names of link targets, and pax headers for the whole file
            if kind in _REGULAR and not name.endswith("/"):
                self._add(name, position, size)
            self._extended = _Extended()
        self._position = position + BLOCK + (size + BLOCK - 1 & -BLOCK)
        return True

    def _describe(self, header: bytes) -> tuple[str, int, bytes]:
        kind = header[156:157]
        name, size = _name(header), _number(header[124:136]) or 0
        if kind not in _EXTENDED:
            name = name if self._extended.name is None else self._extended.name
            size = size if self._extended.size is None else self._extended.size
        return name, 0 if kind in _WITHOUT_DATA else size, kind  # links may repeat the size of their target

    def _add(self, name: str, position: int, size: int) -> None:
        count = self._wanted(name, size) if self._wanted is not None else 0
        self.found.names.append(name)
        self.found.headers.append(position)
        self.found.sizes.append(size)
        if self._wanted is not None:
            self.found.data.append(self._file.at(position + BLOCK, count) if count else b"")
        self._last_is_member = True

    def _read_extended(self, kind: bytes, size: int) -> None:
        position = self._position
        if size > _MAX_NAME_BYTES:
            detail = f"damaged: the name given at byte {position} has {size} bytes"
            raise _BrokenError("damaged_header", position, detail)
        data = self._file.at(position + BLOCK, size)
        if kind == b"L":
            self._extended.name = _text(data)
        else:
            _read_pax(position, data, self._extended)

    def _check_end(self) -> None:
        """Refuses data after the end mark: a reader would lose it without a word."""
        position = self._position
        while position < self._file.size:
            padding = self._file.at(position, _READ_AT_ONCE)
            if padding.strip(b"\0"):
                first = position + len(padding) - len(padding.lstrip(b"\0"))
                detail = f"data at byte {first} after the end mark at byte {self._position}; wanted one tar a file"
                detail += " (were several joined with cat?)"
                raise _BrokenError("data_after_end", first, detail, self.found.names[-1] if self.found.names else "")
            position += len(padding)

    # Salvage.

    def resume_after(self, damage: Damage) -> bool:
        """Notes the damage and goes to the next whole header; False when there is none.

        Where bytes are missing, the next header lies within what should be the data of the member before: so the
        search begins there, and when it finds one, that member is not all there.
        """
        last = damage.offset if damage.cause == "cut_member" else self._last_header
        start = 0 if last is None else last + BLOCK
        following = self._find_header(start)
        if following is None and not self.found.names and damage.cause == "damaged_header":
            damage = damage._replace(cause="foreign_shard")
        elif following is not None and damage.cause == "compressed_shard":
            damage = damage._replace(cause="damaged_header")  # that it looked compressed was chance
        self.found.damage.append(damage)
        if damage.cause == "cut_member":
            self.found.cut.append((damage.member, damage.offset))
        if following is None:
            return False
        if self._last_is_member and following < self.found.headers[-1] + BLOCK + self.found.sizes[-1]:
            self.found.cut.append((self.found.names.pop(), self.found.headers.pop()))
            self.found.sizes.pop()
            if self.found.data:
                self.found.data.pop()
        self._extended = _Extended()
        self._run_length = _SHORTEST_RUN
        self._last_is_member = False
        self._position = following
        return True

    def _find_header(self, start: int) -> int | None:
        """Where the first whole header at or after `start` begins; only those with the magic of ustar are known."""
        while start + BLOCK <= self._file.size:
            block = self._file.at(start, _READ_AT_ONCE)
            hit = block.find(_MAGIC, _MAGIC_AT)
            while hit >= 0:
                first = hit - _MAGIC_AT
                header = block[first : first + BLOCK]
                if len(header) == BLOCK and _fault(header, 1) is None:
                    return start + first
                hit = block.find(_MAGIC, hit + 1)
            start += max(1, len(block) - BLOCK + 1)
        return None


def _plain_names(headers: list[bytes]) -> list[str]:
    """Names of the headers, from the first on, that are whole, of regular files, and have their name in one piece."""
    if not headers:
        return []
    rows = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    total = rows.sum(1, dtype=np.uint32) - rows[:, 148:156].sum(1, dtype=np.uint32) + 8 * ord(" ")
    digits = rows[:, 148:154] - ord("0")  # below "0" wraps to more than 7
    expected = digits.astype(np.uint32) @ (8 ** np.arange(5, -1, -1, dtype=np.uint32))
    plain = (total == expected) & (digits < 8).all(1) & np.isin(rows[:, 154], (0, ord(" ")))
    plain &= (rows[:, 124:135] - ord("0") < 8).all(1) & np.isin(rows[:, 135], (0, ord(" ")))
    plain &= (rows[:, 156] == ord("0")) & (rows[:, _MAGIC_AT : _MAGIC_AT + 5] == list(_MAGIC)).all(1)
    plain &= (rows[:, 262] == ord(" ")) | (rows[:, 345] == 0)  # see `_name`
    plain &= ~((rows[:, :99] == 0) & (rows[:, 1:100] != 0)).any(1)  # nothing after the end of the name
    good = len(headers) if plain.all() else int(plain.argmin())
    names = rows[:good, :100].copy().view("S100")[:, 0].tolist()
    return [name.decode("utf-8", "surrogateescape") for name in names]


def _fault(header: bytes, position: int) -> tuple[str, str] | None:
    """Cause and description, to be followed by the place, of what is wrong with a header; None if nothing is."""
    if position == 0 and header.startswith(_COMPRESSED):
        text = "is compressed; wanted a plain tar, because samples are read by their offset; no tar header"
        return "compressed_shard", text
    if len(header) < BLOCK:
        return "cut_shard", "cut: the file ends without the end mark of a tar"
    if not _checksum_is_right(header):
        text = "is not a tar file: no tar header" if position == 0 else "damaged: no tar header"
        return "damaged_header", text
    if _number(header[124:136]) is None:
        return "damaged_header", "damaged: no number for the size of the member"
    if header[156:157] == b"S":
        return "sparse_member", "wanted plain files, but there is a sparse one"
    return None


def _checksum_is_right(header: bytes) -> bool:
    expected = _number(header[148:156])
    if expected is None:
        return False
    blanked = header[:148] + b"        " + header[156:]
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521: the tar checksum at the speed of C.
    if zlib.adler32(blanked) & 0xFFFF == (1 + expected) % 65521:
        return True
    return sum(blanked) - 256 * sum(byte > 127 for byte in blanked) == expected  # old tars sum signed bytes


def _number(field_: bytes) -> int | None:
    """A number of a tar header: octal digits, or base 256 when the first bit is set (sizes of 8 GiB and more)."""
    if field_[0] == 0x80:
        return int.from_bytes(field_[1:])
    digits = field_.strip(b" \0")
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:  # 8 and 9
        return None


def _text(data: bytes) -> str:
    # Names that are not UTF-8 still have to be told apart, so their bytes are kept.
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    # GNU tars ("ustar  ") keep times where POSIX ones ("ustar\0") keep the first part of a long path.
    return f"{_text(prefix)}/{name}" if header[257:263] == b"ustar\0" and prefix[:1] != b"\0" else name


def _read_pax(position: int, data: bytes, extended: _Extended) -> None:
    """Takes `path` and `size` out of a pax header's records, "<length> <keyword>=<value>\\n"."""
    rest = data
    while rest.strip(b"\0"):
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = rest[len(digits) + 1 : length]
        keyword, equals, value = record[:-1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            detail = f"damaged: pax header at byte {position} is malformed"
            raise _BrokenError("damaged_header", position, detail)
        if keyword == b"path":
            extended.name = _text(value)
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 18:
                detail = f"damaged: pax header at byte {position} has size {value!r}"
                raise _BrokenError("damaged_header", position, detail)
            extended.size = int(value)
        rest = rest[length:]
