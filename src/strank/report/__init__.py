"""Pictures and pages: maps of genes, volcano plots, learning curves, pages of many."""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
