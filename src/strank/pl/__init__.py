"""Pictures on matplotlib axes, as scanpy draws them: given axes or new ones, which are returned."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "changes": ["volcano"],
        "curves": ["calibration", "learning"],
        "methods": ["depth", "scores"],
        "tissue": ["map", "novelty", "uncertainty"],
    },
)
