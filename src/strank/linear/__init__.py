"""The exact fit of a linear head: convex, so it has one optimum, which is computed."""
