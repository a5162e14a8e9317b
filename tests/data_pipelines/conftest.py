"""Writers of small shards, and a tokenizer in which every word is one token."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import settings
from tiny_shards import WORDS, Members, WriteShard, picture

from emu2_jax.tokenizer import Tokenizer

settings.register_profile("quick", max_examples=200)
settings.register_profile("thorough", max_examples=10_000)  # pytest --hypothesis-profile=thorough
settings.load_profile("quick")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids: <unk> 0, <s> 1, </s> 2, then the words."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "words"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_prefix=str(prefix),
        model_type="word",
        vocab_size=3 + len(WORDS),
        minloglevel=2,
    )
    return Tokenizer(f"{prefix}.model")


@pytest.fixture
def write_shard(tmp_path: Path) -> WriteShard:
    """Writes members, in their order, into a tar of the given name; returns its path."""

    def write(name: str, members: Members) -> str:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    return write


@pytest.fixture
def pairs(write_shard: WriteShard) -> Callable[[str, int, int], str]:
    """Writes an image-text shard of `count` pairs; pair i has grey `first + i` and one to four words."""

    def write(name: str, count: int, first: int = 0) -> str:
        members: list[tuple[str, bytes]] = []
        for i in range(first, first + count):
            members.append((f"{i:04d}.png", picture(i % 256)))
            members.append((f"{i:04d}.txt", " ".join(WORDS[: 1 + i % 4]).encode()))
        return write_shard(name, members)

    return write
