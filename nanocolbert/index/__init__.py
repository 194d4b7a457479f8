"""Indexes over token embeddings: compressed codes, IVFPQ, exact."""
