"""Format, width and height of a picture from the first bytes of its file."""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Codes of the formats as the index stores them; 0 is "not known from the first bytes".
FORMATS = ("", "JPEG", "PNG", "WEBP", "GIF", "BMP")

#: Bytes that hold the size of nearly every picture; a JPEG with a long EXIF or colour profile needs more.
HEAD_BYTES = 2048

_NO_SIZE = (0xC4, 0xC8, 0xCC)  # markers among those of JPEG's frames that give no size
_PNG = b"\x89PNG\r\n\x1a\n"


class ImageHeader(NamedTuple):
    """What the first bytes say; width and height are pixels, 0 when they lie further on."""

    format: int  # place in FORMATS
    width: int
    height: int


_UNKNOWN = ImageHeader(0, 0, 0)


def image_header(head: bytes) -> ImageHeader:
    """The header of a picture, by its content and not by its name. Never raises: damage gives zeros."""
    try:
        return _header(head)
    except (struct.error, IndexError):
        return _UNKNOWN


def _header(head: bytes) -> ImageHeader:
    if head[:3] == b"\xff\xd8\xff":
        return ImageHeader(1, *_jpeg_size(head))
    if head[:8] == _PNG and head[12:16] == b"IHDR":
        return ImageHeader(2, *struct.unpack_from(">II", head, 16))
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ImageHeader(3, *_webp_size(head))
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return ImageHeader(4, *struct.unpack_from("<HH", head, 6))
    if head[:2] == b"BM" and head[14:18] == b"\x28\0\0\0":
        width, height = struct.unpack_from("<ii", head, 18)
        return ImageHeader(5, abs(width), abs(height))  # negative height: the first line is the top one
    return _UNKNOWN


def _jpeg_size(head: bytes) -> tuple[int, int]:
    """Width and height from the frame header, or (0, 0) when it lies beyond `head`."""
    position = 2
    while position + 9 <= len(head):
        if head[position] != 0xFF:
            return 0, 0
        marker = head[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_SIZE:
            height, width = struct.unpack_from(">HH", head, position + 5)
            return width, height
        if marker == 0xFF:  # fill byte
            position += 1
        else:
            position += 2 + max(2, struct.unpack_from(">H", head, position + 2)[0])
    return 0, 0


def _webp_size(head: bytes) -> tuple[int, int]:
    chunk = head[12:16]
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", head, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return 0, 0
