"""The config.json files of diffusers as settings of this package, and back.

A setting that these networks have no counterpart of is refused by name, never passed over: a network that is computed
in another way gives numbers that look right.

Source: the constructors of diffusers `UNet2DConditionModel`, `AutoencoderKL` and `EulerDiscreteScheduler`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu2_jax.config import DecoderConfig, UNetConfig, VAEConfig
from emu2_jax.diffusion.unet import NUM_TIME_IDS, added_width, mid_layers
from emu2_jax.errors import WeightsError

Settings = Mapping[str, Any]

#: Settings of a U-Net that have one value here, which is also diffusers' default (but for `use_linear_projection`).
_UNET_FIXED: Settings = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,  # in these files `attention_head_dim` means the number of heads
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": True,
}
#: Settings of a U-Net that change no number here: scores are always float32, sizes are those of the inputs.
_UNET_FREE = {"addition_embed_type_num_heads", "sample_size", "upcast_attention"}
_VAE_FIXED: Settings = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_FREE = {"force_upcast", "sample_size"}
_SCHEDULE_FIXED: Settings = {
    "beta_schedule": "scaled_linear",
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_PLAIN, _ATTENTION = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def read_settings(config: Settings | str | Path, what: str) -> tuple[Settings, str]:
    """The settings of a config.json, given as what it holds or by its path, and the name that errors give it."""
    if isinstance(config, Mapping):
        return config, what
    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{config}: is no config.json that can be read: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{config}: is no config.json: it holds a {type(settings).__name__}")
    return settings, str(config)


def unet_config(config: Settings | str | Path) -> UNetConfig:
    """A U-Net's config.json as `UNetConfig`. Raises `WeightsError` that names the setting that cannot be had."""
    settings, source = read_settings(config, "unet config")
    read = _Reader(settings, source)
    widths = tuple(read.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(widths)
    attention = _levels_with_attention(read, levels)
    depth = _per_level(read, "transformer_layers_per_block", 1, levels)
    heads = _per_level(read, "attention_head_dim", 8, levels)
    added = read.get("addition_embed_type", None)
    time_id_width = read.get("addition_time_embed_dim", None)
    inputs = read.get("projection_class_embeddings_input_dim", None)
    cross = read.get("cross_attention_dim", 1280)
    if not isinstance(cross, int):
        raise read.error("cross_attention_dim", "one number")
    if added not in (None, "text_time"):
        raise read.error("addition_embed_type", "text_time or none")
    own: dict[str, Any] = {"micro_conditions": False}
    if added == "text_time":
        for name, value in (
            ("addition_time_embed_dim", time_id_width),
            ("projection_class_embeddings_input_dim", inputs),
        ):
            if not isinstance(value, int):
                raise read.error(name, "a number, for addition_embed_type is text_time")
        pooled = inputs - NUM_TIME_IDS * time_id_width
        if pooled < 1:
            raise read.error(
                "projection_class_embeddings_input_dim", f"more than {NUM_TIME_IDS} x addition_time_embed_dim"
            )
        own = {"time_id_width": time_id_width, "pooled_width": None if pooled == cross else pooled}
    layers = read.get("layers_per_block", 2)
    if not isinstance(layers, int):
        raise read.error("layers_per_block", "one number for all levels")
    unet = UNetConfig(
        in_channels=read.get("in_channels", 4),
        out_channels=read.get("out_channels", 4),
        block_out_channels=widths,
        layers_per_block=layers,
        transformer_layers_per_block=tuple(n if there else 0 for n, there in zip(depth, attention, strict=True)),
        mid_transformer_layers=None if attention[-1] else depth[-1],
        num_attention_heads=heads,
        cross_attention_width=cross,
        norm_groups=read.get("norm_num_groups", 32),
        norm_epsilon=read.get("norm_eps", 1e-5),
        **own,
    )
    read.finish(_UNET_FIXED, _UNET_FREE, defaults={"use_linear_projection": False})
    return unet


def _levels_with_attention(read: _Reader, levels: int) -> list[bool]:
    down = read.get("down_block_types", (_ATTENTION[0],) * (levels - 1) + (_PLAIN[0],))
    up = read.get("up_block_types", (_PLAIN[1],) + (_ATTENTION[1],) * (levels - 1))
    for name, types, known in (("down_block_types", down, 0), ("up_block_types", up, 1)):
        if len(types) != levels or not set(types) <= {_PLAIN[known], _ATTENTION[known]}:
            raise read.error(name, f"{levels} of {_PLAIN[known]} and {_ATTENTION[known]}")
    there = [name == _ATTENTION[0] for name in down]
    if [name == _ATTENTION[1] for name in reversed(up)] != there:
        raise read.error("up_block_types", "attention at the levels where down_block_types has it")
    return there


def _per_level(read: _Reader, name: str, default: int, levels: int) -> tuple[int, ...]:
    value = read.get(name, default)
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(entry, int) for entry in values):
        raise read.error(name, f"a number, or {levels} of them")
    return values


def vae_config(config: Settings | str | Path) -> tuple[VAEConfig, float]:
    """A VAE's config.json as `VAEConfig`, and its scaling factor. Raises `WeightsError` for what cannot be had."""
    settings, source = read_settings(config, "vae config")
    read = _Reader(settings, source)
    widths = tuple(read.get("block_out_channels", (64,)))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(read.get(name, [kind] * len(widths))) != [kind] * len(widths):
            raise read.error(name, f"{len(widths)} of {kind}")
    vae = VAEConfig(
        latent_channels=read.get("latent_channels", 4),
        block_out_channels=widths,
        layers_per_block=read.get("layers_per_block", 1),
        norm_groups=read.get("norm_num_groups", 32),
    )
    scale = float(read.get("scaling_factor", 0.18215))
    read.finish(_VAE_FIXED, _VAE_FREE)
    return vae, scale


def schedule_settings(config: Settings | str | Path) -> dict[str, Any]:
    """A scheduler_config.json as settings of `DecoderConfig`.

    What belongs to other solvers is passed over: sampling here is by Euler steps. Raises `WeightsError` for a schedule
    or a variant of these steps that cannot be had.
    """
    settings, source = read_settings(config, "scheduler config")
    read = _Reader(settings, source)
    euler = str(settings.get("_class_name", "EulerDiscreteScheduler")).startswith("Euler")
    read.check(_SCHEDULE_FIXED, defaults={"beta_schedule": "linear"})
    spacing = read.get("timestep_spacing", "linspace" if euler else "leading")
    if spacing not in ("leading", "trailing", "linspace"):
        raise read.error("timestep_spacing", "leading, trailing or linspace")
    prediction = read.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise read.error("prediction_type", "epsilon, v_prediction or sample")
    return {
        "num_train_timesteps": int(read.get("num_train_timesteps", 1000)),
        "beta_start": float(read.get("beta_start", 0.0001)),
        "beta_end": float(read.get("beta_end", 0.02)),
        "prediction": prediction,
        "zero_terminal_snr": bool(read.get("rescale_betas_zero_snr", False)),
        "timestep_spacing": spacing,
        "steps_offset": int(read.get("steps_offset", 0)),
    }


def decoder_config(
    unet: Settings | str | Path,
    vae: Settings | str | Path | None = None,
    scheduler: Settings | str | Path | None = None,
    *,
    base: DecoderConfig | None = None,
) -> DecoderConfig:
    """The `decoder` settings that these files describe; what they say nothing of is taken from `base` (Emu2's)."""
    settings: dict[str, Any] = {"unet": unet_config(unet), "latent": "autoencoder_kl"}
    if vae is not None:
        settings["vae"], settings["latent_scale"] = vae_config(vae)
        settings["latent_factor"] = 2 ** (len(settings["vae"].block_out_channels) - 1)
    if scheduler is not None:
        settings |= schedule_settings(scheduler)
    return dataclasses.replace(base or DecoderConfig(), **settings)


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a U-Net. Raises `WeightsError` for what diffusers' cannot do."""
    if config.condition_radius is not None:
        raise WeightsError("decoder.unet.condition_radius: diffusers' U-Net has no local cross-attention; wanted None")
    if config.transformer_norm_epsilon != 1e-6:
        raise WeightsError(
            f"decoder.unet.transformer_norm_epsilon: got {config.transformer_norm_epsilon:g}, diffusers' has 1e-06"
        )
    depths = config.transformer_layers_per_block
    levels = [bool(depth) for depth in depths]
    middle = mid_layers(config)
    if middle == 0 or (levels[-1] and middle != depths[-1]):
        raise WeightsError(
            f"decoder.unet.mid_transformer_layers: got {middle}, diffusers' has the last level's number, at least 1"
        )
    added: dict[str, Any] = {}
    if config.micro_conditions:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.time_id_width,
            "projection_class_embeddings_input_dim": added_width(config),
        }
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": [_ATTENTION[0] if there else _PLAIN[0] for there in levels],
        "up_block_types": [_ATTENTION[1] if there else _PLAIN[1] for there in reversed(levels)],
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        # A level without attention has a number here too, which only the bottom reads: that of the last level.
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "attention_head_dim": list(config.num_attention_heads),
        "cross_attention_dim": config.cross_attention_width,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_epsilon,
        "use_linear_projection": True,
        **added,
    }


def vae_json(config: VAEConfig, scale: float) -> dict[str, Any]:
    """The config.json of a VAE. Raises `WeightsError` for what diffusers' cannot do."""
    if config.norm_epsilon != 1e-6:
        raise WeightsError(f"decoder.vae.norm_epsilon: got {config.norm_epsilon:g}, diffusers' has 1e-06")
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": scale,
    }


def scheduler_json(config: DecoderConfig) -> dict[str, Any]:
    """The scheduler_config.json of a decoder."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": config.prediction,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": config.steps_offset,
    }


class _Reader:
    """Settings that are read one by one; what is left over at the end is looked at."""

    def __init__(self, settings: Settings, source: str) -> None:
        self._settings, self._source = settings, source
        self._read: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._settings.get(name, default)
        return default if value is None else value

    def error(self, name: str, wanted: str) -> WeightsError:
        return WeightsError(f"{self._source}: {name}: got {self._settings.get(name)!r}, wanted {wanted}")

    def check(self, fixed: Settings, *, defaults: Settings | None = None) -> None:
        """Raise for a setting that has one value here and another in the file, or by diffusers' default."""
        for name, wanted in fixed.items():
            value = self._settings.get(name, (defaults or {}).get(name, wanted))
            values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            if any(entry != wanted and not (entry is None and wanted is False) for entry in values):
                raise WeightsError(f"{self._source}: {name}: got {value!r}; only {wanted!r} can be computed here")
            self._read.add(name)

    def finish(self, fixed: Settings, free: set[str], *, defaults: Settings | None = None) -> None:
        """The same, and raise for a setting that nobody knows, unless it is off."""
        self.check(fixed, defaults=defaults)
        for name, value in self._settings.items():
            unknown = not name.startswith("_") and name not in self._read | free
            if unknown and value not in (None, False):
                raise WeightsError(f"{self._source}: {name}: got {value!r}; this setting is not known here")
