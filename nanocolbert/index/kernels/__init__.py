"""Loops over single tokens, compiled by numba: no matrix product does their work."""
