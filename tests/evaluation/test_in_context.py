"""Few-shot accuracy and its controls, on models whose accuracy is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data_pipelines.episodes import Episode, Example
from emu2_jax.evaluation.in_context import Accuracy, Answered, Link, measure, nearest_pictures, prompt_of, summarise


def picture(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


NAMES = ("bofi", "daku", "lemo", "zuti")
EPISODES = [
    Episode(
        key=f"episode-{asked}",
        task="names",
        examples=tuple(Example((picture(value),), name) for value, name in enumerate(NAMES)),
        query=Example((picture(asked),), NAMES[asked]),
        wrong=(),
        pattern=None,
    )
    for asked in range(4)
]
DRAWING = Episode(
    key="pattern",
    task="patterns",
    examples=tuple(Example((picture(value),), "") for value in (10, 20, 10, 20)),
    query=Example((picture(10),), ""),
    wrong=(picture(20), picture(30)),
    pattern=None,
)


class Copier:
    """Finds the last picture among the earlier ones and says what came after that; draws the last but one."""

    def answers(self, prompts: Sequence[Sequence[Link]]) -> list[str]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Sequence[Link]) -> str:
        if not prompt or isinstance(prompt[-1], str):
            return ""
        for link, following in itertools.pairwise(prompt):
            if not isinstance(link, str) and np.array_equal(link, prompt[-1]) and isinstance(following, str):
                return f" {following} "
        return "unheard of"

    def drawn(self, prompts: Sequence[Sequence[Link]]) -> np.ndarray:
        return self.embeddings([prompt[-2] if len(prompt) > 1 else picture(0) for prompt in prompts])

    def embeddings(self, images: Sequence[Any]) -> np.ndarray:
        return np.stack([np.full((1, 1), image[0, 0, 0], np.float32) for image in images])


def ask(episodes: Sequence[Episode], shots: Sequence[int]) -> list[Answered]:
    return list(measure(episodes, shots, Copier(), lambda done, total: None))


def test_a_copier_is_as_good_as_its_examples_and_the_controls_show_it() -> None:
    table = summarise(ask(EPISODES, (0, 1, 2, 4)))["names"]
    accuracy = {condition: {k: cell["accuracy"] for k, cell in row.items()} for condition, row in table.items()}
    assert accuracy == {
        "examples": {"0": 0.0, "1": 0.25, "2": 0.5, "4": 1.0},
        "shuffled": {"2": 0.0, "4": 0.0},
        "no_images": {"1": 0.0, "2": 0.0, "4": 0.0},
    }


def test_the_nearest_picture_says_the_name_where_the_encoder_tells_pictures_apart() -> None:
    class Directions(Copier):
        def embeddings(self, images: Sequence[Any]) -> np.ndarray:
            return np.stack([10 + np.eye(4, dtype=np.float32)[None, image[0, 0, 0]] for image in images])

    shots = (0, 1, 2, 4)
    found = nearest_pictures(EPISODES, shots, Directions())
    assert [found[str(count)]["accuracy"] for count in shots] == [0.0, 0.25, 0.5, 1.0]
    alike = nearest_pictures(EPISODES, shots, Copier())  # one number a picture: a direction is its sign and no more
    assert alike["4"]["accuracy"] < 1.0


def test_prompts() -> None:
    episode = EPISODES[1]
    prompt = prompt_of(episode, 2, "examples")
    assert prompt is not None
    assert [link if isinstance(link, str) else int(link[0, 0, 0]) for link in prompt] == [2, "lemo", 3, "zuti", 1]
    shuffled = prompt_of(episode, 2, "shuffled")
    assert shuffled is not None
    assert [link for link in shuffled if isinstance(link, str)] == ["zuti", "lemo"]
    assert prompt_of(episode, 2, "no_images") == ["lemo", "zuti"]
    assert prompt_of(episode, 1, "shuffled") is None
    assert prompt_of(episode, 0, "no_images") is None
    assert [int(link[0, 0, 0]) for link in prompt_of(DRAWING, 3, "examples") or []] == [20, 10, 20]
    assert [int(link[0, 0, 0]) for link in prompt_of(DRAWING, 3, "shuffled") or []] == [10, 20, 20]
    assert prompt_of(DRAWING, 3, "no_images") is None


def test_a_drawn_picture_is_right_when_it_is_nearest_to_the_true_one() -> None:
    found = {(one.shots, one.condition): one for one in ask([DRAWING], (1, 2))}
    assert found[2, "examples"].correct
    assert found[1, "examples"].answer == "right"  # 0 is nearer to 10 than to 20
    assert not found[2, "shuffled"].correct
    assert found[2, "shuffled"].answer == "wrong 1"


def test_a_text_in_the_right_notation_need_not_be_right() -> None:
    example = Example((picture(1),), "[cat: 1]")
    episode = Episode("f", "formats", (example,), Example((picture(1),), "[dog: 1]"), (), r"\[\w+: \d\]")
    table = summarise(ask([episode], (0, 1)))
    assert [table["formats"]["examples"][k]["accuracy"] for k in ("0", "1")] == [0.0, 0.0]
    assert [table["formats_notation"]["examples"][k]["accuracy"] for k in ("0", "1")] == [0.0, 1.0]


def test_wilsons_interval() -> None:
    """Agresti & Coull 1998: 0 of 10 gives 0 to 0.2775."""
    none = Accuracy.of([False] * 10)
    assert (none.accuracy, none.low, none.n) == (0.0, pytest.approx(0.0, abs=1e-9), 10)
    assert none.high == pytest.approx(0.2775, abs=1e-4)


def test_too_many_shots_are_refused() -> None:
    with pytest.raises(ValueError, match="episode-0: has 4 examples; 5 shots are asked for"):
        ask(EPISODES, (5,))
