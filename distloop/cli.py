"""The `distloop` command: one word for each of the things it does."""

from __future__ import annotations

import sys


def main() -> None:
    """distloop train …: what python -m distloop.train does."""
    if sys.argv[1:2] != ["train"]:
        asked_for_help = sys.argv[1:2] in (["--help"], ["-h"])
        print("usage: distloop train [--config FILE] [--help] …", file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    from distloop import cluster, stopping

    stopping.listen()  # before the long imports: from here on a signal is a wish to stop, not the end
    from distloop.train import main as train

    cluster.leave(train(sys.argv[2:]))
