"""Measurements, each a command of its own (`python -m benchmarks.X`) that prints one JSON line per case."""
