"""Schedules, parts, clipping and decay, against AdamW written out in NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from emu2_jax import optimizer
from emu2_jax.config import OptimizerConfig

Tree = dict[str, Any]


def rates(num_steps: int, counts: list[int], **settings: Any) -> list[float]:
    schedule = optimizer.relative_schedule(OptimizerConfig(**settings), num_steps)
    return [float(schedule(jnp.asarray(count))) for count in counts]


def test_cosine_after_a_linear_warm_up() -> None:
    """14 updates, 4 of them warm-up: 1/4, 2/4, 3/4, 4/4, then half a cosine over 10."""
    values = rates(14, [0, 1, 2, 3, 4, 9, 13, 14, 20], warmup_steps=4)
    almost_zero = 0.5 * (1 + math.cos(0.9 * math.pi))
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5, almost_zero, 0.0, 0.0], abs=1e-6)


def test_the_decay_ends_at_the_final_ratio() -> None:
    """Without warm-up, over 8 updates to a tenth of the peak."""
    cosine = rates(8, [0, 4, 8], schedule="cosine", final_learning_rate_ratio=0.1)
    assert cosine == pytest.approx([1.0, 0.55, 0.1], abs=1e-6)
    linear = rates(8, [0, 2, 8, 9], schedule="linear", final_learning_rate_ratio=0.1)
    assert linear == pytest.approx([1.0, 0.775, 0.1, 0.1], abs=1e-6)
    assert rates(8, [0, 4, 8], schedule="constant", final_learning_rate_ratio=0.1) == [1.0, 1.0, 1.0]


def test_warm_up_steps_override_the_ratio() -> None:
    assert rates(10, [0], warmup_ratio=0.2) == [0.5]
    assert rates(10, [0], warmup_ratio=0.2, warmup_steps=5) == pytest.approx([0.2])
    assert rates(10, [0], warmup_ratio=0.2, warmup_steps=0) == [1.0]


def test_a_logarithmic_warm_up_rises_fast_and_then_slowly() -> None:
    """Update n of 3: log(1 + n) / log(4), that is 1/2, log 3 / log 4, 1; then the linear decay over 4."""
    values = rates(7, [0, 1, 2, 3, 5, 7], warmup="log", warmup_steps=3, schedule="linear")
    assert values == pytest.approx([0.5, math.log(3) / math.log(4), 1.0, 1.0, 0.5, 0.0], abs=1e-6)
    assert rates(4, [0, 4], warmup="log", warmup_steps=0, schedule="constant") == [1.0, 1.0]


def test_a_moving_average_forgets_its_start_first_and_then_decays() -> None:
    """Decays 1/10, 2/11, then the setting's 0.2: averages of 0, 10, 11 and 12 by hand."""
    average, wanted = {"a": jnp.zeros(2)}, 0.0
    for count, (value, decay) in enumerate(((10.0, 1 / 10), (11.0, 2 / 11), (12.0, 0.2))):
        average = optimizer.moving_average(0.2, average, {"a": jnp.full(2, value)}, jnp.asarray(count))
        wanted = decay * wanted + (1 - decay) * value
        np.testing.assert_allclose(average["a"], wanted, rtol=1e-6)


def test_each_part_has_its_own_peak() -> None:
    config = OptimizerConfig(
        learning_rate=1.0,
        visual_encoder_learning_rate=2.0,
        connector_learning_rate=3.0,
        language_model_learning_rate=4.0,
    )
    parts = ("visual_encoder", "project_up", "project_down", "language_model", "unet")
    assert [optimizer.peak_learning_rate(config, part) for part in parts] == [2.0, 3.0, 3.0, 4.0, 1.0]
    assert optimizer.peak_learning_rate(OptimizerConfig(learning_rate=0.5), "language_model") == 0.5
    assert optimizer.peak_learning_rate(OptimizerConfig(visual_encoder_learning_rate=0.0), "visual_encoder") == 0.0


def draw(seed: int) -> Tree:
    """Matrices and vectors of three parts."""
    rng = np.random.default_rng(seed)
    return {
        "visual_encoder": {
            "patch_kernel": rng.normal(size=(2, 2)).astype(np.float32),
            "class_embedding": rng.normal(size=3).astype(np.float32),
            "blocks": {"layers": {"mlp_norm": {"scale": rng.normal(size=(2, 3)).astype(np.float32)}}},
        },
        "project_up": {"kernel": rng.normal(size=(2, 3)).astype(np.float32)},
        "language_model": {
            "token_embedding": rng.normal(size=(4, 3)).astype(np.float32),
            "head": rng.normal(size=(3, 4)).astype(np.float32),
        },
    }


DECAYED = {"patch_kernel", "kernel", "head"}
CONFIG = OptimizerConfig(
    learning_rate=0.1,
    visual_encoder_learning_rate=0.2,
    connector_learning_rate=0.3,
    schedule="linear",
    warmup_steps=2,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-3,
    weight_decay=0.05,
    clip_norm=1.5,
)
RATES = {"visual_encoder": 0.2, "project_up": 0.3, "language_model": 0.1}
NUM_STEPS = 4


def adamw_by_hand(params: Tree, gradients: list[Tree]) -> Tree:
    """Loshchilov and Hutter's decoupled decay, Kingma and Ba's bias correction, one clip over all parts."""
    relative = [0.5, 1.0, 1.0, 0.5]
    out = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    first, second = (jax.tree.map(np.zeros_like, out) for _ in range(2))
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda leaf, norm=norm: leaf * min(1.0, 1.5 / norm), gradient)
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, second, gradient)

        def update(path: Any, p: np.ndarray, m: np.ndarray, v: np.ndarray, step: int = step) -> np.ndarray:
            direction = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3)
            decay = 0.05 * p if path[-1].key in DECAYED else 0.0
            return p - RATES[path[0].key] * relative[step] * (direction + decay)

        out = jax.tree_util.tree_map_with_path(update, out, first, second)
    return out


def run(config: OptimizerConfig, params: Tree, gradients: list[Tree]) -> tuple[Tree, Any]:
    tx = optimizer.build(config, NUM_STEPS)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_four_steps_equal_adamw_by_hand() -> None:
    """The gradients of steps 1 and 3 are small enough to escape the clip."""
    params = draw(0)
    scales = (1.0, 0.1, 2.0, 0.1)
    gradients = [jax.tree.map(lambda g, s=scale: g * s, draw(i)) for i, scale in enumerate(scales, start=1)]
    norms = [float(optax.tree.norm(gradient)) for gradient in gradients]
    assert [norm > 1.5 for norm in norms] == [True, False, True, False]
    trained, _ = run(CONFIG, params, gradients)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6),
        trained,
        adamw_by_hand(params, gradients),
    )


def test_decay_shrinks_matrices_only() -> None:
    """With a zero gradient, what moves is what decays; embeddings, norms and biases stay."""
    params = draw(0)
    zeros = jax.tree.map(np.zeros_like, params)
    trained, _ = run(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0), params, [zeros])

    def check(path: Any, before: np.ndarray, after: jax.Array) -> None:
        factor = 0.95 if path[-1].key in DECAYED else 1.0
        np.testing.assert_allclose(after, before * factor, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, params, trained)


def test_without_a_clip_large_gradients_stay_large() -> None:
    """Adam alone hides the scale of a gradient; its first moment does not."""
    params, gradient = draw(0), jax.tree.map(lambda g: 100 * g, draw(1))
    moments = {}
    for clip_norm in (None, 1.0):
        _, state = run(OptimizerConfig(clip_norm=clip_norm, beta1=0.5), params, [gradient])
        moments[clip_norm] = float(optax.tree.norm(optax.tree_utils.tree_get(state, "mu")))
    assert moments[None] == pytest.approx(0.5 * float(optax.tree.norm(gradient)), rel=1e-4)
    assert moments[1.0] == pytest.approx(0.5, rel=1e-4)


def test_the_first_moment_can_be_stored_in_bfloat16() -> None:
    params = draw(0)
    _, state = run(OptimizerConfig(moment_dtype="bfloat16"), params, [draw(1)])
    mu, nu = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(mu)} == {np.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(nu)} == {np.dtype("float32")}


def test_frozen_parts_are_split_off_and_have_no_moments() -> None:
    params = draw(0)
    config = OptimizerConfig(frozen=("visual_encoder", "project_down"))
    trained, frozen = optimizer.split_frozen(config, params)
    assert (set(trained), set(frozen)) == ({"project_up", "language_model"}, {"visual_encoder"})
    assert trained["project_up"] is params["project_up"]
    moments = optax.tree_utils.tree_get(optimizer.build(config, NUM_STEPS).init(trained), "mu")
    assert tiny.leaf_paths(moments) == tiny.leaf_paths(trained)


@pytest.mark.parametrize(
    ("path", "decayed"),
    [
        ("visual_encoder/blocks/layers/attention/qkv", True),
        ("visual_encoder/blocks/layers/attention/q_bias", False),
        ("visual_encoder/blocks/layers/mlp/up_bias", False),
        ("visual_encoder/position_embedding", False),
        ("language_model/blocks/layers/attention/k", True),
        ("language_model/blocks/layers/mlp/gate", True),
        ("language_model/final_norm/scale", False),
        ("unet/conv_in/kernel", True),
        ("unet/conv_in/bias", False),
    ],
)
def test_what_decays(path: str, decayed: bool) -> None:
    params: Any = jnp.ones(1)
    for name in reversed(path.split("/")):
        params = {name: params}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer.build(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 1)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert float(jax.tree.leaves(updates)[0][0]) == (-0.5 if decayed else 0.0)
