"""Every combination of objective, head, encoder and panel, on the folds of a protocol."""
