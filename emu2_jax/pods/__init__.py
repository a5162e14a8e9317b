"""Training steps for TPU slices that are not there: compiled, counted, kept (docs/pods.md)."""
