"""The paper's experiments, repeated; beside its numbers what is better."""

from strank.studies.reproduce.genes import genes
from strank.studies.reproduce.hest import hest
from strank.studies.reproduce.list_size import list_size
from strank.studies.synthetic.study import synthetic

__all__ = ["genes", "hest", "list_size", "synthetic"]
