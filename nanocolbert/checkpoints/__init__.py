"""Checkpoints of every ColBERT library: read into the parts of a model, and written from a model."""

LAYOUTS = ("nanocolbert", "stanford", "pylate", "sentence-transformers")  # that are written; our own is the first
