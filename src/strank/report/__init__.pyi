from .benchmark import write_report as write_report
from .maps import write_gene_maps as write_gene_maps
from .plots import draw_learning_curves as draw_learning_curves
from .plots import write_volcano as write_volcano
from .slides import write_slides_page as write_slides_page
