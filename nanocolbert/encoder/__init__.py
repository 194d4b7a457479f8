"""Encoders: from a folder or the hub, their attention, and the CPU's fast way through them."""
