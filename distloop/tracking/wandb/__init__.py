"""W&B as a mirror of the run directory, in a process of its own."""
