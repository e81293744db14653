"""Losses as functions of tensors; the same as modules: `strank.losses`.

Every loss is ``name_loss(scores, counts, *, section, offset=None, where=None, weight=None,
reduction="mean")``; `list_loss` says what these are.
"""

from strank.extras import attach

# Lazy: rooms that sort arrays into groups need no torch.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
