"""The visual decoder: a latent diffusion model that draws an image from its visual embeddings."""
