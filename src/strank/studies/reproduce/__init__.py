"""The paper's experiments, and what is better beside them."""
