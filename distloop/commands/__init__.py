"""The words of the `distloop` command."""
