"""The paper's experiments, repeated; beside its numbers what is better.

Each name is imported when it is first used; the stub beside this file says where from.
"""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach("strank", __file__)
