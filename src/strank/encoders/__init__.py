"""Image models that turn patches into features."""
