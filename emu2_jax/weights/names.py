"""The names of released weights, and which of our parameters each is: one table per family, one row per tensor.

A row reads: official name, its axes, our path, our axes (`layout.py`). `{L}` in a name is the number of a layer; ours
are stacked on a leading axis L. Forms put a prefix in front of a family's names, and add names that are known and not
needed.

Axis letters: L layers, D residual width, H heads, G key/value heads, K head width, F inner MLP width, V vocabulary,
P positions (CLS and patches), E width of a visual embedding, y x pixel row and column inside a patch, c colours, or
the three of q, k, v.

Rotary positions: files in Hugging Face form pair channel i of a head with channel i + K/2, as `layers.rotate` does, so
q and k are taken as they lie. (Meta's own LLaMA files pair 2i with 2i + 1 and would need their rows permuted; that form
is not read here.)

Source: release `emu/emu.py`, `emu/eva_vit.py`, `emu/lm.py`; `transformers` LLaMA; `timm` and `open_clip` EVA.
docs/weights.md lists where release, paper and code differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from emu2_jax.config import DecoderConfig, LanguageConfig, ModelConfig, VisionConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights import diffusers_names
from emu2_jax.weights.layout import Layout
from emu2_jax.weights.table import Row, Table

#: Who wrote the files: Emu2 natively, Emu2 in Hugging Face form, LLaMA in Hugging Face form, EVA-CLIP under timm's,
#: open_clip's and its own names, and diffusers' U-Net and VAE.
Form = Literal["emu2", "emu2_hf", "llama_hf", "eva_timm", "eva_open_clip", "eva_clip", "unet", "vae"]
FORMS: tuple[Form, ...] = get_args(Form)

# fmt: off
#: EVA's own code, and timm's. A post-norm ViT: norm1 follows the attention, norm2 the MLP. k has no bias.
EVA = (
    # official name                       its axes       ours, below visual_encoder/               our axes
    ("cls_token",                         "1 1 D",       "class_embedding",                        "D"),
    ("pos_embed",                         "1 P D",       "position_embedding",                     "P D"),
    ("patch_embed.proj.weight",           "D c y x",     "patch_kernel",                           "(y x c) D"),
    ("patch_embed.proj.bias",             "D",           "patch_bias",                             "D"),
    ("blocks.{L}.attn.qkv.weight",        "(c H K) D",   "blocks/layers/attention/qkv",            "L D c H K"),
    ("blocks.{L}.attn.q_bias",            "(H K)",       "blocks/layers/attention/q_bias",         "L H K"),
    ("blocks.{L}.attn.v_bias",            "(H K)",       "blocks/layers/attention/v_bias",         "L H K"),
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
)

#: LLaMA in Hugging Face form.
LLAMA = (
    # official name                                     its axes    ours, below language_model/            our axes
    ("model.embed_tokens.weight",                       "V D",      "token_embedding",                     "V D"),
    ("model.layers.{L}.input_layernorm.weight",         "D",        "blocks/layers/attention_norm/scale",  "L D"),
    ("model.layers.{L}.self_attn.q_proj.weight",        "(H K) D",  "blocks/layers/attention/q",           "L D H K"),
    ("model.layers.{L}.self_attn.k_proj.weight",        "(G K) D",  "blocks/layers/attention/k",           "L D G K"),
    ("model.layers.{L}.self_attn.v_proj.weight",        "(G K) D",  "blocks/layers/attention/v",           "L D G K"),
    ("model.layers.{L}.self_attn.o_proj.weight",        "D (H K)",  "blocks/layers/attention/out",         "L H K D"),
    ("model.layers.{L}.post_attention_layernorm.weight", "D",       "blocks/layers/mlp_norm/scale",        "L D"),
    ("model.layers.{L}.mlp.gate_proj.weight",           "F D",      "blocks/layers/mlp/gate",              "L D F"),
    ("model.layers.{L}.mlp.up_proj.weight",             "F D",      "blocks/layers/mlp/up",                "L D F"),
    ("model.layers.{L}.mlp.down_proj.weight",           "D F",      "blocks/layers/mlp/down",              "L F D"),
    ("model.norm.weight",                               "D",        "final_norm/scale",                    "D"),
    ("lm_head.weight",                                  "V D",      "head",                                "D V"),
)

#: What a model has besides when its config says so: biases on q, k and v (Qwen2), the final norm that Emu2 drops.
QKV_BIASES = (
    ("model.layers.{L}.self_attn.q_proj.bias",          "(H K)",    "blocks/layers/attention/q_bias",      "L H K"),
    ("model.layers.{L}.self_attn.k_proj.bias",          "(G K)",    "blocks/layers/attention/k_bias",      "L G K"),
    ("model.layers.{L}.self_attn.v_proj.bias",          "(G K)",    "blocks/layers/attention/v_bias",      "L G K"),
)
FINAL_NORM = (
    ("norm.weight",                       "D",           "final_norm/scale",                       "D"),
    ("norm.bias",                         "D",           "final_norm/bias",                        "D"),
)

#: The connector, without biases.
CONNECTOR = (
    ("project_up.weight",   "D E", "project_up/kernel",   "E D"),
    ("project_down.weight", "E D", "project_down/kernel", "D E"),
)

#: Other names under which a release has stored a tensor, as endings after the form's prefix. Source: `load_state_dict`
#: of the release's `emu/emu.py` (names of its training code), and the two places where releases put the projections.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "project_up.weight":
        ("project_up.weight", "decoder.lm.project_up.weight", "vl_adapter.projection.weight"),
    "project_down.weight":
        ("project_down.weight", "decoder.lm.project_down.weight", "decoder.lm.stu_regress_head.weight"),
}
# fmt: on

_INV_FREQ = (r".*rotary_emb\.inv_freq", "the rotary frequencies, which follow from the config")
_TIED = ("lm_head.weight", "the output head, which model.language.tied_head ties to the token embedding")
_POOLING = "EVA-CLIP's final norm and head: Emu2 reads the patches before them"
_TEXT = "EVA-CLIP's text tower: Emu2 has a language model instead"

#: Names that a form may hold beside its tensors: pattern (full match) and why they are not needed.
SKIPPED: Mapping[Form, tuple[tuple[str, str], ...]] = {
    "emu2": (_INV_FREQ,),
    "emu2_hf": (_INV_FREQ,),
    "llama_hf": (_INV_FREQ,),
    "eva_timm": ((r"(norm|fc_norm|head)\.(weight|bias)", _POOLING),),
    "eva_open_clip": (
        (r"visual\.(trunk\.)?(norm|fc_norm|head)\..*", _POOLING),
        (r"text\..*|logit_scale|logit_bias", _TEXT),
    ),
    "eva_clip": (
        (r"visual\.(norm|fc_norm|head)\.(weight|bias)", _POOLING),
        (r"text\..*|logit_scale", _TEXT),
    ),
    "unet": (),
    "vae": (),
}


def table(form: Form, model: ModelConfig, decoder: DecoderConfig | None = None) -> Table:
    """The table of `form` for a model of this size (`decoder`: for the U-Net's size; None = Emu2's)."""
    tied = (_TIED,) if form == "llama_hf" and model.language.tied_head else ()
    return Table(form, tuple(_rows(form, model, decoder or DecoderConfig())), (*SKIPPED[form], *tied))


def official_shapes(form: Form, model: ModelConfig, decoder: DecoderConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Every official name of `form` with its shape, as a release of this size stores it, without what is skipped."""
    return {name: row.layout.stored_shape for row in table(form, model, decoder).rows for name in row.names}


def _rows(form: Form, model: ModelConfig, decoder: DecoderConfig) -> Iterator[Row]:
    if form == "unet":
        yield from diffusers_names.unet_rows(decoder.unet)
    elif form == "vae":
        yield from diffusers_names.vae_rows()
    elif form in ("emu2", "emu2_hf"):
        prefix = "model." if form == "emu2_hf" else ""
        yield from _eva(prefix + "visual.", model.vision)
        yield from _llama(prefix + "decoder.lm.", model.language)
        # The one place where the two forms differ by more than a prefix: the Hugging Face class owns the projections,
        # the native one hangs them under the language model.
        yield from _connector("" if form == "emu2_hf" else "decoder.lm.", model)
    elif form == "llama_hf":
        yield from _llama("", model.language)
    else:
        prefixes = {"eva_timm": "", "eva_open_clip": "visual.trunk.", "eva_clip": "visual."}
        yield from _eva(prefixes[form], model.vision)


def _eva(prefix: str, config: VisionConfig) -> Iterator[Row]:
    sizes = {
        "L": config.num_layers,
        "D": config.width,
        "H": config.num_heads,
        "K": config.width // config.num_heads,
        "F": config.mlp_width,
        "P": 1 + config.grid_size**2,
        "y": config.patch_size,
        "x": config.patch_size,
        "c": 3,
    }
    for setting, wanted in (("k_bias", False), ("patch_bias", True), ("input_norm", False)):
        if getattr(config, setting) != wanted:
            raise WeightsError(f"model.vision.{setting}: is {not wanted}, which no encoder of the EVA-CLIP family has")
    for name, stored, path, ours in (*EVA, *(FINAL_NORM if config.final_norm else ())):
        yield Row(prefix + name, f"visual_encoder/{path}", Layout(stored, ours, sizes))


def _llama(prefix: str, config: LanguageConfig) -> Iterator[Row]:
    sizes = {
        "L": config.num_layers,
        "D": config.width,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "K": config.head_width,
        "F": config.mlp_width,
        "V": config.vocab_size,
    }
    for name, stored, path, ours in (*LLAMA, *(QKV_BIASES if config.qkv_bias else ())):
        if path == "head" and config.tied_head:
            continue
        yield Row(prefix + name, f"language_model/{path}", Layout(stored, ours, sizes))


def _connector(prefix: str, model: ModelConfig) -> Iterator[Row]:
    sizes = {"D": model.language.width, "E": model.vision.width}
    for name, stored, path, ours in CONNECTOR:
        official = prefix + name
        known = {before + ending for before in ("", "model.") for ending in ALIASES[name]}
        yield Row(official, path, Layout(stored, ours, sizes), tuple(sorted(known - {official})))
