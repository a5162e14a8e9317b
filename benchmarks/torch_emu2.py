"""Emu2 in PyTorch, to be timed beside ours: transformers' LLaMA and a plain ViT, under the release's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from emu2_jax.config import LanguageConfig, ModelConfig, VisionConfig


class Attention(nn.Module):
    """One product for q, k and v; k has no bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.register_buffer("k_bias", torch.zeros(config.width), persistent=False)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Any) -> Any:
        """Every position sees every other."""
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = functional.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two products with exact GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Any) -> Any:
        """Position by position."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.norm1 = nn.LayerNorm(config.width, config.layer_norm_epsilon)
        self.norm2 = nn.LayerNorm(config.width, config.layer_norm_epsilon)

    def forward(self, x: Any) -> Any:
        """One layer, with the norms after the sublayers."""
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class ViT(nn.Module):
    """Normalised images to `num_visual_tokens` embeddings each, averaged over the patch grid."""

    def __init__(self, config: VisionConfig, num_visual_tokens: int) -> None:
        super().__init__()
        self.grid_size = config.grid_size
        self.window = config.grid_size // round(num_visual_tokens**0.5)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, pixels: Any) -> Any:
        """Of images, channels first."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        return functional.avg_pool2d(grid, self.window).flatten(2).transpose(1, 2)


class Emu2(nn.Module):
    """Text and regression loss of packed rows that hold one document each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, visual_width = config.language.width, config.vision.width
        self.visual = ViT(config.vision, config.num_visual_tokens)
        self.decoder = nn.Module()
        self.decoder.lm = transformers.LlamaForCausalLM(_llama_config(config.language))
        self.decoder.lm.project_up = nn.Linear(visual_width, width, bias=False)
        self.decoder.lm.project_down = nn.Linear(width, visual_width, bias=False)

    def forward(self, tokens: Any, images: Any, indices: Mapping[str, Any]) -> tuple[Any, Any]:
        """`indices` are positions of all rows in one line, and CLIP's `mean` and `std` of colours."""
        lm = self.decoder.lm
        pixels = ((images.float() / 255 - indices["mean"]) / indices["std"]).permute(0, 3, 1, 2)
        embeddings = self.visual(pixels).flatten(0, 1)
        x = lm.model.embed_tokens(tokens).flatten(0, 1)
        x = x.index_copy(0, indices["visual"], lm.project_up(embeddings)).unflatten(0, tokens.shape)
        hidden = lm.model(inputs_embeds=x).last_hidden_state.flatten(0, 1)
        logits = lm.lm_head(hidden[indices["before_text"]])
        text = functional.cross_entropy(logits, tokens.flatten()[indices["text"]])
        predicted = lm.project_down(hidden[indices["before_visual"]])
        return text, functional.mse_loss(predicted, embeddings.detach())


def _llama_config(config: LanguageConfig) -> Any:
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
