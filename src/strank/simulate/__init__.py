"""Simulated cohorts whose expression is known: tissue, H&E images, counts."""

from __future__ import annotations

from strank.simulate.cohort import simulate_cohort
from strank.simulate.counts import CountDesign
from strank.simulate.tissue import TissueDesign

__all__ = ["CountDesign", "TissueDesign", "simulate_cohort"]
