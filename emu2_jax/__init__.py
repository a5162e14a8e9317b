"""emu2_jax: train Emu2, a generative multimodal in-context learner, in JAX and Flax."""

__version__ = "0.1.0"
