"""The names of released weights, and which of our parameters each is: one table per family, one row per tensor.

A row reads: official name, its axes, our path, our axes (`layout.py`). `{L}` in a name is the number of a layer; ours
are stacked on a leading axis L. Forms put a prefix in front of a family's names, and add names that are known and not
needed. The visual encoders' tables are in `vision_names.py`, the image decoder's in `diffusers_names.py`.

Axis letters: L layers, D residual width, H heads, G key/value heads, K head width, F inner MLP width, V vocabulary,
E width of a visual embedding.

Rotary positions: files in Hugging Face form pair channel i of a head with channel i + K/2, as `layers.rotate` does, so
q and k are taken as they lie. (Meta's own LLaMA files pair 2i with 2i + 1 and would need their rows permuted; that form
is not read here.)

Source: release `emu/emu.py`, `emu/lm.py`; `transformers` LLaMA.
docs/weights.md lists where release, paper and code differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from emu2_jax.config import DecoderConfig, LanguageConfig, ModelConfig
from emu2_jax.weights import diffusers_names, vision_names
from emu2_jax.weights.layout import Layout
from emu2_jax.weights.table import Row, Table

#: Who wrote the files: Emu2 natively, Emu2 in Hugging Face form, LLaMA in Hugging Face form; EVA-CLIP under timm's,
#: open_clip's and its own names; other ViTs under timm's, CLIP under transformers' and open_clip's; diffusers' U-Net
#: and VAE.
Form = Literal[
    "emu2", "emu2_hf", "llama_hf", "eva_timm", "eva_open_clip", "eva_clip", "vit_timm", "clip_hf", "clip_open_clip",
    "unet", "vae",
]  # fmt: skip
FORMS: tuple[Form, ...] = get_args(Form)

# fmt: off
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

#: What a model has besides when its config says so: biases on q, k and v (Qwen2).
QKV_BIASES = (
    ("model.layers.{L}.self_attn.q_proj.bias",          "(H K)",    "blocks/layers/attention/q_bias",      "L H K"),
    ("model.layers.{L}.self_attn.k_proj.bias",          "(G K)",    "blocks/layers/attention/k_bias",      "L G K"),
    ("model.layers.{L}.self_attn.v_proj.bias",          "(G K)",    "blocks/layers/attention/v_bias",      "L G K"),
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

#: Names that a form may hold beside its tensors: pattern (full match) and why they are not needed.
SKIPPED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "emu2": (_INV_FREQ,),
    "emu2_hf": (_INV_FREQ,),
    "llama_hf": (_INV_FREQ,),
    **{form: naming.skipped for form, naming in vision_names.NAMINGS.items()},
}


def table(form: Form, model: ModelConfig, decoder: DecoderConfig | None = None) -> Table:
    """The table of `form` for a model of this size (`decoder`: for the U-Net's size; None = Emu2's)."""
    tied = (_TIED,) if form == "llama_hf" and model.language.tied_head else ()
    return Table(form, tuple(_rows(form, model, decoder or DecoderConfig())), (*SKIPPED.get(form, ()), *tied))


def official_shapes(form: Form, model: ModelConfig, decoder: DecoderConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Every official name of `form` with its shape, as a release of this size stores it, without what is skipped."""
    return {name: row.layout.stored_shape for row in table(form, model, decoder).rows for name in row.names}


def all_names(form: Form) -> Table:
    """A table of every name that `form` has, whatever the settings of a model: to tell forms apart, and parts."""
    naming = vision_names.NAMINGS.get(form)
    return table(form, ModelConfig() if naming is None else ModelConfig(vision=naming.example))


def _rows(form: Form, model: ModelConfig, decoder: DecoderConfig) -> Iterator[Row]:
    if form == "unet":
        yield from diffusers_names.unet_rows(decoder.unet)
    elif form == "vae":
        yield from diffusers_names.vae_rows(decoder.vae)
    elif form in ("emu2", "emu2_hf"):
        prefix = "model." if form == "emu2_hf" else ""
        yield from vision_names.rows(vision_names.EMU2, model.vision, prefix)
        yield from _llama(prefix + "decoder.lm.", model.language)
        # The one place where the two forms differ by more than a prefix: the Hugging Face class owns the projections,
        # the native one hangs them under the language model.
        yield from _connector("" if form == "emu2_hf" else "decoder.lm.", model)
    elif form == "llama_hf":
        yield from _llama("", model.language)
    else:
        yield from vision_names.rows(vision_names.NAMINGS[form], model.vision)


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
