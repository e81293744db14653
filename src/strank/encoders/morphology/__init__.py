"""The built-in encoder: stains, texture and nuclei."""
