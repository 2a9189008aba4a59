"""`python -m distloop.status`: the same as `distloop status`."""

import sys

from distloop.commands.cli import main

if __name__ == "__main__":
    main(["status", *sys.argv[1:]])
