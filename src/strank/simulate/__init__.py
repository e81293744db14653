"""Simulated cohorts whose expression is known: tissue, H&E images, counts."""
