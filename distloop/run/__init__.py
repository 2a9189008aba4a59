"""One run and its directory: checkpoints, metrics, status, lock."""
