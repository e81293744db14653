"""Sections of all platforms, read into the data contract; predictions in formats of other tools.

Each name is imported when it is first used; the stub beside this file says where from.
"""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
