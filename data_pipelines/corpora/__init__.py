"""Corpora: one module per source that writes webdataset shards."""
