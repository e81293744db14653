"""Predictions in the formats of other tools."""
