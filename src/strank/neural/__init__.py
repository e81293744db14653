"""Training of any torch head by any objective."""
