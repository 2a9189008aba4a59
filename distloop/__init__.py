"""distloop: one explicit training loop, the same run on one process or many."""

__version__ = "0.1.0"
