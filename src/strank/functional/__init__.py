"""Tensors in, tensors out: no state, no files."""
