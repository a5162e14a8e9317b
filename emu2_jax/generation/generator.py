"""A trained Emu2 that continues prompts.

    generator = Generator(config.model, params, tokenizer)
    generator.generate(["What is this?", image]).text
    generator.generate(["a red apple"], IMAGE).embeddings                      # [1, N, E], for the decoder to draw
    generator.generate(["A story. ", image], Wanted(max_tokens=200, max_images=4)).links

Shapes come from few buckets: batch sizes are powers of two, lengths have four sizes in each doubling. What is compiled
once for each of them serves every prompt that falls into it; `warm_up` compiles ahead of use.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from emu2_jax import sharding
from emu2_jax.config import ModelConfig
from emu2_jax.errors import ConfigError
from emu2_jax.generation import beam, loop, network
from emu2_jax.generation.answer import IMAGE, TEXT, Answer, Wanted, read_answer
from emu2_jax.generation.loop import Chunk, Ids, Limits
from emu2_jax.generation.network import Cache
from emu2_jax.generation.prompt import Elements, Layout, Pixels, Prompt
from emu2_jax.generation.sampling import Beams, Draw, Sampling
from emu2_jax.models.emu2 import encode_images
from emu2_jax.task import Params
from emu2_jax.tokenizer import IMAGE_START, Tokenizer

#: Prompts are read in stretches of at most this many positions, which bounds the attention scores that exist at once.
MAX_CHUNK = 512
#: Images that are encoded at once, and bytes of embeddings that are kept for images to come again.
MAX_ENCODED, KEPT_BYTES = 16, 256 << 20
#: Elements between two calls of `progress`.
PROGRESS_STEPS = 16

Progress = Callable[[int], None]  # called with the elements that the longest answer of the batch has so far


def bucket(length: int) -> int:
    """The smallest of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ... that holds `length`: four in each doubling."""
    step = max(4, 1 << max(0, (length - 1).bit_length() - 3))
    return max(16, -(-length // step) * step)


def padded(length: int) -> int:
    """Positions that are computed for a prompt of `length`: whole stretches, and a bucket for the rest."""
    whole, rest = divmod(length, MAX_CHUNK)
    return whole * MAX_CHUNK + (bucket(rest) if rest else 0)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Elements whose keys and values are there already, in the first row of a cache."""

    elements: Elements
    cache: Cache


class Generator:
    """Emu2 ready to continue prompts, on one device or on a mesh.

    `context` is the longest sequence, prompt and answer together, that the model can be asked for. `dtype` is of
    products and cache (default: the config's compute dtype). `frame_tokens` is N of a video's frames where it is not
    that of still images (Emu2-Chat: 64 and 256).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        context: int = 2048,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        frame_tokens: int | None = None,
        max_batch: int = 32,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.context = context
        self.mesh = mesh
        self.layout = Layout(
            tokenizer, config.vision.image_size, config.num_visual_tokens, frame_tokens or config.num_visual_tokens
        )
        #: Positions of prompts that went through the language model, padding not counted.
        self.positions_computed = 0
        self._dtype = jnp.dtype(dtype or config.compute_dtype)
        self._params = network.prepare(config, params, self._dtype, mesh)
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        #: Prompts that are answered at once.
        self.max_batch = self._rows(max_batch)
        self._embeddings: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._ids = Ids(tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_start_id, tokenizer.image_end_id)
        self._compile()

    def generate(self, prompt: Prompt, wanted: Wanted = TEXT, *, progress: Progress | None = None) -> Answer:
        """The answer to one prompt, a sequence of links (`emu2_jax.generation.prompt`).

        Raises `UserError` for a link that cannot be read and for a prompt that leaves no room for the answer.
        """
        return self.generate_batch([prompt], wanted, progress=progress)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], wanted: Wanted = TEXT, *, progress: Progress | None = None
    ) -> list[Answer]:
        """The answers to prompts of any lengths, in batches."""
        fitted = [self.fit(prompt, wanted) for prompt in prompts]
        left_out = [count for _, count in fitted]
        return self.answer_all([one for one, _ in fitted], wanted, left_out=left_out, progress=progress)

    def text(self, prompts: Sequence[Prompt], *, max_tokens: int) -> list[str]:
        """Greedy text after each prompt, up to `</s>` or `max_tokens`."""
        return [answer.text for answer in self.generate_batch(prompts, Wanted(max_tokens=max_tokens))]

    def image_embeddings(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "B N E"]:
        """The N visual embeddings of the image that follows each prompt (`[IMG]` is appended to it)."""
        return np.concatenate([answer.embeddings for answer in self.generate_batch(prompts, IMAGE)])

    def encode(self, images: Sequence[Pixels]) -> Float[np.ndarray, "I N E"]:
        """What the visual encoder makes of images, float32, in batches."""
        encoded = self._encoded(images, self.layout.visual_tokens)
        shape = (0, self.layout.visual_tokens, self.config.vision.width)
        return np.concatenate([np.zeros(shape, np.float32), *encoded])

    def log_probabilities(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Float[np.ndarray, "prompts choices"]:
        """Log-probability of each of the texts `choices` right after each prompt, in batches.

        A choice begins as it would after the prompt's last text: " yes" or "yes". Raises `UserError` as `generate`.
        """
        fitted = [
            [self.layout.fit([*prompt, choice], "", self.context, None)[0] for choice in choices] for prompt in prompts
        ]
        # The tokenizer may join the end of a prompt with a choice: what all have in common is read once.
        stems = [
            min(self.layout.elements(prompt).common(one) for one in ones)
            for prompt, ones in zip(prompts, fitted, strict=True)
        ]
        found = np.zeros((len(prompts), len(choices)))
        for start in range(0, len(prompts), self.max_batch):
            own = slice(start, start + self.max_batch)
            found[own] = self._weigh(fitted[own], stems[own])
        return found

    def _weigh(self, fitted: Sequence[Sequence[Elements]], stems: Sequence[int]) -> Float[np.ndarray, "B choices"]:
        """One batch of prompts with each of the choices; prompt i without them has `stems[i]` elements."""
        count, rows = len(fitted), self._rows(len(fitted))
        filled = [*fitted, *[fitted[-1]] * (rows - count)]
        begin = np.array([*stems, *[stems[-1]] * (rows - count)], np.int32)
        rests = [[one.tokens[start:] for one in ones] for ones, start in zip(filled, begin, strict=True)]
        longest = 1 << (max(len(rest) for several in rests for rest in several) - 1).bit_length()
        cache = self._room(None, rows, bucket(padded(int(begin.max())) + longest))
        fronts = [ones[0].front(int(start)) for ones, start in zip(filled, begin, strict=True)]
        hidden, cache = self._prefill(fronts, 0, cache, None, counted=count)
        found = []
        for number in range(len(fitted[0])):
            tokens = np.full((rows, longest), self.tokenizer.pad_id, np.int32)
            lengths = np.array([len(several[number]) for several in rests], np.int32)
            for row, several in enumerate(rests):
                tokens[row, : lengths[row]] = several[number]
            rest = self._place((begin, tokens, lengths))
            found.append(self._fetch(self._log_probability(self._params, hidden, cache, *rest)))
        return np.stack(found, axis=1)[:count]

    def warm_up(self, max_positions: int, wanted: Wanted = TEXT, *, rows: Iterable[int] = (1,)) -> None:
        """Compile everything that prompts of up to `max_positions` and batches of `rows` prompts can need.

        After it, calls with this `wanted` (seeds and temperatures may differ) compile nothing.
        """
        size, width = self.config.vision.image_size, self.config.vision.width
        for count in (2**k for k in range(MAX_ENCODED.bit_length())):
            self._encode(np.zeros((count, size, size, 3), np.uint8), self.layout.visual_tokens)
            if self.layout.frame_tokens != self.layout.visual_tokens:
                self._encode(np.zeros((count, size, size, 3), np.uint8), self.layout.frame_tokens)
        longest = {padded(length): length for length in range(1, max_positions + 1)}
        computed = self.positions_computed
        for count in sorted({self._rows(count) for count in rows}):
            for length in longest.values():
                blank = Elements(np.full(length, self.tokenizer.pad_id, np.int32), ())
                for visual in (None, np.zeros((count, length, width), np.float32)):
                    self.answer([blank] * count, wanted, max_steps=1, visual=visual)
        self.positions_computed = computed

    # What follows is what chains are made of.

    def fit(self, prompt: Prompt, wanted: Wanted) -> tuple[Elements, int]:
        """A prompt as the language model reads it, and how many links `wanted.truncate` left out of it."""
        answer = wanted.positions(self.config.num_visual_tokens)
        if answer >= self.context:
            raise ConfigError(
                f"max_tokens: answers of up to {answer} positions leave none of {self.context} to a prompt"
            )
        tail = IMAGE_START if wanted.forced_images else ""
        return self.layout.fit(prompt, tail, self.context - answer, wanted.truncate)

    def read(self, elements: Elements, prefix: Prefix | None = None) -> Prefix:
        """The keys and values of a prompt; of those in `prefix` nothing is computed again."""
        known = 0 if prefix is None else min(elements.common(prefix.elements), len(elements) - 1)
        cache = self._room(prefix, 1, bucket(known + padded(len(elements) - known)))
        return Prefix(elements, self._prefill([elements], known, cache, None)[1])

    def answer_all(
        self,
        elements: Sequence[Elements],
        wanted: Wanted,
        *,
        prefix: Prefix | None = None,
        left_out: Sequence[int],
        same_draws: bool = False,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answers to any number of prompts, in batches; with `same_draws` all draw as the first does."""
        answers: list[Answer] = []
        for start in range(0, len(elements), self.max_batch):
            own = slice(start, start + self.max_batch)
            answers += self.answer(
                elements[own],
                wanted,
                prefix=prefix,
                left_out=left_out[own],
                first=None if same_draws else start,
                progress=progress,
            )[0]
        return answers

    def answer(
        self,
        elements: Sequence[Elements],
        wanted: Wanted,
        *,
        prefix: Prefix | None = None,
        left_out: Sequence[int] | None = None,
        first: int | None = 0,
        progress: Progress | None = None,
        max_steps: int | None = None,
        visual: np.ndarray | None = None,
    ) -> tuple[list[Answer], Prefix | None]:
        """Answers to one batch of prompts, and for a single one the keys and values of it and its answer.

        What all prompts have in common with `prefix` is not computed again. `first` is the number of the first prompt
        in the call, for its draws (None: all draw as number 0). To compile ahead, `max_steps` ends early and `visual`
        stands for images.
        """
        count, rows = len(elements), self._rows(len(elements))
        filled = [*elements, *[elements[-1]] * (rows - count)]
        known = 0
        if prefix is not None:
            known = min(min(one.common(prefix.elements), len(one) - 1) for one in elements)
        room = padded(max(map(len, elements)) - known) + wanted.positions(self.config.num_visual_tokens)
        cache = self._room(prefix if known else None, rows, bucket(known + room))
        hidden, cache = self._prefill(filled, known, cache, visual, counted=count)
        length = self._place(np.array([len(one) for one in filled], np.int32))
        limits = Limits(*map(_scalar, (wanted.max_tokens, wanted.min_tokens, wanted.most_images)))
        if isinstance(wanted.decoding, Beams):
            return self._search(elements, wanted.decoding, hidden, cache, length, limits, left_out, progress, max_steps)
        draw = self._draw(wanted.decoding) if isinstance(wanted.decoding, Sampling) else None
        seed = np.uint32(wanted.decoding.seed if isinstance(wanted.decoding, Sampling) else 0)
        numbers = np.zeros(rows, np.uint32) if first is None else np.arange(first, first + rows, dtype=np.uint32)
        keys = self._keys(seed, numbers)
        images = 1 << (wanted.most_images - 1).bit_length() if wanted.most_images else 0
        forced = self._place(np.full(rows, wanted.forced_images, np.int32))
        state = self._begin(
            self._params, hidden, cache, length, forced, keys, limits, draw, images * self.config.num_visual_tokens
        )
        run = functools.partial(self._run, self._params)
        state = self._drive(run, state, (limits, draw), progress, max_steps)
        if max_steps is not None:
            return [], None
        made, ids, embeddings = self._fetch((state.made, state.ids, state.embeddings))
        answers = [
            read_answer(
                ids[row, : made[row]],
                embeddings[row],
                self.tokenizer,
                self.config.num_visual_tokens,
                left_out=0 if left_out is None else left_out[row],
            )
            for row in range(count)
        ]
        return answers, Prefix(elements[0], state.cache) if count == 1 else None

    def _search(
        self,
        elements: Sequence[Elements],
        beams: Beams,
        hidden: Array,
        cache: Cache,
        length: Array,
        limits: Limits,
        left_out: Sequence[int] | None,
        progress: Progress | None,
        max_steps: int | None,
    ) -> tuple[list[Answer], None]:
        state = self._begin_beams(beams, self._params, hidden, cache, length, limits)
        state = self._drive(
            functools.partial(self._run_beams, beams, self._params), state, (limits,), progress, max_steps
        )
        ids, lengths, scores = self._fetch((state.ended_ids, state.ended_lengths, state.scores))
        none = np.zeros((0, self.config.vision.width), np.float32)
        answers = [
            read_answer(
                ids[row, 0, : lengths[row, 0]],
                none,
                self.tokenizer,
                self.config.num_visual_tokens,
                left_out=0 if left_out is None else left_out[row],
                score=float(scores[row, 0]),
                ended=bool(lengths[row, 0] < limits.max_tokens),
            )
            for row in range(len(elements))
        ]
        return answers, None

    def _drive(
        self,
        run: Callable[..., Any],
        state: Any,
        arguments: tuple[Any, ...],
        progress: Progress | None,
        most: int | None,
    ) -> Any:
        """Run the loop to its end, in stretches when `progress` wants to know of it."""
        if progress is None:
            return run(state, *arguments, np.int32(np.iinfo(np.int32).max if most is None else most))
        before = -1
        while True:
            made = int(np.max(self._fetch(state.made)))
            progress(made)
            if made == before:
                return state
            before = made
            state = run(state, *arguments, np.int32(PROGRESS_STEPS))

    def _prefill(
        self,
        elements: Sequence[Elements],
        known: int,
        cache: Cache,
        visual: np.ndarray | None,
        counted: int = 1,
    ) -> tuple[Array, Cache]:
        """Read the prompts from position `known` on, in stretches that all rows share."""
        rows = len(elements)
        lengths = np.array([len(one) for one in elements])
        self.positions_computed += int((lengths[:counted] - known).sum())
        encoded = self._visuals(elements, known)
        hidden = self._no_hidden(rows)
        start, longest = known, int(lengths.max())
        while start < longest:
            size = MAX_CHUNK if longest - start >= MAX_CHUNK else bucket(longest - start)
            chunk = self._chunk(elements, encoded, start, size, force_visual=visual is not None)
            ends = (lengths > start) & (lengths <= start + size)
            starts = np.full(rows, start, np.int32)
            hidden, cache = self._read(self._params, cache, self._place(starts), chunk, hidden, self._place(ends))
            start += size
        return hidden, cache

    def _chunk(
        self,
        elements: Sequence[Elements],
        encoded: dict[bytes, np.ndarray],
        start: int,
        size: int,
        *,
        force_visual: bool,
    ) -> Chunk:
        rows = len(elements)
        tokens = np.full((rows, size), self.tokenizer.pad_id, np.int32)
        is_visual = np.zeros((rows, size), bool)
        lengths = np.ones(rows, np.int32)
        embeddings: np.ndarray | None = None
        for row, one in enumerate(elements):
            own = one.tokens[start : start + size]
            tokens[row, : len(own)] = own
            is_visual[row, : len(own)] = one.is_visual()[start : start + size]
            lengths[row] = max(len(own), 1)
        if is_visual.any() or force_visual:
            embeddings = np.zeros((rows, size, self.config.vision.width), np.float32)
            for row, one in enumerate(elements):
                for visual in one.visuals:
                    first, last = max(visual.start, start), min(visual.start + visual.length, start + size)
                    if first < last:
                        source = encoded[visual.digest][first - visual.start : last - visual.start]
                        embeddings[row, first - start : last - start] = source
        return Chunk(*map(self._place, (tokens, is_visual, embeddings, lengths)))

    def _visuals(self, elements: Sequence[Elements], known: int) -> dict[bytes, np.ndarray]:
        """The visual embeddings of every image from position `known` on, by digest; new ones are encoded together."""
        found: dict[bytes, np.ndarray] = {}
        missing: dict[int, dict[bytes, np.ndarray]] = {}
        for visual in (visual for one in elements for visual in one.visuals if visual.start + visual.length > known):
            if visual.source.dtype != np.uint8:
                found[visual.digest] = visual.source
            elif visual.digest in self._embeddings:
                self._embeddings.move_to_end(visual.digest)
                found[visual.digest] = self._embeddings[visual.digest]
            else:
                missing.setdefault(visual.length, {})[visual.digest] = visual.source
        for length, pictures in missing.items():
            encoded = itertools.chain.from_iterable(self._encoded(list(pictures.values()), length))
            new = dict(zip(pictures, encoded, strict=True))
            found |= new
            self._embeddings.update(new)
        while len(self._embeddings) > 1 and sum(x.nbytes for x in self._embeddings.values()) > KEPT_BYTES:
            self._embeddings.popitem(last=False)
        return found

    def _encoded(self, images: Sequence[Pixels], visual_tokens: int) -> Iterator[Float[np.ndarray, "I N E"]]:
        """Embeddings of images, some of them at a time."""
        for start in range(0, len(images), MAX_ENCODED):
            batch = images[start : start + MAX_ENCODED]
            size = 1 << (len(batch) - 1).bit_length()
            yield self._encode(np.stack([*batch, *[batch[-1]] * (size - len(batch))]), visual_tokens)[: len(batch)]

    def _encode(self, pixels: np.ndarray, visual_tokens: int) -> np.ndarray:
        return self._fetch(self._encode_images(self._params["visual_encoder"], pixels, visual_tokens))

    def _rows(self, count: int) -> int:
        """Rows of a batch that holds `count` prompts: a power of two per shard."""
        return self._shards << (-(-count // self._shards) - 1).bit_length()

    def _room(self, prefix: Prefix | None, rows: int, capacity: int) -> Cache:
        """A cache for `rows`, empty or with what `prefix` holds in each."""
        if prefix is None:
            return self._empty(rows, capacity)
        return self._expand(prefix.cache, rows, max(capacity, prefix.cache.capacity))

    def _draw(self, decoding: Sampling) -> Draw:
        top_k = min(decoding.top_k or self.config.language.vocab_size, self.config.language.vocab_size)
        return Draw(
            jnp.asarray(np.float32(decoding.temperature)), _scalar(top_k), jnp.asarray(np.float32(decoding.top_p))
        )

    def _place(self, tree: Any) -> Any:
        """Rows on the devices that hold them."""
        return jax.device_put(tree, None if self.mesh is None else NamedSharding(self.mesh, P(sharding.ROWS)))

    def _fetch(self, tree: Any) -> Any:
        return jax.device_get(tree if self.mesh is None else self._gather(tree))

    def _compile(self) -> None:
        """The jitted functions. Each is compiled once per bucket of its shapes."""
        config, where = self.config, network.cache_sharding(self.mesh)
        language, dtype = config.language, self._dtype
        rows_only = None if self.mesh is None else NamedSharding(self.mesh, P(sharding.ROWS))

        def empty(rows: int, capacity: int) -> Cache:
            return network.empty_cache(language, rows, capacity, dtype)

        def read(params: Params, cache: Cache, start: Array, chunk: Chunk, hidden: Array, ends: Array) -> Any:
            found, cache = loop.prefill(config, params, cache, start, chunk, where)
            return jnp.where(ends[:, None], found, hidden), cache

        def encode(params: Params, pixels: Array, visual_tokens: int) -> Array:
            return encode_images(_with_tokens(config, visual_tokens), params, pixels)

        self._empty = jax.jit(empty, static_argnums=(0, 1), out_shardings=where)
        self._expand = jax.jit(network.grow_cache, static_argnums=(1, 2), out_shardings=where)
        self._no_hidden = jax.jit(
            lambda rows: jnp.zeros((rows, language.width), dtype), static_argnums=0, out_shardings=rows_only
        )
        self._read = jax.jit(read, donate_argnums=(1, 4))
        self._log_probability = jax.jit(functools.partial(loop.log_probability, config, where=where))
        self._encode_images = jax.jit(encode, static_argnums=2)
        self._keys = jax.jit(lambda seed, rows: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows))
        self._begin = jax.jit(functools.partial(loop.begin, config, self._ids), static_argnums=8, donate_argnums=2)
        self._run = jax.jit(
            lambda params, state, limits, draw, steps: loop.run(
                config, self._ids, params, state, limits, draw, steps, where
            ),
            donate_argnums=1,
        )
        self._begin_beams = jax.jit(functools.partial(beam.begin, self._ids), static_argnums=0)
        self._run_beams = jax.jit(
            lambda beams, params, state, limits, steps: beam.run(
                config, self._ids, beams, params, state, limits, steps, where
            ),
            static_argnums=0,
            donate_argnums=2,
        )
        if self.mesh is not None:
            self._gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, P()))


def _scalar(number: int) -> Array:
    return jnp.asarray(np.int32(number))  # a copy to the device: nothing is compiled for it


def _with_tokens(config: ModelConfig, visual_tokens: int) -> ModelConfig:
    return dataclasses.replace(config, num_visual_tokens=visual_tokens)
