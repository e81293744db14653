"""Files of the platforms, read into the data contract."""
