"""`python -m distloop.doctor` and `accelerate launch distloop/doctor.py`: the same as `distloop doctor`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = sys.path[0] if __package__ else str(Path(__file__).resolve().parent.parent)
    from distloop.commands.cli import main

    main(["doctor", *sys.argv[1:]])
