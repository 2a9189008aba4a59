"""Data: which samples (datasets), in which order (sampling), changed how (augment), brought how (loader)."""
