"""What diffusers' U-Nets, VAE and sampler give, and what this package gives: cases, golden files, comparison.

Weights are not stored but drawn from their official names (`weights`), the same on both sides. The names in a file:
`inputs/...`, `forward/...`, and `gradients/all`, one vector of all tensors in the order of the case's table. File
format and comparison are those of `goldens`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import goldens
import jax
import jax.numpy as jnp
import numpy as np
from goldens import Arrays, Golden

from emu2_jax.config import DecoderConfig, UNetConfig, VAEConfig
from emu2_jax.diffusion.decoder import merge_unet
from emu2_jax.diffusion.vae import merge_vae
from emu2_jax.weights.diffusers_model import DiffusersModel
from emu2_jax.weights.diffusers_weights import load_unet, load_vae, unet_table, vae_table
from emu2_jax.weights.state_dict import to_state_dict
from emu2_jax.weights.table import Table

#: Between latents after the whole loop, element by element.
SAMPLE_ATOL = 2e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of one kind and a size."""

    name: str
    kind: Literal["unet", "vae", "sample"]
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    small: bool = True  #: whether what enters the norms is so small that their epsilons show
    gradients: bool = True  #: whether gradients are compared too
    size: tuple[int, int] = (8, 4)  #: of latents
    num_steps: int = 50

    @property
    def table(self) -> Table:
        return vae_table(self.vae) if self.kind == "vae" else unet_table(self.unet)

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(unet=self.unet, vae=self.vae)


SDXL = UNetConfig(
    block_out_channels=(4, 8),
    layers_per_block=1,
    transformer_layers_per_block=(0, 2),
    num_attention_heads=(1, 4),
    cross_attention_width=6,
    time_id_width=4,
    norm_groups=2,
)
SD2 = dataclasses.replace(
    SDXL,
    transformer_layers_per_block=(1, 0),
    mid_transformer_layers=1,
    num_attention_heads=(2, 4),
    micro_conditions=False,
)
VAE = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_groups=2)
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("unet_sdxl", "unet", unet=SDXL),
        Case("unet_sd2", "unet", unet=SD2),
        Case("vae", "vae", vae=VAE, size=(4, 2)),
        # Epsilons of a tenth and more, in norms of ordinary inputs: one at the wrong place changes every digit.
        Case(
            "unet_wide_epsilons",
            "unet",
            unet=dataclasses.replace(SDXL, norm_epsilon=0.1, transformer_norm_epsilon=0.5),
            small=False,
            gradients=False,
        ),
        Case(
            "vae_wide_epsilon",
            "vae",
            vae=dataclasses.replace(VAE, norm_epsilon=0.1),
            small=False,
            gradients=False,
            size=(4, 2),
        ),
        Case("sample_50", "sample", unet=SDXL, small=False, gradients=False),
    )
}

#: What writes into a residual stream, or into a norm without one.
_SMALL = (
    *("conv_in.", "conv1.", "conv2.", "conv_shortcut.", "time_emb_proj.", "samplers.0.conv."),
    *("proj_in.", "proj_out.", ".to_out.0.", ".ff.net.2."),
)
#: What keeps the scale of a residual stream: only its bias is made small.
_KEEPS_SCALE = ("conv_shortcut.", "samplers.0.conv.")


def weights(shapes: Mapping[str, tuple[int, ...]], *, small: bool) -> Arrays:
    """Numbers for every tensor of a state dict, from its name alone; biases and norms are away from 0 and 1."""
    drawn = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1.0
        scale = 0.2 if len(shape) == 1 else 1.0 / fan_in**0.5
        if small and any(part in name for part in _SMALL):
            keeps = any(part in name for part in _KEEPS_SCALE) and len(shape) > 1
            scale *= 1.0 if keeps else 1e-2
        noise = np.random.RandomState(zlib.crc32(name.encode())).normal(0.0, scale, shape)
        drawn[name] = (noise + ("norm" in name and name.endswith("weight"))).astype(np.float32)
    return drawn


def official_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    return {name: row.layout.stored_shape for row in table.rows for name in row.names}


def params(case: Case) -> Any:
    """The case's weights in this package's tree."""
    state_dict = weights(official_shapes(case.table), small=case.small)
    return load_vae(state_dict, case.vae) if case.kind == "vae" else load_unet(state_dict, case.unet)


def inputs(case: Case) -> Arrays:
    """Everything that goes in, channels first as diffusers has it."""
    random = np.random.RandomState(0)
    height, width = case.size
    if case.kind == "vae":
        factor = 2 ** (len(case.vae.block_out_channels) - 1)
        latent = (2, case.vae.latent_channels, height, width)
        image = (2, 3, height * factor, width * factor)
        named = {"noise": latent, "latents": latent, "moments_cotangent": latent, "image_cotangent": image}
        arrays = {name: random.normal(size=shape) for name, shape in named.items()}
        arrays["images"] = random.uniform(-1, 1, image)
        return {name: array.astype(np.float32) for name, array in arrays.items()}
    latent = (2, case.unet.in_channels, height, width)
    condition = (2, 5, case.unet.cross_attention_width)
    named = {"latents": latent, "condition": condition, "null": condition, "cotangent": latent}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in named.items()}
    if case.kind == "unet":
        del arrays["null"]
        arrays["timesteps"] = np.array([3, 801], np.int32)
    else:
        del arrays["cotangent"]
    if case.unet.micro_conditions:
        arrays["time_ids"] = np.array([[64, 48, 0, 8, 32, 32], [512, 768, 3, 0, 64, 64]], np.int32)
        if case.unet.pooled_width is not None:
            arrays["pooled"] = random.normal(size=(2, case.unet.pooled_width)).astype(np.float32)
    return arrays


def run(case: Case, params: Any, batch: Arrays) -> tuple[Arrays, Any]:
    """Outputs of the package, and gradients of the case's loss under diffusers' names."""
    if not case.gradients:
        return forward(case, params, batch), {}
    compute = jax.jit(jax.grad(lambda params, batch: _forward(case, params, batch), has_aux=True))
    gradients, outputs = compute(params, jax.tree.map(jnp.asarray, batch))
    return _numpy(outputs), to_state_dict({case.kind: gradients}, case.table)


def forward(case: Case, params: Any, batch: Arrays) -> Arrays:
    """Outputs of the package."""
    if case.kind == "sample":
        model = DiffusersModel(case.decoder, {"unet": params})
        arguments = (batch["latents"], batch["condition"], batch["null"])
        return _numpy({"sample": model.sample(*arguments, time_ids=batch["time_ids"], num_steps=case.num_steps)})
    compute = jax.jit(lambda params, batch: _forward(case, params, batch)[1])
    return _numpy(compute(params, jax.tree.map(jnp.asarray, batch)))


def _forward(case: Case, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that is differentiated, and everything that is compared."""
    if case.kind == "vae":
        vae = merge_vae(case.vae, params)
        posterior = vae.encode(_last(batch["images"]))
        drawn = _first(posterior.sample_with(_last(batch["noise"])))
        image = _first(vae.decode(_last(batch["latents"])))
        loss = (drawn * batch["moments_cotangent"]).sum() + (image * batch["image_cotangent"]).sum()
        moments = {"mean": _first(posterior.mean), "log_variance": _first(posterior.log_variance)}
        return loss, {**moments, "drawn": drawn, "image": image}
    predicted = _first(
        merge_unet(case.decoder, params, "float32")(
            _last(batch["latents"]),
            batch["timesteps"],
            batch["condition"],
            batch.get("time_ids"),
            batch.get("pooled"),
        )
    )
    return (predicted * batch["cotangent"]).sum(), {"predicted": predicted}


def failures(case: Case, golden: Golden) -> list[str]:
    """Where the package differs from diffusers; empty when it agrees."""
    if not case.gradients:
        return forward_failures(case, golden)
    outputs, found = run(case, params(case), golden.inputs)
    relative = goldens.gradient_differences(golden.gradients, found)
    wrong = [f"gradient of {name}: {value:.3g}" for name, value in relative.items() if value > _limit(name)]
    return goldens.forward_failures(golden, outputs) + wrong


def _limit(name: str) -> float:
    """Of a gradient's difference. A bias on keys moves all scores alike: its gradient is 0, what is there is rounding.

    The difference is then relative to `goldens.GRADIENT_FLOOR` of all gradients, so that 1e-2 is 1e-7 of them.
    """
    return 1e-2 if name.endswith("to_k.bias") else goldens.GRADIENT_RTOL


def forward_failures(case: Case, golden: Golden) -> list[str]:
    """The same for the outputs alone."""
    outputs = forward(case, params(case), golden.inputs)
    if case.kind == "sample":
        worst = float(np.nan_to_num(np.abs(outputs["sample"] - golden.forward["sample"]).max(), nan=np.inf))
        return [f"sample: {worst:.3g}"] if worst > SAMPLE_ATOL else []
    return goldens.forward_failures(golden, outputs)


def save(case: Case, golden: Golden) -> None:
    """Write the case's file. Hundreds of small tensors would be more header than number, so gradients go as one."""
    vectors = [golden.gradients[name].ravel() for name in official_shapes(case.table)] if case.gradients else []
    packed = {"all": np.concatenate(vectors)} if vectors else {}
    goldens.save(case, dataclasses.replace(golden, gradients=packed))  # type: ignore[arg-type]


def load(case: Case) -> Golden:
    """Read the case's file."""
    golden = goldens.load(case)  # type: ignore[arg-type]
    if not case.gradients:
        return golden
    shapes = official_shapes(case.table)
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    parts = np.split(golden.gradients["all"], ends[:-1])
    gradients = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return dataclasses.replace(golden, gradients=gradients)


def _numpy(outputs: Mapping[str, jax.Array]) -> Arrays:
    return {name: np.asarray(value) for name, value in outputs.items()}


def _last(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 3, 1)


def _first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)
