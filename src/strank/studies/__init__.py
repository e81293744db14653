"""Experiments that produce tables."""
