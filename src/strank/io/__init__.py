"""Sections of all platforms, read into the data contract; predictions in formats of other tools.

Each name is imported when it is first used; the stub beside this file says where from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
