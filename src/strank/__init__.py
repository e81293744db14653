"""Learn relative gene expression from pathology images.

From files to maps, in the order of the work:

- `strank.io`: sections of a platform to AnnData, written into a cohort;
- `strank.embed`: features of the image around every spot, by one of `strank.encoders`;
- `strank.read_cohort`, `strank.fit`: a `RankModel` of those sections, or of any AnnData in memory;
- `strank.evaluate`, `strank.cross_validate`, `strank.benchmark`: on sections that it has not seen;
- `strank.predict`: scores of new slides; `strank.report` draws them, `strank.pl` on axes;
- `strank.contrast`: fold changes between two regions.

Beside them `strank.losses` and `strank.functional` for a network of your own, `strank.metrics` for
its scores, and `STRankRegressor`, `STRankRegressorCV` for features of your own.

Importing this package loads nothing heavy: each name is imported when it is first used.
"""

from strank.extras import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
