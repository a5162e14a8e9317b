"""Searches on a tiny language model that `transformers` runs too: prompts, settings, and our answers to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import tiny

from emu2_jax.config import ModelConfig
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.prompt import Elements, Visual
from emu2_jax.generation.sampling import Beams, Decoding, Greedy
from emu2_jax.models import emu2
from emu2_jax.tokenizer import Tokenizer

MAX_TOKENS = 9
NUM_VISUAL = tiny.CONFIG.model.num_visual_tokens


class Ids(Tokenizer):
    """The ids of `tests/tiny.py`, and no texts."""

    def __init__(self) -> None:
        self.bos_id, self.eos_id, self.pad_id = tiny.BOS, tiny.EOS, tiny.PAD
        self.image_start_id, self.image_end_id = tiny.IMAGE_START, tiny.IMAGE_END
        self.image_id, self.frame_id = tiny.IMAGE, 38

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(i)) for i in ids)


def model() -> tuple[ModelConfig, Any]:
    """Scores so flat that beams differ, and `</s>` likelier than others, so that some texts end soon."""
    config = tiny.CONFIG.model
    params = tiny.random_parameters(lambda key: emu2.init(config, key), seed=5)
    language = dict(params["language_model"])
    head = language["head"] * 2.0
    head[:, tiny.EOS] *= 1.6
    return config, {**params, "language_model": {**language, "head": head}}


def prompts() -> list[Elements]:
    """Of different lengths; the third and the last hold an image."""
    rng = np.random.default_rng(11)
    made = []
    for number, words in enumerate((2, 5, 3, 9, 6, 1)):
        tokens = [tiny.BOS, *rng.integers(3, 30, words).tolist()]
        visuals: tuple[Visual, ...] = ()
        if number in (2, 5):
            embeddings = rng.normal(0, 1, (NUM_VISUAL, tiny.CONFIG.model.vision.width)).astype(np.float32)
            visuals = (Visual(embeddings, len(tokens) + 1, NUM_VISUAL, bytes([number])),)
            tokens += [tiny.IMAGE_START, *[tiny.IMAGE] * NUM_VISUAL, tiny.IMAGE_END, 7]
        made.append(Elements(np.array(tokens, np.int32), visuals))
    return made


@dataclasses.dataclass(frozen=True)
class Search:
    """One setting of a search, under the names that `transformers` has for it."""

    num_beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_new_tokens: int = 0

    def wanted(self, rules: str) -> Wanted:
        decoding: Decoding = Greedy()
        if self.num_beams > 1:
            decoding = Beams(
                num_beams=self.num_beams,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
                rules=rules,
            )
        return Wanted(max_tokens=MAX_TOKENS, min_tokens=self.min_new_tokens, decoding=decoding)


SEARCHES = (
    Search(num_beams=1),
    Search(num_beams=1, min_new_tokens=4),
    Search(),
    Search(length_penalty=-1.0),
    Search(length_penalty=0.0),
    Search(length_penalty=2.0),
    Search(num_beams=3, length_penalty=-1.0),
    Search(length_penalty=-1.0, min_new_tokens=4),
    Search(length_penalty=-1.0, early_stopping=True),
    Search(early_stopping=True),
    Search(length_penalty=-1.0, early_stopping="never"),
    Search(early_stopping="never"),
    Search(length_penalty=2.0, early_stopping="never", min_new_tokens=2),
)


def ours(rules: str) -> list[list[list[int]]]:
    """The ids of each prompt's answer, for each search."""
    config, params = model()
    generator = Generator(config, jax.tree.map(np.asarray, params), Ids(), context=64)
    found = []
    for search in SEARCHES:
        answers, _ = generator.answer(prompts(), search.wanted(rules))
        found.append([answer.token_ids.tolist() for answer in answers])
    return found
