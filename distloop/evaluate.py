"""`python -m distloop.evaluate` and `accelerate launch distloop/evaluate.py`: commands/evaluate.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = sys.path[0] if __package__ else str(Path(__file__).resolve().parent.parent)
    from distloop.commands.evaluate import main
    from distloop.ranks.leaving import leave

    leave(main())
