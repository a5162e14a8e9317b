"""Continuing prompts of texts and images with texts and images: one cached decoder for all of it (docs/generate.md)."""
