"""The multimodal modelling part: a LLaMA decoder that reads embeddings and gives hidden states.

Source: LLaMA (arXiv 2302.13971) as in `transformers`: pre-norm RMSNorm, rotary positions in the half-split layout,
SwiGLU, no biases, untied output head. `LanguageConfig` also describes its relatives: grouped-query attention, heads of
another width, biases on q, k and v (Qwen2), a head tied to the token embedding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from emu2_jax.config import LanguageConfig
from emu2_jax.models import attention, layers
from emu2_jax.models.stack import Remat, Stack
from emu2_jax.task import Params


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; grouped-query when num_kv_heads < num_heads."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs) -> None:
        width, head_width = config.width, config.head_width
        self.rope_base = config.rope_base
        self.q = layers.kernel((width, config.num_heads, head_width), fan_in=width, rngs=rngs)
        self.k = layers.kernel((width, config.num_kv_heads, head_width), fan_in=width, rngs=rngs)
        self.v = layers.kernel((width, config.num_kv_heads, head_width), fan_in=width, rngs=rngs)
        self.out = layers.kernel((config.num_heads, head_width, width), fan_in=config.num_heads * head_width, rngs=rngs)
        self.has_bias = config.qkv_bias
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((config.num_heads, head_width)))
            self.k_bias = nnx.Param(jnp.zeros((config.num_kv_heads, head_width)))
            self.v_bias = nnx.Param(jnp.zeros((config.num_kv_heads, head_width)))

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries, keys and values, the first two rotated."""
        dtype = x.dtype
        q = layers.product(x, self.q[...].astype(dtype))
        k = layers.product(x, self.k[...].astype(dtype))
        v = layers.product(x, self.v[...].astype(dtype))
        if self.has_bias:
            q += self.q_bias[...].astype(dtype)
            k += self.k_bias[...].astype(dtype)
            v += self.v_bias[...].astype(dtype)
        by_product = attention.platform() == "tpu" and dtype == jnp.bfloat16
        q, k = (layers.rotate(x, positions, base=self.rope_base, by_product=by_product) for x in (q, k))
        return q, k, v

    def combine(self, mixed: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """What the heads found, back in the residual width."""
        return layers.product(mixed, self.out[...].astype(mixed.dtype), 2)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: attention.Mask,
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B T D"]:
        q, k, v = self.project(x, positions)
        return self.combine(attention.attend(q, k, v, mask, kernel=kernel))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.width, config.mlp_width
        self.gate = layers.kernel((width, inner), fan_in=width, rngs=rngs)
        self.up = layers.kernel((width, inner), fan_in=width, rngs=rngs)
        self.down = layers.kernel((inner, width), fan_in=inner, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dtype = x.dtype
        gate = layers.product(x, self.gate[...].astype(dtype))
        up = layers.product(x, self.up[...].astype(dtype))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return layers.product(jax.nn.silu(gate) * up, self.down[...].astype(dtype))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = layers.RMSNorm(config.width, epsilon=config.rms_norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(config.width, epsilon=config.rms_norm_epsilon)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: attention.Mask,
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B T D"]:
        x = checkpoint_name(x + self.attention(self.attention_norm(x), positions, mask, kernel), "attention")
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nnx.Module):
    """Embeddings in, hidden states after the final norm out; token embedding and output head beside them."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs) -> None:
        self.token_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.width)))
        self.blocks = Stack(
            lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs, path="language_model/blocks"
        )
        self.final_norm = layers.RMSNorm(config.width, epsilon=config.rms_norm_epsilon)
        self.tied_head = config.tied_head
        if not config.tied_head:
            self.head = layers.kernel((config.width, config.vocab_size), fan_in=config.width, rngs=rngs)

    def embed(self, tokens: Int[Array, "*axes"], dtype: jnp.dtype) -> Float[Array, "*axes D"]:
        """Token embeddings in the compute dtype."""
        return self.token_embedding[...][tokens].astype(dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: attention.Mask,
        *,
        remat: Remat = "none",
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B T D"]:
        """Hidden states of whole sequences."""
        mask = attention.prepare(mask, kernel, x.dtype)

        def body(block: Block, x: Float[Array, "B T D"], _: None) -> tuple[Float[Array, "B T D"], None]:
            return block(x, positions, mask, kernel=kernel), None

        x, _ = self.blocks.scan(body, x, remat=remat)
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes V"]:
        """Scores over the vocabulary, float32."""
        head = (self.token_embedding[...].T if self.tied_head else self.head[...]).astype(hidden.dtype)
        return layers.product(hidden, head, 1, jnp.float32)


def output_head(params: Params) -> Float[Array, "D V"]:
    """The output head among a language model's parameters; a tied one is the token embedding, transposed."""
    return params["head"] if "head" in params else params["token_embedding"].T
