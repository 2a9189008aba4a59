"""`python -m distloop.status`: commands/status.py."""

import sys

from distloop.commands.status import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
