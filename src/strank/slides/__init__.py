"""Images of tissue: pixels at a physical scale, tissue and tiles."""
