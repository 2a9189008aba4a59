"""What a user sees of a run while it trains: console, live view, W&B."""
