"""Shards, index, samples, interleaved sequences and packed rows: the data side, in numpy and grain."""
