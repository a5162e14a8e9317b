"""PyTorch weights, by their official names, in this package's parameter tree. Gradients go the same way.

Emu2, LLaMA, Qwen2 and EVA-CLIP by the package's own tables (`emu2_jax.weights`), which these tests so put to the proof;
CLIP's ViTs, of which the package has no table, by hand.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from goldens import Arrays, Case

from emu2_jax.config import VisionConfig
from emu2_jax.weights.names import table
from emu2_jax.weights.state_dict import to_params


def to_tree(tensors: Arrays, case: Case) -> Any:
    """Arrays by official name as the parameter tree of the case. Raises when a name or a place is left over."""
    if case.kind == "emu2":
        return to_params(tensors, table("emu2", case.model))
    if case.kind == "language":
        return to_params(tensors, table("llama_hf", case.model).only(["language_model"]))["language_model"]
    if not case.vision.k_bias:
        return to_params(tensors, table("eva_timm", case.model).only(["visual_encoder"]))["visual_encoder"]
    return clip_tree(tensors, case.vision)


#: transformers' names of CLIP's ViT -> timm's (and open_clip's, but for prefixes).
TIMM_NAMES = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding", "patch_embed.proj"),
    (r"^pre_layrnorm", "norm_pre"),
    (r"^encoder\.layers\.", "blocks."),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"self_attn\.([qkv])_proj", r"attn.\1"),
    (r"layer_norm([12])", r"norm\1"),
)


def clip_tree(tensors: Arrays, config: VisionConfig) -> Any:
    """CLIP's ViT: q, k and v are three matrices in transformers and one in timm, where their biases are one vector."""
    named = dict(tensors)
    for pattern, replacement in TIMM_NAMES:
        named = {re.sub(pattern, replacement, name): value for name, value in named.items()}
    width, heads, layers = config.width, config.num_heads, config.num_layers

    def stacked(name: str) -> np.ndarray:
        return np.stack([named.pop(f"blocks.{layer}.{name}") for layer in range(layers)])

    def norm(weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        return {"scale": weight, "bias": bias}

    if "blocks.0.attn.q.weight" in named:
        qkv = np.concatenate([stacked(f"attn.{x}.weight") for x in "qkv"], axis=1)
        biases = np.concatenate([stacked(f"attn.{x}.bias") for x in "qkv"], axis=1)
    else:
        qkv, biases = stacked("attn.qkv.weight"), stacked("attn.qkv.bias")
    q_bias, k_bias, v_bias = biases.reshape(layers, 3, heads, -1).swapaxes(0, 1)
    attention = {
        "qkv": qkv.swapaxes(1, 2).reshape(layers, width, 3, heads, -1),
        "q_bias": q_bias,
        "k_bias": k_bias,
        "v_bias": v_bias,
        "out": stacked("attn.proj.weight").swapaxes(1, 2).reshape(layers, heads, -1, width),
        "out_bias": stacked("attn.proj.bias"),
    }
    mlp = {
        "up": stacked("mlp.fc1.weight").swapaxes(1, 2),
        "up_bias": stacked("mlp.fc1.bias"),
        "down": stacked("mlp.fc2.weight").swapaxes(1, 2),
        "down_bias": stacked("mlp.fc2.bias"),
    }
    blocks = {
        "attention_norm": norm(stacked("norm1.weight"), stacked("norm1.bias")),
        "attention": attention,
        "mlp_norm": norm(stacked("norm2.weight"), stacked("norm2.bias")),
        "mlp": mlp,
    }
    tree = {
        "class_embedding": named.pop("cls_token").reshape(width),
        "position_embedding": named.pop("pos_embed").reshape(-1, width),
        "patch_kernel": named.pop("patch_embed.proj.weight").transpose(2, 3, 1, 0).reshape(-1, width),
        "input_norm": norm(named.pop("norm_pre.weight"), named.pop("norm_pre.bias")),
        "blocks": {"layers": blocks},
    }
    if config.final_norm:
        tree["final_norm"] = norm(named.pop("norm.weight"), named.pop("norm.bias"))
    assert not named, sorted(named)
    return tree
