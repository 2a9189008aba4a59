"""What is shown of a run while it trains: console, live view, W&B."""
