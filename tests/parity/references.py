"""Small PyTorch models that others wrote, and what they give: the other side of every comparison.

LLaMA, Qwen2 and CLIP come from `transformers`, the EVA-CLIP family and open_clip's ViTs from `timm`. Emu2 itself is put
together here from these parts and the formulas of the paper and the release; it runs one document at a time, so that
nothing of this package's packing, masking or position counting takes part in it.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import goldens
import numpy as np
import tiny
import torch
import torch.nn.functional as F
import transformers
from goldens import Arrays, Case, Golden
from names import to_tree

from emu2_jax.config import LanguageConfig, VisionConfig

try:
    import torchvision  # noqa: F401  (timm wants it)
except RuntimeError:
    # Its compiled operators do not fit this build of PyTorch. timm needs none of them; their registration fails.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
import timm

#: The head widths, patch size, ratios and lengths of the real models, which the small cases of the goldens have not.
REAL_VISION = VisionConfig(image_size=112, width=2 * 112, num_layers=3, num_heads=2, mlp_width=1920)
REAL_LANGUAGE = LanguageConfig(vocab_size=320, width=2 * 128, num_layers=3, num_heads=2, num_kv_heads=2, mlp_width=688)
LARGER: dict[str, Case] = {
    case.name: case
    for case in (
        Case("emu2_real_heads", "emu2", REAL_VISION, REAL_LANGUAGE),
        Case("eva_448_px", "vision", dataclasses.replace(REAL_VISION, image_size=448, num_layers=1)),
        Case("llama_2048", "language", language=REAL_LANGUAGE),
        Case(
            "llama_3_512",
            "language",
            language=dataclasses.replace(
                REAL_LANGUAGE, num_heads=4, num_kv_heads=1, rope_base=500000.0, tied_head=True
            ),
        ),
        Case("wide_heads_64", "language", language=dataclasses.replace(REAL_LANGUAGE, attention_head_width=256)),
    )
}
#: Tokens in a sequence, where it is not the goldens'.
LENGTHS = {"llama_2048": 2048, "llama_3_512": 512, "wide_heads_64": 64}

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def eva(config: VisionConfig) -> torch.nn.Module:
    """timm's EVA-CLIP: the enormous (post-norm, as in Emu2) or the giant one (pre-norm), made small."""
    name = {"post": "eva02_enormous_patch14_clip_224", "pre": "eva_giant_patch14_clip_224"}[config.block_norm]
    return timm.create_model(
        name,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_width / config.width + 1e-9,  # timm truncates the product
        num_classes=0,
        use_post_transformer_norm=config.final_norm,  # Emu2 drops EVA-CLIP's
        use_fc_norm=False,
    )


def open_clip(config: VisionConfig) -> torch.nn.Module:
    """timm's open_clip ViT, made small."""
    return timm.create_model(
        "vit_base_patch32_clip_224" if config.activation == "gelu" else "vit_base_patch32_clip_quickgelu_224",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_width / config.width + 1e-9,
        num_classes=0,
    )


def clip(config: VisionConfig) -> torch.nn.Module:
    """OpenAI's CLIP ViT in transformers."""
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=config.layer_norm_epsilon,
        )
    )


def language(config: LanguageConfig) -> torch.nn.Module:
    """transformers' LLaMA, or Qwen2 where q, k and v have biases."""
    family = "Qwen2" if config.qkv_bias else "Llama"
    own = {} if config.qkv_bias else {"head_dim": config.head_width}
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        max_position_embeddings=4096,
        tie_word_embeddings=config.tied_head,
        attn_implementation="eager",
        **own,
    )
    return getattr(transformers, f"{family}ForCausalLM")(settings)


class Decoder(torch.nn.Module):
    """Holds the language model under the name that it has in the release."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.lm = language(case.language)
        self.lm.project_up = torch.nn.Linear(case.vision.width, case.language.width, bias=False)
        self.lm.project_down = torch.nn.Linear(case.language.width, case.vision.width, bias=False)


class Emu2(torch.nn.Module):
    """All four parts, with the names of the release's state dict."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.num_visual_tokens = case.model.num_visual_tokens
        self.visual = eva(case.vision)
        self.decoder = Decoder(case)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """CLS first, of 8-bit RGB images."""
        pixels = (images.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        return self.visual.forward_features(pixels.permute(0, 3, 1, 2))

    def pool(self, encoded: torch.Tensor) -> torch.Tensor:
        """Without CLS, the grid averaged to sqrt(N) x sqrt(N)."""
        count, patches, width = encoded[:, 1:].shape
        grid = encoded[:, 1:].transpose(1, 2).reshape(count, width, int(patches**0.5), -1)
        stride = int(patches**0.5 // self.num_visual_tokens**0.5)
        return F.avg_pool2d(grid, stride, stride).flatten(2).transpose(1, 2)

    def document(self, tokens: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of one document; its `<image>` positions take the embeddings in order."""
        lm = self.decoder.lm
        x = lm.model.embed_tokens(tokens)
        if len(embeddings):
            x = x.masked_scatter((tokens == tiny.IMAGE)[:, None], lm.project_up(embeddings))
        hidden = lm.model(inputs_embeds=x[None]).last_hidden_state[0]
        return hidden, lm.lm_head(hidden)


def build(case: Case) -> torch.nn.Module:
    """The reference of a case, in eval mode, with random weights."""
    if case.kind == "emu2":
        module: torch.nn.Module = Emu2(case)
    elif case.kind == "language":
        module = language(case.language)
    elif not case.vision.k_bias:
        module = eva(case.vision)
    else:
        module = open_clip(case.vision) if case.vision.final_norm else clip(case.vision)
    randomise(module)
    return module.eval()


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every bias and norm away from 0 and 1, and what enters a norm so small that its epsilon shows.

    An RMSNorm reads token embeddings and what sublayers add to them, a post-norm reads a sublayer's output, CLIP's
    first norm the embedded patches: these get a mean square of about 1e-5, a few times the epsilon.
    """
    rng = np.random.default_rng(seed)
    small = ("embed_tokens.weight", "project_up.weight", "attn.proj", "attn.o_proj", "mlp.fc2", "mlp.down_proj")
    if any("norm_pre" in name or "pre_layrnorm" in name for name, _ in module.named_parameters()):
        small = ("cls_token", "pos_embed", "patch_embed", "embeddings.")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1.0
            scale = 0.2 if len(shape) == 1 else 1.0 / fan_in**0.5
            if any(part in name for part in small):
                scale = 3e-3 if name.endswith("bias") or "embed" in name else 3e-3 / fan_in**0.5
            noise = rng.normal(0.0, scale, shape)
            is_norm = "norm" in name or "layrnorm" in name
            parameter.copy_(torch.from_numpy(noise + (is_norm and name.endswith("weight"))).float())


def golden(case: Case) -> Golden:
    """Run the reference of a case, forward and backward."""
    module = build(case)
    batch = goldens.inputs(case, length=LENGTHS.get(case.name, goldens.LENGTH))
    run = {"emu2": run_emu2, "language": run_language, "vision": run_vision}[case.kind]
    loss, outputs = run(module, case, batch)
    loss.backward()
    weights = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    # A parameter that the loss does not reach (the norm of CLIP's pooled output) has no gradient and no place here.
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    return Golden(
        params=to_tree({name: weights[name] for name in gradients}, case),
        inputs=batch,
        forward={name: value.detach().numpy() for name, value in outputs.items()},
        gradients=to_tree(gradients, case),
    )


Run = tuple[torch.Tensor, dict[str, torch.Tensor]]


def run_vision(module: Any, case: Case, batch: Arrays) -> Run:
    pixels = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
    if isinstance(module, transformers.CLIPVisionModel):
        encoded = module(pixels).last_hidden_state
    else:
        encoded = module.forward_features(pixels)
    return (encoded * torch.from_numpy(batch["cotangent"])).sum(), {"encoded": encoded}


def run_language(module: Any, case: Case, batch: Arrays) -> Run:
    tokens = torch.from_numpy(batch["tokens"]).long()
    hidden = module.model(tokens).last_hidden_state
    logits = module.lm_head(hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss, {"hidden": hidden, "logits": logits, "loss": loss}


def run_emu2(module: Any, case: Case, batch: Arrays) -> Run:
    """Both losses over all documents of the rows, one document at a time, and each term's mean over all of them."""
    rows, length = batch["tokens"].shape
    slots = batch["images"].shape[1]
    encoded = module.encode(torch.from_numpy(batch["images"]).flatten(0, 1))
    present = torch.from_numpy(batch["image_mask"]).flatten()[:, None, None]
    embeddings = module.pool(encoded) * present
    hidden = torch.zeros(rows, length, case.language.width)
    logits = torch.zeros(rows, length, case.language.vocab_size)
    text, regression = [], []
    for row, documents in enumerate(goldens.DOCUMENTS):
        start, picture = 0, row * slots
        for elements in documents:
            ids: list[int] = []
            own: list[torch.Tensor] = []
            for element in elements:
                if element == tiny.PICTURE:
                    visual = [tiny.IMAGE] * case.model.num_visual_tokens
                    ids += [tiny.IMAGE_START, *visual, tiny.IMAGE_END]
                    own.append(embeddings[picture])
                    picture += 1
                else:
                    ids.append(int(element))
            tokens = torch.tensor(ids)
            visual_embeddings = torch.cat(own) if own else embeddings.new_zeros(0, embeddings.shape[-1])
            states, scores = module.document(tokens, visual_embeddings)
            end = start + len(ids)
            hidden[row, start:end], logits[row, start:end] = states, scores
            start = end
            following, is_visual = tokens[1:], tokens[1:] == tiny.IMAGE
            text.append(F.cross_entropy(scores[:-1][~is_visual], following[~is_visual], reduction="none"))
            predicted = module.decoder.lm.project_down(states[:-1][is_visual])
            squared = F.mse_loss(predicted, visual_embeddings.detach(), reduction="none")
            regression.append(squared.mean(-1))
    losses = {"text": torch.cat(text), "regression": torch.cat(regression)}
    return losses["text"].mean() + losses["regression"].mean(), {
        "embeddings": embeddings.reshape(rows, -1, embeddings.shape[-1]),
        "hidden": hidden,
        "logits": logits,
        **{f"loss_{name}": value.mean() for name, value in losses.items()},
        **{f"weight_{name}": torch.tensor(float(len(value))) for name, value in losses.items()},
    }
