"""Encoders: what turns the image around a spot into features; built in, pretrained, or your own."""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
