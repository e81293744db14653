from .studies.reproduce.genes import genes as genes
from .studies.reproduce.hest import hest as hest
from .studies.reproduce.list_size import list_size as list_size
from .studies.synthetic.study import synthetic as synthetic
