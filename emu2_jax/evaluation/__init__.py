"""Measuring a trained model: on held-out pairs here; each suite is a module of its own."""
