"""Shards with bytes changed, dropped, inserted or cut off, and which stretches of them are still whole."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

from hypothesis import strategies as st
from tiny_shards import Members

#: What happens, at which byte, and with which bytes or how many.
Damage = tuple[str, int, bytes | int]


def shard_of(members: Members) -> tuple[bytes, list[tuple[int, int]]]:
    """A shard, and for each member where it begins (with its first header) and ends."""
    buffer = io.BytesIO()
    parts = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            start = tar.offset
            tar.addfile(info, io.BytesIO(data))
            parts.append((start, tar.offset))
    return buffer.getvalue(), parts


def damages_of(shard: bytes) -> st.SearchStrategy[list[Damage]]:
    """One to three damages of any kind."""
    places = st.integers(0, len(shard) - 1)
    kinds = st.one_of(
        st.tuples(st.just("set"), places, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("zero"), places, st.integers(1, 3000)),
        st.tuples(st.just("drop"), places, st.integers(1, 3000)),
        st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=700)),
        st.tuples(st.just("cut"), places, st.just(0)),
    )
    return st.lists(kinds, min_size=1, max_size=3)


def apply(shard: bytes, damages: Sequence[Damage]) -> tuple[bytes, list[int]]:
    """The damaged bytes, and which byte of the whole shard each of them is; -1 for those that are new."""
    content, origins = shard, list(range(len(shard)))
    for what, place, how in damages:
        size = how if isinstance(how, int) else len(how)
        new = {"set": how, "zero": bytes(size), "drop": b"", "insert": how, "cut": b""}[what]
        assert isinstance(new, bytes)
        end = {"insert": place, "cut": len(content)}.get(what, place + size)
        content = content[:place] + new + content[end:]
        origins = origins[:place] + [-1] * len(new) + origins[end:]
    return content, origins


def is_intact(start: int, stop: int, origins: Sequence[int]) -> bool:
    """Whether the bytes start ... stop - 1 of the whole shard still lie side by side."""
    if start not in origins:
        return False
    first = origins.index(start)
    return list(origins[first : first + stop - start]) == list(range(start, stop))
