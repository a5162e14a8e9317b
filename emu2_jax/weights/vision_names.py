"""Names of the visual encoder, in the files of the EVA-CLIP and CLIP families: one table per naming.

Axis letters: L layers, D residual width, H heads, K head width, F inner MLP width, P positions (CLS and patches), y x
pixel row and column inside a patch, c colours, or the three of q, k, v.

Which rows a table gives follows `model.vision`: a parameter that the model has not, the files need not have.
Source: release `emu/eva_vit.py`; `timm`'s and `open_clip`'s EVA and ViT; `transformers` CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from emu2_jax.config import VisionConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights.layout import Layout
from emu2_jax.weights.table import Row

Rows = tuple[tuple[str, str, str, str], ...]

# fmt: off
_TIMM_EMBEDDING = (
    # official name                       its axes       ours, below visual_encoder/               our axes
    ("cls_token",                         "1 1 D",       "class_embedding",                        "D"),
    ("pos_embed",                         "1 P D",       "position_embedding",                     "P D"),
    ("patch_embed.proj.weight",           "D c y x",     "patch_kernel",                           "(y x c) D"),
    ("patch_embed.proj.bias",             "D",           "patch_bias",                             "D"),
)
_TIMM_REST = (
    ("blocks.{L}.attn.proj.weight",       "D (H K)",     "blocks/layers/attention/out",            "L H K D"),
    ("blocks.{L}.attn.proj.bias",         "D",           "blocks/layers/attention/out_bias",       "L D"),
    ("blocks.{L}.norm1.weight",           "D",           "blocks/layers/attention_norm/scale",     "L D"),
    ("blocks.{L}.norm1.bias",             "D",           "blocks/layers/attention_norm/bias",      "L D"),
    ("blocks.{L}.mlp.fc1.weight",         "F D",         "blocks/layers/mlp/up",                   "L D F"),
    ("blocks.{L}.mlp.fc1.bias",           "F",           "blocks/layers/mlp/up_bias",              "L F"),
    ("blocks.{L}.mlp.fc2.weight",         "D F",         "blocks/layers/mlp/down",                 "L F D"),
    ("blocks.{L}.mlp.fc2.bias",           "D",           "blocks/layers/mlp/down_bias",            "L D"),
    ("blocks.{L}.norm2.weight",           "D",           "blocks/layers/mlp_norm/scale",           "L D"),
    ("blocks.{L}.norm2.bias",             "D",           "blocks/layers/mlp_norm/bias",            "L D"),
    ("norm.weight",                       "D",           "final_norm/scale",                       "D"),
    ("norm.bias",                         "D",           "final_norm/bias",                        "D"),
)

#: EVA's own code, and timm's. In a post-norm ViT norm1 follows the attention, norm2 the MLP. k has no bias.
EVA: Rows = (
    *_TIMM_EMBEDDING,
    ("blocks.{L}.attn.qkv.weight",        "(c H K) D",   "blocks/layers/attention/qkv",            "L D c H K"),
    ("blocks.{L}.attn.q_bias",            "(H K)",       "blocks/layers/attention/q_bias",         "L H K"),
    ("blocks.{L}.attn.v_bias",            "(H K)",       "blocks/layers/attention/v_bias",         "L H K"),
    *_TIMM_REST,
)

#: timm's other ViTs: one bias on q, k and v together.
VIT: Rows = (
    *_TIMM_EMBEDDING,
    ("norm_pre.weight",                   "D",           "input_norm/scale",                       "D"),
    ("norm_pre.bias",                     "D",           "input_norm/bias",                        "D"),
    ("blocks.{L}.attn.qkv.weight",        "(c H K) D",   "blocks/layers/attention/qkv",            "L D c H K"),
    ("blocks.{L}.attn.qkv.bias",          "(c=0 H K)",   "blocks/layers/attention/q_bias",         "L H K"),
    ("blocks.{L}.attn.qkv.bias",          "(c=1 H K)",   "blocks/layers/attention/k_bias",         "L H K"),
    ("blocks.{L}.attn.qkv.bias",          "(c=2 H K)",   "blocks/layers/attention/v_bias",         "L H K"),
    *_TIMM_REST,
)

#: CLIP in transformers: q, k and v are tensors of their own. `pre_layrnorm` is spelt so.
CLIP_HF: Rows = (
    # official name                                its axes     ours, below visual_encoder/           our axes
    ("embeddings.class_embedding",                 "D",         "class_embedding",                    "D"),
    ("embeddings.position_embedding.weight",       "P D",       "position_embedding",                 "P D"),
    ("embeddings.patch_embedding.weight",          "D c y x",   "patch_kernel",                       "(y x c) D"),
    ("pre_layrnorm.weight",                        "D",         "input_norm/scale",                   "D"),
    ("pre_layrnorm.bias",                          "D",         "input_norm/bias",                    "D"),
    ("encoder.layers.{L}.self_attn.q_proj.weight", "(H K) D",   "blocks/layers/attention/qkv",        "L D c=0 H K"),
    ("encoder.layers.{L}.self_attn.k_proj.weight", "(H K) D",   "blocks/layers/attention/qkv",        "L D c=1 H K"),
    ("encoder.layers.{L}.self_attn.v_proj.weight", "(H K) D",   "blocks/layers/attention/qkv",        "L D c=2 H K"),
    ("encoder.layers.{L}.self_attn.q_proj.bias",   "(H K)",     "blocks/layers/attention/q_bias",     "L H K"),
    ("encoder.layers.{L}.self_attn.k_proj.bias",   "(H K)",     "blocks/layers/attention/k_bias",     "L H K"),
    ("encoder.layers.{L}.self_attn.v_proj.bias",   "(H K)",     "blocks/layers/attention/v_bias",     "L H K"),
    ("encoder.layers.{L}.self_attn.out_proj.weight", "D (H K)", "blocks/layers/attention/out",        "L H K D"),
    ("encoder.layers.{L}.self_attn.out_proj.bias", "D",         "blocks/layers/attention/out_bias",   "L D"),
    ("encoder.layers.{L}.layer_norm1.weight",      "D",         "blocks/layers/attention_norm/scale", "L D"),
    ("encoder.layers.{L}.layer_norm1.bias",        "D",         "blocks/layers/attention_norm/bias",  "L D"),
    ("encoder.layers.{L}.mlp.fc1.weight",          "F D",       "blocks/layers/mlp/up",               "L D F"),
    ("encoder.layers.{L}.mlp.fc1.bias",            "F",         "blocks/layers/mlp/up_bias",          "L F"),
    ("encoder.layers.{L}.mlp.fc2.weight",          "D F",       "blocks/layers/mlp/down",             "L F D"),
    ("encoder.layers.{L}.mlp.fc2.bias",            "D",         "blocks/layers/mlp/down_bias",        "L D"),
    ("encoder.layers.{L}.layer_norm2.weight",      "D",         "blocks/layers/mlp_norm/scale",       "L D"),
    ("encoder.layers.{L}.layer_norm2.bias",        "D",         "blocks/layers/mlp_norm/bias",        "L D"),
    ("post_layernorm.weight",                      "D",         "final_norm/scale",                   "D"),
    ("post_layernorm.bias",                        "D",         "final_norm/bias",                    "D"),
)

#: CLIP in OpenAI's and open_clip's own code.
CLIP_OPEN_CLIP: Rows = (
    # official name                                 its axes     ours, below visual_encoder/           our axes
    ("class_embedding",                             "D",         "class_embedding",                    "D"),
    ("positional_embedding",                        "P D",       "position_embedding",                 "P D"),
    ("conv1.weight",                                "D c y x",   "patch_kernel",                       "(y x c) D"),
    ("ln_pre.weight",                               "D",         "input_norm/scale",                   "D"),
    ("ln_pre.bias",                                 "D",         "input_norm/bias",                    "D"),
    ("transformer.resblocks.{L}.attn.in_proj_weight", "(c H K) D", "blocks/layers/attention/qkv",      "L D c H K"),
    ("transformer.resblocks.{L}.attn.in_proj_bias", "(c=0 H K)", "blocks/layers/attention/q_bias",     "L H K"),
    ("transformer.resblocks.{L}.attn.in_proj_bias", "(c=1 H K)", "blocks/layers/attention/k_bias",     "L H K"),
    ("transformer.resblocks.{L}.attn.in_proj_bias", "(c=2 H K)", "blocks/layers/attention/v_bias",     "L H K"),
    ("transformer.resblocks.{L}.attn.out_proj.weight", "D (H K)", "blocks/layers/attention/out",       "L H K D"),
    ("transformer.resblocks.{L}.attn.out_proj.bias", "D",        "blocks/layers/attention/out_bias",   "L D"),
    ("transformer.resblocks.{L}.ln_1.weight",       "D",         "blocks/layers/attention_norm/scale", "L D"),
    ("transformer.resblocks.{L}.ln_1.bias",         "D",         "blocks/layers/attention_norm/bias",  "L D"),
    ("transformer.resblocks.{L}.mlp.c_fc.weight",   "F D",       "blocks/layers/mlp/up",               "L D F"),
    ("transformer.resblocks.{L}.mlp.c_fc.bias",     "F",         "blocks/layers/mlp/up_bias",          "L F"),
    ("transformer.resblocks.{L}.mlp.c_proj.weight", "D F",       "blocks/layers/mlp/down",             "L F D"),
    ("transformer.resblocks.{L}.mlp.c_proj.bias",   "D",         "blocks/layers/mlp/down_bias",        "L D"),
    ("transformer.resblocks.{L}.ln_2.weight",       "D",         "blocks/layers/mlp_norm/scale",       "L D"),
    ("transformer.resblocks.{L}.ln_2.bias",         "D",         "blocks/layers/mlp_norm/bias",        "L D"),
    ("ln_post.weight",                              "D",         "final_norm/scale",                   "D"),
    ("ln_post.bias",                                "D",         "final_norm/bias",                    "D"),
)
# fmt: on


@dataclass(frozen=True)
class Naming:
    """How files of a form name the visual encoder."""

    family: str  #: of encoders, as errors call it
    rows: Rows
    settings: Mapping[str, bool | str]  #: of model.vision, that the family leaves no choice in
    prefix: str = ""
    old_prefix: str | None = None  #: another one that files have had
    skipped: tuple[tuple[str, str], ...] = ()  #: names besides: pattern (full match) and why they are not needed

    @property
    def example(self) -> VisionConfig:
        """A model that has every name."""
        return VisionConfig(**{"input_norm": True, "final_norm": True, **self.settings})  # type: ignore[arg-type]


_EVA_SETTINGS = {"k_bias": False, "patch_bias": True, "input_norm": False}
_CLIP_SETTINGS: Mapping[str, bool | str] = {
    "block_norm": "pre",
    "k_bias": True,
    "patch_bias": False,
    "input_norm": True,
}
_POOLING = "EVA-CLIP's final norm and head: Emu2 reads the patches before them"
_TEXT = "EVA-CLIP's text tower: Emu2 has a language model instead"
_CLIP_POOLING = "final norm (model.vision.final_norm = True takes it) and head: the patches are read before them"
_CLIP_TEXT = "CLIP's text tower: this model has a language model instead"

#: The visual encoder inside Emu2.
EMU2 = Naming("EVA-CLIP", EVA, _EVA_SETTINGS, "visual.")

#: Forms that are a visual encoder.
NAMINGS: Mapping[str, Naming] = {
    "eva_timm": Naming("EVA-CLIP", EVA, _EVA_SETTINGS, skipped=((r"(norm|fc_norm|head)\.(weight|bias)", _POOLING),)),
    "eva_open_clip": Naming(
        "EVA-CLIP",
        EVA,
        _EVA_SETTINGS,
        "visual.trunk.",
        skipped=(
            (r"visual\.(trunk\.)?(norm|fc_norm|head)\..*", _POOLING),
            (r"text\..*|logit_scale|logit_bias", _TEXT),
        ),
    ),
    "eva_clip": Naming(
        "EVA-CLIP",
        EVA,
        _EVA_SETTINGS,
        "visual.",
        skipped=((r"visual\.(norm|fc_norm|head)\.(weight|bias)", _POOLING), (r"text\..*|logit_scale", _TEXT)),
    ),
    "vit_timm": Naming(
        "timm ViT", VIT, {"k_bias": True}, skipped=((r"(norm|fc_norm|head)\.(weight|bias)", _CLIP_POOLING),)
    ),
    "clip_hf": Naming(
        "CLIP",
        CLIP_HF,
        _CLIP_SETTINGS,
        "vision_model.",
        old_prefix="",
        skipped=(
            (r"(vision_model\.)?post_layernorm\.(weight|bias)|visual_projection\.weight", _CLIP_POOLING),
            (r"(vision_model\.)?embeddings\.position_ids", "the numbers of the positions, 0, 1, ..."),
            (r"text_model\..*|text_projection\.weight|logit_scale", _CLIP_TEXT),
        ),
    ),
    "clip_open_clip": Naming(
        "CLIP",
        CLIP_OPEN_CLIP,
        _CLIP_SETTINGS,
        "visual.",
        skipped=(
            (r"visual\.(ln_post\.(weight|bias)|proj)", _CLIP_POOLING),
            (
                r"(text\.)?(transformer|token_embedding|ln_final|attn_mask|text_projection|positional_embedding)(\..*)?"
                r"|text\.cls_emb|logit_scale|logit_bias",
                _CLIP_TEXT,
            ),
            (r"input_resolution|context_length|vocab_size", "a size of OpenAI's release, which the config has"),
        ),
    ),
}


def rows(naming: Naming, config: VisionConfig, prefix: str = "") -> Iterator[Row]:
    """The rows of an encoder of this size; `prefix` goes in front of the naming's own.

    Raises `WeightsError` for a config that no encoder with these names has.
    """
    for setting, wanted in naming.settings.items():
        got = getattr(config, setting)
        if got != wanted:
            raise WeightsError(f"model.vision.{setting}: is {got}, which no encoder of the {naming.family} family has")
    sizes = {
        "L": config.num_layers,
        "D": config.width,
        "H": config.num_heads,
        "K": config.width // config.num_heads,
        "F": config.mlp_width,
        "P": 1 + config.grid_size**2,
        "y": config.patch_size,
        "x": config.patch_size,
        "c": 3,  # colours; and q, k, v
    }
    absent = {name for name in ("patch_bias", "input_norm", "final_norm") if not getattr(config, name)}
    for name, stored, path, ours in naming.rows:
        if path.split("/")[0] not in absent:
            old = () if naming.old_prefix is None else (naming.old_prefix + name,)
            yield Row(prefix + naming.prefix + name, f"visual_encoder/{path}", Layout(stored, ours, sizes), old)
