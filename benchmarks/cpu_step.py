"""One training step of a small Emu2, here and in PyTorch, on the same processor in one run.

    .venv-parity/bin/python -m benchmarks.cpu_step

Needs torch and transformers, which `make test-parity` installs there. A step is forward, backward, clipping and AdamW,
float32, on packed rows of one document with two images each; nothing is frozen. Ours computes norms and activations
again in the backward pass, which is quicker here than to keep them. PyTorch's side is transformers' LLaMA and a plain
ViT, with `scaled_dot_product_attention`, logits of the supervised positions alone and fused AdamW; it is timed as it is
and through `torch.compile`, and the quicker counts. Both start from the same weights, and their losses over the first
steps must agree. The sides take turns. JSON lines; milliseconds are medians over rounds, `torch_over_ours` is their
ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from emu2_jax.config import (
    DataConfig,
    ExperimentConfig,
    LanguageConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    VisionConfig,
)
from emu2_jax.errors import UserError
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.models.eva_vit import CLIP_MEAN, CLIP_STD
from emu2_jax.sequence import RowShape, empty_batch
from emu2_jax.train import build_program
from emu2_jax.weights.names import table
from emu2_jax.weights.state_dict import to_state_dict

ROWS, LENGTH, IMAGES = 4, 512, 2
BOS, PAD, IMAGE_START, IMAGE_END, IMAGE = 1, 0, 3, 4, 5
FIRST_WORD = 10  #: smaller ids are special
CHECKED_STEPS = 3
LOSS_RTOL = 1e-4  #: between the losses of the two sides, after up to `CHECKED_STEPS` - 1 updates
THREADS = 2

CONFIG = ExperimentConfig(
    name="cpu_step",
    model=ModelConfig(
        vision=VisionConfig(image_size=224, width=256, num_layers=6, num_heads=4, mlp_width=1024),
        language=LanguageConfig(width=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_width=1376),
        compute_dtype="float32",
        remat="dots_with_context",
    ),
    objective=ObjectiveConfig(vocab_block_positions=None),
    data=DataConfig(row_length=LENGTH, image_slots=IMAGES, global_batch_rows=ROWS),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
)

#: Takes one step and returns its text and regression losses.
Step = Callable[[], tuple[float, float]]


def packed_rows() -> dict[str, np.ndarray]:
    """Rows full of words but for their images: one near the start, one in the middle."""
    random, tokens = np.random.default_rng(0), CONFIG.model.num_visual_tokens
    batch = empty_batch(ROWS, RowShape(LENGTH, IMAGES, tokens, CONFIG.model.vision.image_size), PAD)
    batch["tokens"][:] = random.integers(FIRST_WORD, CONFIG.model.language.vocab_size, (ROWS, LENGTH))
    batch["tokens"][:, 0] = BOS
    for slot, start in enumerate((1, LENGTH // 2)):
        inside = slice(start + 1, start + 1 + tokens)
        batch["tokens"][:, start] = IMAGE_START
        batch["tokens"][:, inside] = IMAGE
        batch["tokens"][:, start + 1 + tokens] = IMAGE_END
        batch["is_visual"][:, inside] = True
        batch["visual_index"][:, inside] = slot * tokens + np.arange(tokens)
    batch["segment_ids"][:] = 1
    batch["positions"][:] = np.arange(LENGTH)
    batch["loss_weights"][:] = 1.0
    batch["images"][:] = random.integers(0, 256, batch["images"].shape)
    batch["image_mask"][:] = True
    return batch


def our_step(batch: dict[str, np.ndarray]) -> tuple[Step, dict[str, np.ndarray]]:
    """The step that training runs, and the weights that it starts from under the release's names."""
    task = PretrainTask(CONFIG, image_start_id=IMAGE_START, image_end_id=IMAGE_END)
    program = build_program(task, CONFIG, jax.devices()[:1])
    state = program.init()
    weights = to_state_dict(jax.device_get(state["params"]), table("emu2", CONFIG.model))
    arrays = jax.device_put(batch)

    def step() -> tuple[float, float]:
        nonlocal state
        state, log = program.step(state, arrays)
        jax.block_until_ready(state)  # the update, too, is part of the step
        text, regression = (log["terms"][name] for name in ("text", "regression"))
        return float(text.sum / text.weight), float(regression.sum / regression.weight)

    return step, weights


def torch_step(batch: dict[str, np.ndarray], weights: dict[str, np.ndarray], compiled: bool) -> Step:
    """The same in PyTorch. Raises `UserError` that says how to get it."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # not needed, and often of another build
    try:
        import torch

        from benchmarks.torch_emu2 import Emu2
    except ImportError as error:
        raise UserError(
            f"benchmarks.cpu_step: needs torch and transformers ({error}); `make test-parity` installs both, then run "
            ".venv-parity/bin/python -m benchmarks.cpu_step"
        ) from error
    torch.set_num_threads(THREADS)
    tokens = torch.from_numpy(batch["tokens"]).long()
    images = torch.from_numpy(batch["images"]).flatten(0, 1)
    position = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    visual = batch["is_visual"]
    text = ~visual
    text[:, 0] = False  # nothing predicts the first element of a document
    places = {"visual": position[visual], "before_visual": position[visual] - 1}
    places |= {"text": position[text], "before_text": position[text] - 1}
    indices = {name: torch.from_numpy(array) for name, array in places.items()}
    indices |= {"mean": torch.tensor(CLIP_MEAN), "std": torch.tensor(CLIP_STD)}

    model = Emu2(CONFIG.model)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    settings = CONFIG.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    losses = torch.compile(model) if compiled else model

    def step() -> tuple[float, float]:
        text_loss, regression_loss = losses(tokens, images, indices)
        (text_loss + regression_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return text_loss.item(), regression_loss.item()

    return step


def check_losses(steps: dict[str, Step]) -> float:
    """Take the first steps on every side; their largest relative difference. Raises `UserError` beyond `LOSS_RTOL`."""
    losses = {side: np.array([step() for _ in range(CHECKED_STEPS)]) for side, step in steps.items()}
    differences = {side: float(np.abs(values / losses["ours"] - 1).max()) for side, values in losses.items()}
    for side, difference in differences.items():
        if not difference <= LOSS_RTOL:  # a loss that is not a number fails, too
            raise UserError(
                f"benchmarks.cpu_step: losses of {side} differ from ours by {difference:.2g}, wanted {LOSS_RTOL}: "
                f"text and regression by step are {losses[side].tolist()}, ours {losses['ours'].tolist()}"
            )
    return max(differences.values())


def compare(rounds: int, compile_torch: bool) -> dict[str, object]:
    """Time all sides in turns, after a check that they compute the same losses."""
    batch = packed_rows()
    ours, weights = our_step(batch)
    steps = {"ours": ours, "eager": torch_step(batch, weights, compiled=False)}
    if compile_torch:
        steps["compile"] = torch_step(batch, weights, compiled=True)
    difference = check_losses(steps)
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            began = time.perf_counter()
            step()
            times[side].append(1e3 * (time.perf_counter() - began))
    medians = {side: statistics.median(values) for side, values in times.items()}
    best = min((side for side in steps if side != "ours"), key=medians.__getitem__)
    return {
        "case": "cpu_step",
        "torch_over_ours": medians[best] / medians["ours"],
        "ours_ms": medians["ours"],
        "torch_ms": {side: value for side, value in medians.items() if side != "ours"},
        "torch_best": best,
        "threads": THREADS,
        "rounds": rounds,
        "max_loss_difference": difference,
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < THREADS:
        raise SystemExit(f"error: benchmarks.cpu_step: wanted {THREADS} cores, got {len(cores)}")
    os.sched_setaffinity(0, cores[:THREADS])  # XLA's threads are as many as the cores it sees
    try:
        print(json.dumps(compare(arguments.rounds, not arguments.no_compile)), flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
