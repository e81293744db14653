"""The paper's synthetic study: every objective on curves whose truth is known."""
