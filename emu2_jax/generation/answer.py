"""What is wanted of an answer, and what came."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32

from emu2_jax.errors import ConfigError
from emu2_jax.generation.loop import EMBEDDING
from emu2_jax.generation.prompt import Embedded, Truncation
from emu2_jax.generation.sampling import GREEDY, Beams, Decoding
from emu2_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Length and kind of the answers to a call's prompts.

    Text alone (the default), one image (`max_tokens=0, forced_images=1`), or both as the model decides
    (`max_images=3`): it draws when it chooses `[IMG]`, and cannot choose it once the images are spent.
    """

    max_tokens: int = 48  #: text tokens, `</s>` included; images come on top
    min_tokens: int = 0  #: `</s>` is not chosen before. The release's min_length counts its `<s>`: one more than this
    forced_images: int = 0  #: images that the answer begins with, whether the model would draw or not
    max_images: int | None = None  #: in all; None = forced_images. 0: [IMG] is a token like others (release, text)
    decoding: Decoding = GREEDY
    truncate: Truncation | None = None  #: leave whole links out of prompts that are too long; None = an error

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.min_tokens, self.forced_images) < 0 or self.most_images < self.forced_images:
            raise ConfigError(
                f"max_tokens {self.max_tokens}, min_tokens {self.min_tokens}, forced_images {self.forced_images}, "
                f"max_images {self.most_images}: wanted none below 0, and max_images at least forced_images"
            )
        if not self.max_tokens and not self.forced_images:
            raise ConfigError("max_tokens: is 0 and no image is forced; wanted at least 1 of either")
        if isinstance(self.decoding, Beams) and self.most_images:
            raise ConfigError("max_images: a beam search writes text alone; take Greedy or Sampling to draw as well")

    @property
    def most_images(self) -> int:
        """Images that an answer can hold."""
        return self.forced_images if self.max_images is None else self.max_images

    def positions(self, visual_tokens: int) -> int:
        """Positions that an answer can take."""
        return self.max_tokens + self.most_images * (visual_tokens + 2)


TEXT = Wanted()
IMAGE = Wanted(max_tokens=0, forced_images=1)


@dataclass(frozen=True)
class Answer:
    """The continuation of one prompt."""

    text: str  # all text, special tokens left out
    links: tuple[str | Embedded, ...]  # texts and images in their order: can be appended to the prompt
    token_ids: Int32[np.ndarray, " n"]  # elements; `<image>` for an embedding, without `</s>`
    embeddings: Float[np.ndarray, "images N E"]  # regressed, as read from `project_down`
    ended: bool  # by `</s>`, not by max_tokens
    score: float | None  # of a beam search: log-probability over length
    links_left_out: int  # of the prompt, by `Wanted.truncate`


def read_answer(
    made: Int32[np.ndarray, " n"],
    embeddings: Float[np.ndarray, "X E"],
    tokenizer: Tokenizer,
    visual_tokens: int,
    *,
    left_out: int,
    score: float | None = None,
    ended: bool | None = None,
) -> Answer:
    """An answer from its elements (ids of tokens, EMBEDDING for an embedding)."""
    if ended is None:
        ended = len(made) > 0 and bool(made[-1] == tokenizer.eos_id)
    made = made[:-1] if len(made) and made[-1] == tokenizer.eos_id else made
    num_images = int((made == EMBEDDING).sum()) // visual_tokens
    images = embeddings[: num_images * visual_tokens].reshape(num_images, visual_tokens, embeddings.shape[-1])
    links: list[str | Embedded] = []
    stretch: list[int] = []

    def flush() -> None:
        text = tokenizer.decode(stretch, skip_special_tokens=True)
        if text:
            links.append(text)
        stretch.clear()

    at, image = 0, 0
    while at < len(made):
        if made[at] == EMBEDDING:
            flush()
            links.append(Embedded(images[image]))
            image += 1
            at += visual_tokens
        else:  # of [IMG] and [/IMG] nothing is shown, as of all special tokens
            stretch.append(int(made[at]))
            at += 1
    flush()
    text = tokenizer.decode([int(i) for i in made if i != EMBEDDING], skip_special_tokens=True)
    ids = np.where(made == EMBEDDING, tokenizer.image_id, made).astype(np.int32)
    return Answer(text, tuple(links), ids, images, ended, score, left_out)
