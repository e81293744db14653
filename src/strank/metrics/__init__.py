"""How well scores predict the counts of a section: arrays in, ``[n_sections, n_genes]`` out."""
