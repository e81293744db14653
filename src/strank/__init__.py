"""Learn relative gene expression from pathology images.

Importing this package loads nothing heavy: each name is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
