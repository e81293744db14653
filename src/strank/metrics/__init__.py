"""How well scores predict the counts of sections: arrays in, ``[n_sections, n_genes]`` out.

Every score is ``name(scores, counts, *, section, library_size, ...)``, of arrays ``[n_spots,
n_genes]`` and ``[n_spots]``; sections come in sorted order, and what is undefined is NaN.
"""

from strank.metrics.ceiling import noise_ceiling
from strank.metrics.correlation import pearson, spearman
from strank.metrics.depth import depth_matched_spearman, lift
from strank.metrics.deviance import calibration_slope, deviance_explained, list_gain
from strank.metrics.significance import (
    combine_sections,
    false_discovery_rate,
    mean_intervals,
    p_values,
)

__all__ = [
    "calibration_slope",
    "combine_sections",
    "depth_matched_spearman",
    "deviance_explained",
    "false_discovery_rate",
    "lift",
    "list_gain",
    "mean_intervals",
    "noise_ceiling",
    "p_values",
    "pearson",
    "spearman",
]
