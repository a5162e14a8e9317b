"""AdamW over the parts that train, each with its own peak learning rate under one schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emu2_jax.config import OptimizerConfig
from emu2_jax.sharding import path_of

#: Last path components of the parameters that weight decay shrinks: the matrices, not norms, biases or embeddings.
DECAYED = frozenset({"kernel", "qkv", "q", "k", "v", "out", "up", "down", "gate", "head", "patch_kernel"})


def peak_learning_rate(config: OptimizerConfig, part: str) -> float:
    """Peak learning rate of a part, the default one unless the part has its own."""
    own = {
        "visual_encoder": config.visual_encoder_learning_rate,
        "project_up": config.connector_learning_rate,
        "project_down": config.connector_learning_rate,
        "language_model": config.language_model_learning_rate,
        "temporal": config.temporal_learning_rate,
    }.get(part)
    return config.learning_rate if own is None else own


def relative_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate relative to its peak: the warm-up from 0, then the decay, over `num_steps` updates.

    The first update has count 0, so with a linear warm-up of w updates it runs at 1/w of the peak: none is wasted at 0.
    A logarithmic one gives update n of w the share log(1 + n) / log(1 + w): half of the peak after about sqrt(w).
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * num_steps)
    decay_steps = max(num_steps - warmup, 1)
    end = config.final_learning_rate_ratio

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        whole = max(warmup, 1)
        updates = jnp.minimum(count + 1, whole)
        rising = updates / whole if config.warmup == "linear" else jnp.log1p(updates) / np.log1p(whole)
        progress = jnp.clip((count - warmup) / decay_steps, 0.0, 1.0)
        falling = {
            "cosine": end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - (1 - end) * progress,
            "constant": jnp.ones_like(progress),
        }[config.schedule]
        return jnp.where(count < warmup, rising, falling)

    return schedule


def split_frozen(config: OptimizerConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts that train, and those that do not."""
    trained = {part: tree for part, tree in params.items() if part not in config.frozen}
    return trained, {part: tree for part, tree in params.items() if part not in trained}


def cast_frozen(frozen_dtype: str, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that do not train, as they are stored; the VAE stays in float32 (SDXL's overflows in half precision)."""
    return {
        part: tree if part == "vae" else jax.tree.map(lambda x: x.astype(frozen_dtype), tree)
        for part, tree in frozen.items()
    }


def moving_average(decay: float, average: Any, params: Any, num_updates: jax.Array) -> Any:
    """The average after one more update, that of `params`, number `num_updates` counted from 0.

    Early on the decay is (1 + n) / (10 + n) where that is less, so that the initial parameters are soon forgotten.
    Source: diffusers `EMAModel`, as TensorFlow's `ExponentialMovingAverage` with `num_updates`.
    """
    count = num_updates.astype(jnp.float32)
    share = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda old, new: old + share * (new - old), average, params)


def build(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay on matrices, per-part learning rates; trained parts only."""
    relative = relative_schedule(config, num_steps)

    def scale_by_part(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> tuple[Any, Any]:
        del params
        rate = relative(state.count)
        scaled = {}
        for part, tree in updates.items():
            step_size = -peak_learning_rate(config, part) * rate
            scaled[part] = optax.tree.scale(step_size, tree)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, mask=_is_decayed),
        optax.GradientTransformation(
            lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)), scale_by_part
        ),
    )


def _is_decayed(params: Any) -> Any:
    def decayed(key_path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        return path_of(key_path).rsplit("/", 1)[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decayed, params)
