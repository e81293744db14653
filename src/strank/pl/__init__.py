"""Pictures on matplotlib axes, as scanpy draws them: given axes or new ones, which are returned."""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
