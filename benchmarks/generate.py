"""Cached generation: against the release's way, against transformers, and how often it compiles.

    .venv-parity/bin/python -m benchmarks.generate

Needs torch and transformers, which `make test-parity` installs there; `--case recompiles` and `--case image-64` do
without. The model has a vision part of 256 x 6 layers and a language model of 512 x 8, random weights, float32. The two
sides of a comparison take turns in one process. JSON lines; milliseconds are medians over rounds.

image-64: a prompt of 196 positions with two images, then 64 embeddings. The release has no cache: it runs the whole
prefix for each of them. Here that is the model's own forward pass, compiled for lengths that are multiples of 4. What
bounds the cached side is the speed at which its 64 steps read the layers' weights, `weights_gb_per_s`.
text-greedy: 128 tokens after a prompt of 64. PyTorch is timed on all cores and on one, and the better of both counts.
recompiles: programs that XLA compiles in 200 calls of random length and kind, after `Generator.warm_up`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu2_jax import weights
from emu2_jax.config import LanguageConfig, ModelConfig, VisionConfig
from emu2_jax.errors import UserError
from emu2_jax.generation.answer import IMAGE, Wanted
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.prompt import Elements, Visual
from emu2_jax.models import emu2
from emu2_jax.tokenizer import Tokenizer
from emu2_jax.weights.state_dict import to_state_dict

MODEL = ModelConfig(
    vision=VisionConfig(image_size=112, width=256, num_layers=6, num_heads=4, mlp_width=1024),
    language=LanguageConfig(width=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_width=1376),
    num_visual_tokens=64,
    compute_dtype="float32",
    frozen_dtype="float32",
    remat="none",
)
SMALL = ModelConfig(
    vision=VisionConfig(image_size=28, width=32, num_layers=1, num_heads=2, mlp_width=64),
    language=LanguageConfig(vocab_size=64, width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=64),
    num_visual_tokens=4,
    compute_dtype="float32",
    frozen_dtype="float32",
    remat="none",
)
PROMPT_POSITIONS, TEXT_PROMPT, NUM_TOKENS = 196, 64, 128
NUM_PROMPTS, LONGEST = 200, 200
LENGTH_STEP = 4  #: positions; the uncached side's programs are this far apart, which adds under 1 % to its work
COMPILED = "/jax/core/compile/backend_compile_duration"


class Ids(Tokenizer):
    """The ids alone: prompts are made of ids here, and answers are not read."""

    def __init__(self, vocab_size: int) -> None:
        first = vocab_size - 16
        self.bos_id, self.eos_id, self.pad_id = 1, 2, first
        self.image_start_id, self.image_end_id, self.image_id, self.frame_id = (first + i for i in range(1, 5))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))


def prompt(config: ModelConfig, ids: Ids, length: int, num_images: int, random: np.random.Generator) -> Elements:
    """`<s>`, images, random text up to `length` positions, the last being `[IMG]` when there are images."""
    num, size = config.num_visual_tokens, config.vision.image_size
    tokens, visuals = [ids.bos_id], []
    for _ in range(num_images):
        pixels = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
        visuals.append(Visual(pixels, len(tokens) + 1, num, random.bytes(16)))
        tokens += [ids.image_start_id, *[ids.image_id] * num, ids.image_end_id]
    tokens += random.integers(3, ids.pad_id, length - len(tokens)).tolist()
    if num_images:
        tokens[-1] = ids.image_start_id
    return Elements(np.array(tokens, np.int32), tuple(visuals))


def random_parameters(config: ModelConfig) -> Any:
    """Random weights of a tame model.

    What layers add to the residual stream is small. With plain random weights a model that feeds on its own embeddings
    is chaotic: a difference in the last bit grows by half at every step, and nothing could be compared after 64.
    """
    params = emu2.init(config, jax.random.key(0))

    def tamed(path: Any, leaf: jax.Array) -> jax.Array:
        return 0.2 * leaf if path[-1].key in ("out", "down") and path[0].key == "language_model" else leaf

    return jax.tree_util.tree_map_with_path(tamed, params)


def rerun(config: ModelConfig, params: Any, elements: Elements, programs: dict[int, Any]) -> np.ndarray:
    """64 embeddings the release's way: the whole prefix through the model for each."""
    num = config.num_visual_tokens
    pixels = np.stack([visual.source for visual in elements.visuals])
    embeddings = np.asarray(programs[0](params, pixels))
    made: list[np.ndarray] = []
    tokens = np.concatenate([elements.tokens, np.full(num, elements.tokens[2], np.int32)])
    visual = np.zeros((len(tokens), config.vision.width), np.float32)
    is_visual = np.zeros(len(tokens), bool)
    for image, one in zip(embeddings, elements.visuals, strict=True):
        visual[one.start : one.start + num], is_visual[one.start : one.start + num] = image, True
    for length in range(len(elements), len(elements) + num):
        size = -(-length // LENGTH_STEP) * LENGTH_STEP
        inputs = (tokens[None, :size], is_visual[None, :size], visual[None, :size], np.int32(length - 1))
        made.append(np.asarray(programs[size](params, *inputs))[0])
        visual[length : length + 1], is_visual[length : length + 1] = made[-1], True
    return np.stack(made)


def rerun_programs(config: ModelConfig, params: Any) -> dict[int, Any]:
    """The encoder (0), and the model's forward pass by its length."""

    @jax.jit
    def forward(params: Any, tokens: Any, is_visual: Any, visual: Any, at: Any) -> Any:
        model = emu2.merge(config, params)
        x = jnp.where(is_visual[..., None], model.project_up(visual), model.language_model.embed(tokens, jnp.float32))
        length = tokens.shape[1]
        positions, causal = jnp.arange(length)[None], jnp.tril(jnp.ones((1, length, length), bool))
        return model.project_down(model.language_model(x, positions, causal)[:, at])

    lengths = range(PROMPT_POSITIONS, PROMPT_POSITIONS + config.num_visual_tokens + LENGTH_STEP, LENGTH_STEP)
    encode = jax.jit(lambda params, pixels: emu2.encode_images(config, params["visual_encoder"], pixels))
    return {0: encode} | dict.fromkeys(lengths, forward)


def image_64(rounds: int) -> dict[str, object]:
    """64 embeddings after a prompt, cached and the release's way."""
    ids, random = Ids(MODEL.language.vocab_size), np.random.default_rng(0)
    params = random_parameters(MODEL)
    generator, programs = Generator(MODEL, params, ids), rerun_programs(MODEL, params)
    # A new prompt each time: pictures that were seen before would not be encoded again.
    prompts = [prompt(MODEL, ids, PROMPT_POSITIONS, 2, random) for _ in range(2 * rounds + 2)]

    def ours(elements: Elements) -> np.ndarray:
        return generator.answer([elements], IMAGE)[0][0].embeddings[0]

    theirs = partial(rerun, MODEL, params, programs=programs)

    def read(elements: Elements) -> None:
        jax.block_until_ready(generator.read(elements).cache)

    read(prompts.pop())
    made, wanted = ours(prompts[0]), theirs(prompts.pop(0))
    difference = float(np.abs(made - wanted).max() / np.abs(wanted).max())
    here, there, reading = [], [], []
    for elements, other in zip(prompts[::2], prompts[1::2], strict=True):
        there.append(_milliseconds(partial(theirs, elements)))
        here.append(_milliseconds(partial(ours, elements)))
        reading.append(_milliseconds(partial(read, other)))
    steps_s = 1e-3 * (statistics.median(here) - statistics.median(reading))
    blocks = params["language_model"]["blocks"]
    gigabytes = MODEL.num_visual_tokens * 1e-9 * sum(leaf.nbytes for leaf in jax.tree.leaves(blocks))
    return {
        "case": "image-64",
        "rerun_over_cached": statistics.median(there) / statistics.median(here),
        "rerun_ms": statistics.median(there),
        "cached_ms": statistics.median(here),
        "prompt_positions": PROMPT_POSITIONS,
        "rounds": rounds,
        "prompt_ms": statistics.median(reading),
        "weights_gb_per_s": gigabytes / steps_s,
        "max_relative_difference": difference,
    }


def text_greedy(rounds: int) -> dict[str, object]:
    """Greedy text, here and by transformers with its cache."""
    ids, random = Ids(MODEL.language.vocab_size), np.random.default_rng(1)
    params = random_parameters(MODEL)
    generator = Generator(MODEL, params, ids)
    elements = prompt(MODEL, ids, TEXT_PROMPT, 0, random)
    wanted = Wanted(max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)

    def ours() -> list[int]:
        return generator.answer([elements], wanted)[0][0].token_ids.tolist()

    theirs = transformers_greedy(params, elements.tokens, ids)
    threads = sorted({1, os.cpu_count() or 1})
    same = all(ours() == theirs(count) for count in threads)
    here: list[float] = []
    there: dict[int, list[float]] = {count: [] for count in threads}
    for _ in range(rounds):
        for count in threads:
            there[count].append(_milliseconds(partial(theirs, count)))
        here.append(_milliseconds(ours))
    medians = {count: statistics.median(times) for count, times in there.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "case": "text-greedy",
        "transformers_over_ours": medians[best] / statistics.median(here),
        "transformers_ms_per_token": medians[best] / NUM_TOKENS,
        "transformers_threads": best,
        "ours_ms_per_token": statistics.median(here) / NUM_TOKENS,
        "same_ids": same,
        "rounds": rounds,
    }


def transformers_greedy(params: Any, tokens: np.ndarray, ids: Ids) -> Callable[[int], list[int]]:
    """The same by transformers, on a number of threads. Raises `UserError` that says how to get it."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # not needed, and often of another build
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"benchmarks.generate: text-greedy needs torch and transformers ({error}); `make test-parity` installs "
            "both, then run .venv-parity/bin/python -m benchmarks.generate"
        ) from error

    language = MODEL.language
    settings = transformers.LlamaConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.width,
        intermediate_size=language.mlp_width,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        rms_norm_eps=language.rms_norm_epsilon,
        bos_token_id=ids.bos_id,
        eos_token_id=ids.eos_id,
        pad_token_id=ids.pad_id,
    )
    model = transformers.LlamaForCausalLM(settings).eval()
    state = to_state_dict({"language_model": params["language_model"]}, weights.table("llama_hf", MODEL))
    model.load_state_dict({name: torch.tensor(np.array(array)) for name, array in state.items()})
    inputs = torch.tensor(tokens[None].astype(np.int64))

    @torch.inference_mode()
    def run(threads: int) -> list[int]:
        torch.set_num_threads(threads)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
        )
        return out[0, inputs.shape[1] :].tolist()

    return run


def recompiles() -> dict[str, object]:
    """What is compiled in use, after warming up: prompts of random length, with and without images, text and image."""
    ids, random = Ids(SMALL.language.vocab_size), np.random.default_rng(2)
    generator = Generator(SMALL, random_parameters(SMALL), ids)
    compiled: list[float] = []

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(hear)
    kinds = (Wanted(max_tokens=16), IMAGE)
    began = time.perf_counter()
    for wanted in kinds:
        generator.warm_up(LONGEST, wanted, rows=(1, 4))
    ahead, seconds = len(compiled), time.perf_counter() - began
    lengths = []
    for number in range(NUM_PROMPTS):
        rows = int(random.integers(1, 5))
        rows = rows if rows in (1, 4) else 4 if rows > 2 else 1
        batch = []
        for _ in range(rows):
            num_images = int(random.integers(number % 2, 5))
            least = 2 + num_images * (SMALL.num_visual_tokens + 2)
            lengths.append(int(random.integers(least, LONGEST + 1)))
            batch.append(prompt(SMALL, ids, lengths[-1], num_images, random))
        if number % 2:
            generator.answer(batch, IMAGE)
        else:
            generator.answer(batch, kinds[0])
    return {
        "case": "recompiles",
        "count": len(compiled) - ahead,
        "prompts": len(lengths),
        "calls": NUM_PROMPTS,
        "lengths": len(set(lengths)),
        "ahead": ahead,
        "ahead_s": seconds,
    }


def _milliseconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


CASES: dict[str, Callable[[int], dict[str, object]]] = {
    "image-64": image_64,
    "text-greedy": text_greedy,
    "recompiles": lambda rounds: recompiles(),
}


def main() -> None:
    """Print one JSON line per case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this one (all)")
    arguments = parser.parse_args()
    try:
        for name in arguments.case or CASES:
            print(json.dumps(CASES[name](arguments.rounds)), flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
