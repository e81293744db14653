"""The paper's experiments, repeated; beside its numbers what is better.

Each name is imported when it is first used; the stub beside this file says where from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub("strank", __file__)
