"""Simulated cohorts whose expression is known: tissue, H&E images, counts.

Each name is imported when it is first used; the stub beside this file says where from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
