"""A trained model: what it predicts, which features it knows, its card."""
