"""From a cohort to a model: exactly, with networks, or with the image network trained too."""
