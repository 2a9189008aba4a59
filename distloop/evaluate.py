"""`python -m distloop.evaluate` and `accelerate launch distloop/evaluate.py`: the same as `distloop evaluate`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = sys.path[0] if __package__ else str(Path(__file__).resolve().parent.parent)
    from distloop.commands.cli import main

    main(["evaluate", *sys.argv[1:]])
