"""Text to token ids and back: a SentencePiece model plus Emu2's special tokens.

Special tokens follow the SentencePiece ids in the order of the release (`constants.py`; emu2-chat adds two), so that
with LLaMA's 32000 pieces `[PAD]` is 32000 and `<patch_index_0256>` 32271.

The release ran LLaMA's tokenizer in its *legacy* mode, which decides how text around a special token is split: white
space on both sides of a special token is dropped, and each stretch of text between special tokens is encoded on its
own, so it starts with SentencePiece's dummy-prefix space ("cat" and " cat" give the same ids there).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from emu2_jax.errors import DataError

PAD = "[PAD]"
IMAGE_START = "[IMG]"
IMAGE_END = "[/IMG]"
IMAGE = "<image>"
VIDEO = "[VIDEO]"

#: The largest location index: coordinates run 0..224 in the paper; the release reserves 257 tokens.
NUM_PATCH_INDEX_TOKENS = 257

#: Source: release, constants.py and tokenizer files; ids follow the SentencePiece model's in this order.
BASE_SPECIAL_TOKENS: tuple[str, ...] = (
    PAD,
    *(IMAGE_START, IMAGE_END, IMAGE, "[gIMG]", "[/gIMG]", "[EOC]", VIDEO),
    *("<grounding>", "<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<REC>"),
    *(f"<patch_index_{i:04d}>" for i in range(NUM_PATCH_INDEX_TOKENS)),
)
CHAT_SPECIAL_TOKENS: tuple[str, ...] = (*BASE_SPECIAL_TOKENS, "[USER]", "[ASSISTANT]")


class Tokenizer:
    """SentencePiece with Emu2's special tokens.

    Raises `DataError` when the model file is missing or is not a SentencePiece model.
    """

    def __init__(self, model_path: str | Path, special_tokens: Sequence[str] = BASE_SPECIAL_TOKENS) -> None:
        path = Path(model_path)
        try:
            proto = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the SentencePiece model: {error.strerror}") from error
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise DataError(f"{path}: is not a SentencePiece model") from error
        num_pieces: int = self._pieces.GetPieceSize()
        self.special_ids = {token: num_pieces + i for i, token in enumerate(special_tokens)}
        self._special_names = {i: token for token, i in self.special_ids.items()}
        # Trying 272 alternatives at every character would take longer than the encoding itself: all special tokens have
        # one of two shapes, and only what has that shape is looked up.
        self._split = re.compile(r"\[/?\w+\]|</?\w+/?>")
        self.vocab_size: int = num_pieces + len(special_tokens)
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id = self.special_ids[PAD]
        self.image_start_id = self.special_ids[IMAGE_START]
        self.image_end_id = self.special_ids[IMAGE_END]
        self.image_id = self.special_ids[IMAGE]
        #: Changes whenever the same text could give other ids; stored with everything measured in tokens.
        self.fingerprint = hashlib.sha256(proto + "\0".join(special_tokens).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, without `<s>` and `</s>`.

        "a [IMG] b" gives the ids of "a", [IMG], "b": white space next to a special token is dropped.
        """
        ids: list[int] = []
        start = 0
        for match in self._split.finditer(text):
            if match.group() not in self.special_ids:
                continue
            ids += self._encode_stretch(text[start : match.start()], after_special=start > 0, before_special=True)
            ids.append(self.special_ids[match.group()])
            start = match.end()
        return ids + self._encode_stretch(text[start:], after_special=start > 0, before_special=False)

    def _encode_stretch(self, text: str, *, after_special: bool, before_special: bool) -> list[int]:
        if after_special:
            text = text.lstrip()
        if before_special:
            text = text.rstrip()
        return self.encode_plain(text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text from a corpus: a special token's name in it is text like any other.

        Without this, a caption that contains "[IMG]" would open an image.
        """
        return self._pieces.EncodeAsIds(text) if text else []

    def count_plain(self, texts: Sequence[str]) -> list[int]:
        """Number of ids that `encode_plain` gives for each text."""
        return [len(ids) for ids in self._pieces.EncodeAsIds(list(texts))] if texts else []

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; `<s>`, `</s>` and special tokens are shown by name or skipped."""
        parts: list[str] = []
        stretch: list[int] = []

        def flush() -> None:
            if stretch:
                parts.append(self._pieces.DecodeIds(stretch))
                stretch.clear()

        names = {**self._special_names, self.bos_id: "<s>", self.eos_id: "</s>"}
        for i in map(int, ids):
            if i in names:
                flush()
                if not skip_special_tokens:
                    parts.append(names[i])
            else:
                stretch.append(i)
        flush()
        return " ".join(parts)
