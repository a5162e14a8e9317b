"""Prompt chains: change one link and look at what changes.

    chain = Chain(generator, ["a red apple ", "on a blue ground, ", "drawn in pencil"])
    chain.generate(IMAGE)
    chain.replace(3, "drawn in ink").generate(IMAGE)              # links 1 and 2 are not computed again
    chain.variants(2, ["on grass, ", "on snow, "], IMAGE)         # one batch; what all share is computed once

Links are numbered from 1. What is kept are keys and values of the model; answers are those of `Generator.generate`.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu2_jax.errors import UserError
from emu2_jax.generation.answer import TEXT, Answer, Wanted
from emu2_jax.generation.generator import Generator, Prefix, Progress
from emu2_jax.generation.prompt import Elements, Link, Prompt

#: Prompts whose keys and values a chain and its variants keep between them.
KEPT_PREFIXES = 2


class Chain:
    """A prompt whose front is not computed again when a later link changes. Chains made of it share what is kept."""

    def __init__(self, generator: Generator, links: Prompt, _kept: list[Prefix] | None = None) -> None:
        self.links = tuple(links)
        self._generator = generator
        self._kept: list[Prefix] = [] if _kept is None else _kept  # latest last

    def replace(self, number: int, *links: Link) -> Chain:
        """The chain with link `number` replaced by these; by none, left out."""
        self._check(number)
        changed = (*self.links[: number - 1], *links, *self.links[number:])
        return Chain(self._generator, changed, self._kept)

    def extend(self, *links: Link) -> Chain:
        """The chain with these links after its own; `Answer.links` are links."""
        return Chain(self._generator, (*self.links, *links), self._kept)

    def generate(self, wanted: Wanted = TEXT, *, progress: Progress | None = None) -> Answer:
        """The answer to the chain."""
        elements, left_out = self._generator.fit(self.links, wanted)
        prefix = self._longest(elements)
        answers, prefix = self._generator.answer(
            [elements], wanted, prefix=prefix, left_out=[left_out], progress=progress
        )
        if prefix is not None:
            self._keep(prefix)
        return answers[0]

    def variants(
        self, number: int, links: Sequence[Link], wanted: Wanted = TEXT, *, progress: Progress | None = None
    ) -> list[Answer]:
        """The answers to the chain with link `number` replaced by each of `links`, from batches.

        With `Sampling` every variant has the same draws, so that answers differ by the link alone.
        """
        chains = [self.replace(number, link) for link in links]
        fitted = [self._generator.fit(chain.links, wanted) for chain in chains]
        elements, left_out = [one for one, _ in fitted], [count for _, count in fitted]
        if not elements:
            return []
        stem = min((elements[0].common(one) for one in elements), default=0)
        if len(elements) > 1 and stem > 1:
            front = elements[0].front(stem)
            known = self._longest(front)
            if known is None or front.common(known.elements) < stem:
                self._keep(self._generator.read(front, known))
        prefix = self._longest(min(elements, key=elements[0].common))
        return self._generator.answer_all(
            elements, wanted, prefix=prefix, left_out=left_out, same_draws=True, progress=progress
        )

    def _check(self, number: int) -> None:
        if not 1 <= number <= len(self.links):
            raise UserError(f"chain: has links 1 to {len(self.links)}; there is no link {number}")

    def _longest(self, elements: Elements) -> Prefix | None:
        return max(self._kept, key=lambda prefix: elements.common(prefix.elements), default=None)

    def _keep(self, prefix: Prefix) -> None:
        self._kept.append(prefix)
        del self._kept[:-KEPT_PREFIXES]
