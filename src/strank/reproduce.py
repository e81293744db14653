"""The paper's experiments, repeated; beside its numbers what is better."""

from strank.studies.reproduce.hest import hest

__all__ = ["hest"]
