"""Pictures and pages: maps of genes, volcano plots, learning curves, pages of many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "benchmark": ["write_report"],
        "maps": ["write_gene_maps"],
        "plots": ["draw_learning_curves", "write_volcano"],
        "slides": ["write_slides_page"],
    },
)
