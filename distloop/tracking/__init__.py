"""What a run tells: rows to metrics.jsonl and to the console, and lines for people."""
