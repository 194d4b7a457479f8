"""Checkpoints of every ColBERT library."""
