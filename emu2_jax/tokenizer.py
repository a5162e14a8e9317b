"""Text to token ids and back: a SentencePiece model plus Emu2's special tokens.

Special tokens follow the SentencePiece ids in the order of the release (`constants.py`; emu2-chat adds two), so that
with LLaMA's 32000 pieces `[PAD]` is 32000 and `<patch_index_0256>` 32271.

The release ran LLaMA's tokenizer in its *legacy* mode, which decides how text around a special token is split: white
space on both sides of a special token is dropped, and each stretch of text between special tokens is encoded on its
own, so it starts with SentencePiece's dummy-prefix space ("cat" and " cat" give the same ids there). `<s>` and `</s>`
in a text count as special tokens, `<unk>` does too but keeps the white space around it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from emu2_jax.errors import DataError, UserError

PAD = "[PAD]"
IMAGE_START = "[IMG]"
IMAGE_END = "[/IMG]"
IMAGE = "<image>"
FRAME = "[gIMG]"
VIDEO = "[VIDEO]"
GROUNDING = "<grounding>"
PHRASE_START, PHRASE_END = "<phrase>", "</phrase>"
OBJECT_START, OBJECT_END = "<object>", "</object>"
NEXT_BOX = "</delimiter_of_multi_objects/>"

#: The largest location index: coordinates run 0..224 in the paper; the release reserves 257 tokens.
NUM_PATCH_INDEX_TOKENS = 257


def location_token(index: int) -> str:
    """The token of one coordinate of a box, 0 ... NUM_PATCH_INDEX_TOKENS - 1."""
    return f"<patch_index_{index:04d}>"


#: Source: release, constants.py and tokenizer files; ids follow the SentencePiece model's in this order.
BASE_SPECIAL_TOKENS: tuple[str, ...] = (
    PAD,
    *(IMAGE_START, IMAGE_END, IMAGE, FRAME, "[/gIMG]", "[EOC]", VIDEO),
    *(GROUNDING, PHRASE_START, PHRASE_END, OBJECT_START, OBJECT_END, NEXT_BOX, "<REC>"),
    *(location_token(i) for i in range(NUM_PATCH_INDEX_TOKENS)),
)
CHAT_SPECIAL_TOKENS: tuple[str, ...] = (*BASE_SPECIAL_TOKENS, "[USER]", "[ASSISTANT]")

#: By the name that the setting `data.special_tokens` has for them.
SPECIAL_TOKENS: Mapping[str, tuple[str, ...]] = {"base": BASE_SPECIAL_TOKENS, "chat": CHAT_SPECIAL_TOKENS}


@dataclass(frozen=True)
class Picture:
    """The place of a still image in a prompt: `[IMG]`, `<image>` x N, `[/IMG]`."""

    num_visual_tokens: int

    @property
    def text(self) -> str:
        """The tokens by name."""
        return IMAGE_START + IMAGE * self.num_visual_tokens + IMAGE_END


@dataclass(frozen=True)
class Video:
    """The place of a video in a prompt: `[VIDEO]`, then `[IMG]`, `[gIMG]` x N, `[/IMG]` for each frame."""

    num_frames: int
    num_visual_tokens: int  #: of each frame

    @property
    def text(self) -> str:
        """The tokens by name."""
        return VIDEO + (IMAGE_START + FRAME * self.num_visual_tokens + IMAGE_END) * self.num_frames


Prompt = Sequence[str | Picture | Video]


def _last_space(text: str, end: int) -> int:
    """Place of the last white space of text[:end]; 0 when there is none."""
    return next((i for i in range(end - 1, 0, -1) if text[i].isspace()), 0)


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
        self.frame_id = self.special_ids[FRAME]
        self.video_id = self.special_ids[VIDEO]
        # What encode() recognises: also the SentencePiece model's own <s>, </s> and <unk>.
        control = {self._pieces.IdToPiece(i): i for i in (self.bos_id, self.eos_id, self._pieces.unk_id()) if i >= 0}
        self._keeps_space = self._pieces.IdToPiece(self._pieces.unk_id())
        self._known = {**control, **self.special_ids}
        self._names = {i: token for token, i in self._known.items()}
        #: Changes whenever the same text could give other ids; stored with everything measured in tokens.
        self.fingerprint = hashlib.sha256(proto + "\0".join(special_tokens).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, without `<s>` and `</s>`.

        "a [IMG] b" gives the ids of "a", [IMG], "b": white space next to a special token is dropped.
        """
        ids: list[int] = []
        start, strips_right = 0, False
        for match in self._split.finditer(text):
            token = match.group()
            if token not in self._known:
                continue
            strips = token != self._keeps_space
            ids += self._encode_stretch(text[start : match.start()], left=strips_right, right=strips)
            ids.append(self._known[token])
            start, strips_right = match.end(), strips
        return ids + self._encode_stretch(text[start:], left=strips_right, right=False)

    def _encode_stretch(self, text: str, *, left: bool, right: bool) -> list[int]:
        """Ids of the text between two special tokens, without the white space on the sides that are named."""
        text = text.lstrip() if left else text
        return self.encode_plain(text.rstrip() if right else text)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """`<s>`, then the links one after the other: texts with special tokens recognised, pictures and videos.

        Raises `UserError` when a text holds `<image>` or `[gIMG]`: they stand for embeddings that would not be there.
        """
        for link in prompt:
            for name in (IMAGE, FRAME):
                if isinstance(link, str) and name in link:
                    raise UserError(f"prompt: the text holds {name}, which stands for an image; give the image itself")
        return [self.bos_id, *self.encode("".join(link if isinstance(link, str) else link.text for link in prompt))]

    def decode_prompt(self, ids: Sequence[int]) -> list[str | Picture | Video]:
        """The prompt that `encode_prompt` makes these ids of: a leading `<s>` goes, other special tokens are named.

        An image that has no end, or holds anything but its own placeholders, is shown as text.
        """
        codes = "".join(self._PROMPT_CODES.get(self._names.get(i, ""), ".") for i in ids)
        prompt: list[str | Picture | Video] = []
        start = 1 if ids and ids[0] == self.bos_id else 0

        def add_text(end: int) -> None:
            if end > start:
                prompt.append(self.decode(ids[start:end]))

        for match in self._PLACEHOLDERS.finditer(codes, start):
            add_text(match.start())
            frames = match.group("frames")
            if frames is None:
                prompt.append(Picture(len(match.group()) - 2))
            else:
                prompt.append(Video(frames.count("("), len(match.group("frame"))))
            start = match.end()
        add_text(len(ids))
        return prompt

    #: One letter for each token that makes up an image or a video, so that a regular expression can find them.
    _PROMPT_CODES: Mapping[str, str] = {IMAGE_START: "(", IMAGE_END: ")", IMAGE: "i", FRAME: "f", VIDEO: "v"}
    _PLACEHOLDERS = re.compile(r"\(i+\)|v(?P<frames>\((?P<frame>f+)\)(?:\((?P=frame)\))*)")

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text from a corpus: a special token's name in it is text like any other.

        Without this, a caption that contains "[IMG]" would open an image.
        """
        return self._pieces.EncodeAsIds(text) if text else []

    def count_plain(self, texts: Sequence[str]) -> list[int]:
        """Number of ids that `encode_plain` gives for each text."""
        return [len(ids) for ids in self._pieces.EncodeAsIds(list(texts))] if texts else []

    def split(self, text: str, max_tokens: int) -> list[str]:
        """`text` in pieces of at most `max_tokens` ids of `encode_plain` each, cut at white space.

        White space at the cuts goes. A stretch without any that is longer than `max_tokens` ids is cut within.
        """
        pieces = []
        text = text.strip()
        while text:
            size = self._fitting_chars(text, max_tokens)
            pieces.append(text[:size].strip())
            text = text[size:].strip()
        return pieces

    def _fitting_chars(self, text: str, max_tokens: int) -> int:
        """Characters at the front of `text` that encode to at most `max_tokens` ids, whole words if one fits."""
        chars = min(len(text), 16 * max_tokens)  # all of a long text for each piece would take quadratic time
        while True:
            words = chars if chars == len(text) or text[chars].isspace() else _last_space(text, chars)
            num_ids = len(self.encode_plain(text[: words or chars].strip()))
            if num_ids <= max_tokens or chars == 1:
                return words or chars
            chars = max(1, min((words or chars) - 1, int((words or chars) * max_tokens / num_ids)))

    def piece(self, token: int) -> str:
        """A token as the model file spells it ("▁cat": with the space before it), a special token by its name."""
        return self._names.get(token) or self._pieces.IdToPiece(token)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; `<s>`, `</s>` and special tokens are shown by name, with spaces around them, or skipped.

        Ids on both sides of a skipped token are decoded together, as the release does.
        """
        parts: list[str] = []
        stretch: list[int] = []

        def flush() -> None:
            if stretch:
                parts.append(self._pieces.DecodeIds(stretch))
                stretch.clear()

        for i in map(int, ids):
            if i not in self._names:
                stretch.append(i)
            elif not skip_special_tokens:
                flush()
                parts.append(self._names[i])
        flush()
        return " ".join(parts)
