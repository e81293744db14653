"""Simulated cohorts whose expression is known: tissue, H&E images, counts.

Each name is imported when it is first used; the stub beside this file says where from.
"""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
