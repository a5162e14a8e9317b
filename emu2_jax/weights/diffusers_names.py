"""Names of diffusers' U-Net (SDXL, Stable Diffusion 2) and VAE.

Our networks have the same module names, so the rows follow their configs.

Source: diffusers 0.24 `UNet2DConditionModel` and `AutoencoderKL` as configured by the release's `unet/config.json` and
`vae/config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emu2_jax.config import UNetConfig, VAEConfig
from emu2_jax.diffusion.unet import MLP_RATIO, TIME_WIDTH_RATIO, added_width, down_widths, mid_layers, up_widths
from emu2_jax.weights.layout import Layout
from emu2_jax.weights.table import Row

#: Names of the VAE's attention before diffusers 0.18, by their present ones.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet_rows(config: UNetConfig) -> Iterator[Row]:
    """All tensors of a U-Net of this size. Our paths start with `unet/`."""
    channels = config.block_out_channels
    last = len(channels) - 1
    time_width = TIME_WIDTH_RATIO * channels[0]
    embeddings = [("time_embedding", channels[0])]
    if config.micro_conditions:
        embeddings.append(("add_embedding", added_width(config)))
    for name, width in embeddings:
        yield from _linear(f"{name}.linear_1", f"unet/{name}/linear_1", width, time_width)
        yield from _linear(f"{name}.linear_2", f"unet/{name}/linear_2", time_width, time_width)
    yield from _conv("conv_in", "unet/conv_in", config.in_channels, channels[0])
    layers = config.transformer_layers_per_block
    for i, widths in enumerate(down_widths(config)):
        yield from _block(f"down_blocks.{i}", config, i, widths, len(widths), layers[i])
        if i < last:
            yield from _conv(f"down_blocks.{i}.downsamplers.0.conv", f"unet/downsamplers/{i}/conv", channels[i])
    yield from _block("mid_block", config, last, [(channels[last], channels[last])] * 2, 1, mid_layers(config))
    for i, widths in enumerate(up_widths(config)):
        yield from _block(f"up_blocks.{i}", config, last - i, widths, len(widths), layers[last - i])
        if i < last:
            yield from _conv(f"up_blocks.{i}.upsamplers.0.conv", f"unet/upsamplers/{i}/conv", channels[last - i])
    yield from _norm("conv_norm_out", "unet/conv_norm_out", channels[0])
    yield from _conv("conv_out", "unet/conv_out", channels[0], config.out_channels)


def _block(
    name: str,
    config: UNetConfig,
    level: int,
    widths: Sequence[tuple[int, int]],
    num_transformers: int,
    num_layers: int,
) -> Iterator[Row]:
    path = "unet/" + name.replace(".", "/")
    time_width = TIME_WIDTH_RATIO * config.block_out_channels[0]
    for i, (inputs, outputs) in enumerate(widths):
        yield from _resnet(f"{name}.resnets.{i}", f"{path}/resnets/{i}", inputs, outputs, time_width)
    if num_layers:
        for i in range(num_transformers):
            yield from _transformer(f"{name}.attentions.{i}", f"{path}/attentions/{i}", config, level, num_layers)


def _resnet(name: str, path: str, inputs: int, outputs: int, time_width: int | None) -> Iterator[Row]:
    yield from _norm(f"{name}.norm1", f"{path}/norm1", inputs)
    yield from _conv(f"{name}.conv1", f"{path}/conv1", inputs, outputs)
    if time_width is not None:
        yield from _linear(f"{name}.time_emb_proj", f"{path}/time_emb_proj", time_width, outputs)
    yield from _norm(f"{name}.norm2", f"{path}/norm2", outputs)
    yield from _conv(f"{name}.conv2", f"{path}/conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", f"{path}/conv_shortcut", inputs, outputs, side=1)


def _transformer(name: str, path: str, config: UNetConfig, level: int, layers: int) -> Iterator[Row]:
    width, condition = config.block_out_channels[level], config.cross_attention_width
    yield from _norm(f"{name}.norm", f"{path}/norm", width)
    yield from _linear(f"{name}.proj_in", f"{path}/proj_in", width, width)
    block, ours = f"{name}.transformer_blocks.{{L}}", f"{path}/transformer_blocks/layers"
    for i, context in ((1, width), (2, condition)):
        yield from _norm(f"{block}.norm{i}", f"{ours}/norm{i}", width, layers)
        for product, inputs in (("to_q", width), ("to_k", context), ("to_v", context)):
            yield _weight(f"{block}.attn{i}.{product}", f"{ours}/attn{i}/{product}", inputs, width, layers)
        yield from _linear(f"{block}.attn{i}.to_out.0", f"{ours}/attn{i}/to_out", width, width, layers)
    yield from _norm(f"{block}.norm3", f"{ours}/norm3", width, layers)
    inner = MLP_RATIO * width
    yield from _linear(f"{block}.ff.net.0.proj", f"{ours}/ff/proj", width, 2 * inner, layers)
    yield from _linear(f"{block}.ff.net.2", f"{ours}/ff/out", inner, width, layers)
    yield from _linear(f"{name}.proj_out", f"{path}/proj_out", width, width)


def vae_rows(config: VAEConfig) -> Iterator[Row]:
    """All tensors of a VAE of this size. Our paths start with `vae/` and follow the official names."""
    channels, layers_per_block = config.block_out_channels, config.layers_per_block
    latent_channels = config.latent_channels
    last, top = len(channels) - 1, channels[-1]
    yield from _conv("encoder.conv_in", "vae/encoder/conv_in", 3, channels[0])
    before = channels[0]
    for i, width in enumerate(channels):
        for k in range(layers_per_block):
            yield from _vae_resnet(f"encoder.down_blocks.{i}.resnets.{k}", before, width)
            before = width
        if i < last:
            yield from _vae_conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width)
    yield from _vae_middle("encoder", top)
    yield from _norm("encoder.conv_norm_out", "vae/encoder/conv_norm_out", top)
    yield from _vae_conv("encoder.conv_out", top, 2 * latent_channels)  # mean and log-variance
    yield from _vae_conv("quant_conv", 2 * latent_channels, 2 * latent_channels, side=1)
    yield from _vae_conv("post_quant_conv", latent_channels, latent_channels, side=1)
    yield from _vae_conv("decoder.conv_in", latent_channels, top)
    yield from _vae_middle("decoder", top)
    for i, width in enumerate(reversed(channels)):
        for k in range(layers_per_block + 1):
            yield from _vae_resnet(f"decoder.up_blocks.{i}.resnets.{k}", before, width)
            before = width
        if i < last:
            yield from _vae_conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width)
    yield from _norm("decoder.conv_norm_out", "vae/decoder/conv_norm_out", channels[0])
    yield from _vae_conv("decoder.conv_out", channels[0], 3)


def _vae_middle(half: str, width: int) -> Iterator[Row]:
    yield from _vae_resnet(f"{half}.mid_block.resnets.0", width, width)
    name, path = f"{half}.mid_block.attentions.0", f"vae/{half}/mid_block/attentions/0"
    yield from _norm(f"{name}.group_norm", f"{path}/group_norm", width)
    for product, old in _OLD_ATTENTION.items():
        ours = f"{path}/{product.removesuffix('.0')}"
        yield from _linear(f"{name}.{product}", ours, width, width, old_name=f"{name}.{old}")
    yield from _vae_resnet(f"{half}.mid_block.resnets.1", width, width)


def _vae_resnet(name: str, inputs: int, outputs: int) -> Iterator[Row]:
    return _resnet(name, "vae/" + name.replace(".", "/"), inputs, outputs, time_width=None)


def _vae_conv(name: str, inputs: int, outputs: int, side: int = 3) -> Iterator[Row]:
    return _conv(name, "vae/" + name.replace(".", "/"), inputs, outputs, side)


# Axis letters of the rows below: I inputs, O outputs, y x kernel row and column, L layers of a transformer.


def _weight(name: str, path: str, inputs: int, outputs: int, layers: int | None = None, old_name: str = "") -> Row:
    old = (f"{old_name}.weight",) if old_name else ()
    return _row(f"{name}.weight", "O I", f"{path}/kernel", "I O", {"I": inputs, "O": outputs}, layers, old)


def _linear(
    name: str, path: str, inputs: int, outputs: int, layers: int | None = None, old_name: str = ""
) -> Iterator[Row]:
    yield _weight(name, path, inputs, outputs, layers, old_name)
    old = (f"{old_name}.bias",) if old_name else ()
    yield _row(f"{name}.bias", "O", f"{path}/bias", "O", {"O": outputs}, layers, old)


def _norm(name: str, path: str, width: int, layers: int | None = None) -> Iterator[Row]:
    yield _row(f"{name}.weight", "O", f"{path}/scale", "O", {"O": width}, layers)
    yield _row(f"{name}.bias", "O", f"{path}/bias", "O", {"O": width}, layers)


def _conv(name: str, path: str, inputs: int, outputs: int | None = None, side: int = 3) -> Iterator[Row]:
    sizes = {"I": inputs, "O": inputs if outputs is None else outputs, "y": side, "x": side}
    yield _row(f"{name}.weight", "O I y x", f"{path}/kernel", "y x I O", sizes, None)
    yield _row(f"{name}.bias", "O", f"{path}/bias", "O", sizes, None)


def _row(
    name: str,
    stored: str,
    path: str,
    ours: str,
    sizes: dict[str, int],
    layers: int | None,
    aliases: tuple[str, ...] = (),
) -> Row:
    if layers is None:
        return Row(name, path, Layout(stored, ours, sizes), aliases)
    return Row(name, path, Layout(stored, f"L {ours}", {**sizes, "L": layers}), aliases)
