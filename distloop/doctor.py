"""`python -m distloop.doctor` and `accelerate launch distloop/doctor.py`: commands/doctor/main.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = sys.path[0] if __package__ else str(Path(__file__).resolve().parent.parent)
    from distloop.commands.doctor.main import main
    from distloop.ranks.leaving import leave

    leave(main())
